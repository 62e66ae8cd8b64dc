"""Which heads and neurons stand in which shard: a choice that leaves the dense function as it is.

With all syncs any arrangement computes the same. Where the sync after an attention is dropped, an MLP reads its own
shard's attention output alone, so it matters which neurons stand with which heads.
"""

import dataclasses
import itertools

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import linprog

from reduced_sync.checkpoint import gather_tensor
from reduced_sync.distributed import Layout, from_rank_0
from reduced_sync.hf.weights import unshard_tensor
from reduced_sync_model import GPT, Block, GPTConfig, shard_tensor

Dense = dict[str, torch.Tensor]  # a block's, by name: attn.c_attn.weight
Rope = tuple[torch.Tensor, torch.Tensor] | None


def dense_block(model: GPT, i: int) -> Dense:
    """The dense tensors of layer i, on the CPU. Every rank of the TP group has to call it."""
    names = {name: f"transformer.h.{i}.{name}" for name, _ in model.transformer.h[i].named_parameters()}
    whole = {name: gather_tensor(model, key, model.get_parameter(key).detach()) for name, key in names.items()}
    return {name: unshard_tensor(name, tensor, model.config) for name, tensor in whole.items()}


def set_dense_block(model: GPT, i: int, dense: Dense) -> None:
    """Give layer i the dense tensors of `dense_block`; each rank takes its part."""
    with torch.no_grad():
        for name, parameter in model.transformer.h[i].named_parameters():
            parameter.copy_(model.local_part(name, shard_tensor(name, dense[name], model.config)))


def permuted(dense: Dense, config: GPTConfig, groups: list[int], neurons: list[int]) -> Dense:
    """The tensors of a dense block with its KV groups and its neurons in another order: the same function.

    A KV group is a head of keys and values with the heads of queries that read it.
    """
    D, K = config.head_size, config.n_kv_head
    per_group = config.n_head // K * D  # rows of queries, or columns of the projection
    dense = dict(dense)
    for name, tensor in dense.items():
        if name.startswith("attn.c_attn"):
            q, k, v = tensor.split((K * per_group, K * D, K * D))
            parts = [t.unflatten(0, (K, -1))[groups].flatten(0, 1) for t in (q, k, v)]
            dense[name] = torch.cat(parts)
        elif name == "attn.c_proj.weight":
            dense[name] = tensor.unflatten(1, (K, per_group))[:, groups].flatten(1)
        elif name.startswith(("mlp.c_fc", "mlp.c_gate")):
            dense[name] = tensor[neurons]
        elif name == "mlp.c_proj.weight":
            dense[name] = tensor[:, neurons]
    return dense


def whole_block(dense: Dense, config: GPTConfig, device: torch.device, parts: tuple[str, ...] = ("",)) -> Block:
    """The block of all config.n_shard shards in this process, or those of its parameters that begin with `parts`."""
    block = Block(config, config.n_shard)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name.startswith(parts):
                parameter.copy_(shard_tensor(name, dense[name], config))
    return block.to(device).eval()


def arrange(model: GPT, i: int, batches: list[torch.Tensor], by: str, layout: Layout) -> tuple[list[int], list[int]]:
    """Order layer i's KV groups and its neurons, in place, by `affinity`, or the groups alone by `scatter`.

    batches: x (B, T, C), what the layer reads. Returns both orders.
    """
    config, dense, rope = model.config, dense_block(model, i), model.rope_cos_sin(batches[0].size(1))
    as_they_are, neurons = list(range(config.n_kv_head)), list(range(config.n_hidden))
    # of rank 0: a rounding error more or less may change them, and ranks hold shards of one order
    groups = from_rank_0(place_groups(dense, config, batches, rope, by, layout))
    dense = permuted(dense, config, groups, neurons)
    if by == "affinity":
        neurons = from_rank_0(place_neurons(dense, config, batches, rope, layout))
    set_dense_block(model, i, permuted(dense, config, as_they_are, neurons))
    return groups, neurons


@torch.no_grad()
def place_groups(
    dense: Dense, config: GPTConfig, batches: list[torch.Tensor], rope: Rope, by: str, layout: Layout
) -> list[int]:
    """The order of a layer's KV groups, shard after shard; config has the n_shard to come.

    batches: x (B, T, C), what the layer reads. With y_g a group's output, relative to the stream's norm at each
    position, `affinity` makes the least of what shards do not see, the sum over shards of E|sum of the others' y_g|^2;
    `scatter` (SPD, arXiv 2502.20727, head scattering) puts groups that differ most on one shard: the least sum of
    |cosine| within shards. Pairs are swapped for as long as that makes it less.
    """
    K, S = config.n_kv_head, config.n_shard
    order = list(range(K))
    if K <= S or S == 1:
        return order
    # the neurons are not needed, and K may not divide their number
    each = dataclasses.replace(config, n_shard=K, n_hidden=K)
    block, gram = whole_block(dense, each, layout.device, ("ln_1.", "attn.")), 0
    for x in batches:
        with layout.autocast():
            y = block.attn(block.ln_1(x), rope).float()  # (K, B, T, C) a group's
        y = (y / (x + y.sum(0)).norm(dim=-1, keepdim=True)).flatten(1)
        gram = gram + y @ y.T  # (K, K)
    gram = gram.double().cpu().numpy()
    norms = np.sqrt(np.outer(gram.diagonal(), gram.diagonal()))
    cosine = np.divide(np.abs(gram), norms, out=np.zeros_like(gram), where=norms > 0)  # a head may give zeros

    def cost(order):
        shards = np.repeat(np.arange(S), K // S)
        of = np.empty(K, int)
        of[order] = shards
        if by == "scatter":
            return sum(cosine[np.ix_(of == s, of == s)].sum() for s in range(S))
        return sum(gram[np.ix_(of != s, of != s)].sum() for s in range(S))

    best = cost(order)
    improved = True
    while improved:
        improved = False
        for a, b in itertools.combinations(range(K), 2):
            swapped = list(order)
            swapped[a], swapped[b] = swapped[b], swapped[a]
            if (lower := cost(swapped)) < best * (1 - 1e-9):
                order, best, improved = swapped, lower, True
    return order


@torch.no_grad()
def place_neurons(
    dense: Dense, config: GPTConfig, batches: list[torch.Tensor], rope: Rope, layout: Layout
) -> list[int]:
    """The order of a layer's neurons, shard after shard, by affinity.

    The cost of a neuron in a shard is the error that its activation has there with the sync dropped, squared, relative
    to the stream's norm at each position, times the squared norm of its output row. Costs are assigned at the least
    sum, as many neurons to each shard. batches: x (B, T, C), what the layer reads.
    """
    S, N = config.n_shard, config.n_hidden
    block, costs = whole_block(dense, config, layout.device), torch.zeros(S, N, dtype=torch.float64)
    for x in batches:
        with layout.autocast():
            y = block.attn(block.ln_1(x), rope)  # (S, B, T, C)
            synced = x + y.sum(0, dtype=x.dtype)
            weight = synced.norm(dim=-1, keepdim=True)  # (B, T, 1)
            exact = block.mlp.neurons(block.ln_2(synced))  # (S, B, T, N/S)
            for s in range(S):
                error = (block.mlp.neurons(block.ln_2(x + y[s])) - exact).float() / weight
                costs[s] += error.square().sum((1, 2)).flatten().double().cpu()
    costs *= block.mlp.c_proj.weight.detach().square().sum(-1).flatten().double().cpu()
    # a transport of N neurons to S shards of N/S places, whose best solution is whole; as an assignment to N places it
    # takes three times as long for 14,336 neurons, and more memory
    each_once, each_full = sparse.kron(np.ones((1, S)), sparse.eye(N)), sparse.kron(sparse.eye(S), np.ones((1, N)))
    best = linprog(
        costs.flatten().numpy() / (costs.mean().item() or 1.0),
        A_eq=sparse.vstack([each_once, each_full]).tocsr(),
        b_eq=np.concatenate([np.ones(N), np.full(S, N // S)]),
    )
    shard_of = best.x.reshape(S, N).argmax(0)
    return np.argsort(shard_of, kind="stable").tolist()
