"""SPD on trained models (arXiv 2502.20727): what dropping a block's sync costs, and how it is repaired.

Everything runs on windows of tokens (windows, T), of which a data-parallel replica takes its share. A block whose sync
is dropped has the pattern's character 1, one that keeps it 2, so the stream between blocks is synced.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reduced_sync import distributed
from reduced_sync.cli import StopSignal
from reduced_sync.distributed import Layout
from reduced_sync.train.experiment import cosine_schedule
from reduced_sync_model import GPT, is_sharded


def head_nats(model: GPT, x: Tensor, idx: Tensor) -> float:
    """The summed loss in nats of x (B, T, C) behind the last layer, of the tokens idx (B, T) but the first of each."""
    logits = model.lm_head(model.transformer.ln_f(x[:, :-1])).float()
    return F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten(), reduction="sum").item()


def share(windows: Tensor, batch_size: int, layout: Layout) -> Iterator[Tensor]:
    """Yield this replica's part of the windows, `batch_size` at a time, on its device."""
    mine = windows[layout.dp_rank :: layout.dp_size]
    for batch in mine.split(batch_size):
        yield batch.to(layout.device)


@torch.no_grad()
def mean_loss(
    model: GPT, windows: Tensor, batch_size: int, layout: Layout, stop: StopSignal | None = None
) -> float | None:
    """Mean loss in nats of windows (N, T), whose first token is not counted. All ranks have to call it.

    None where all ranks have agreed to stop.
    """
    total = count = 0.0
    for idx in distributed.until_stopped(share(windows, batch_size, layout), len(windows), batch_size, layout, stop):
        with layout.autocast():
            total += head_nats(model, model.hidden_states(idx), idx)
        count += idx[:, 1:].numel()
    if stop and stop.agreed:
        return None
    total, count = distributed.sum_over_world([total, count], layout.device)
    return total / count


@torch.no_grad()
def sensitivities(
    model: GPT,
    windows: Tensor,
    batch_size: int,
    layout: Layout,
    progress: Callable = iter,
    stop: StopSignal | None = None,
) -> tuple[list[float], list[float]] | None:
    """(s, perplexities): the paper's algorithm 1 for the layers of a model whose pattern is all 2.

    perplexities[i] is that with the layers from i on dropped, perplexities[n_layer] the dense one, and s[i] the
    difference of i and i + 1. What the layers before i compute is computed once, for all i. None where all ranks have
    agreed to stop.
    """
    L = model.config.n_layer
    dropped = model.with_sync("spd")
    total, count = [0.0] * (L + 1), 0
    batches = progress(list(share(windows, batch_size, layout)))
    for idx in distributed.until_stopped(batches, len(windows), batch_size, layout, stop):
        with layout.autocast():
            before = [model.embed(idx)]
            for i in range(L):
                before.append(model.run_blocks(before[-1], range(i, i + 1)))
            for i in range(L + 1):
                total[i] += head_nats(model, dropped.run_blocks(before[i], range(i, L)), idx)
        count += idx[:, 1:].numel()
    if stop and stop.agreed:
        return None
    *total, count = distributed.sum_over_world([*total, count], layout.device)
    perplexities = [math.exp(min(nats / count, 700.0)) for nats in total]
    return [perplexities[i] - perplexities[i + 1] for i in range(L)], perplexities


def relative_error(x: Tensor, exact: Tensor) -> Tensor:
    """Mean over positions of |x - exact|^2 / |exact|^2, so that the few huge ones do not hide the others."""
    return ((x - exact).square().sum(-1) / exact.square().sum(-1)).mean()


class Descent:
    """AdamW for `steps` updates of `module`: gradients are averaged over replicas and clipped to norm 1.

    The learning rate: 5 % of the steps of warm-up to `peak`, then a cosine to a tenth of it.
    """

    def __init__(self, module: nn.Module, peak: float, steps: int, layout: Layout):
        self.module, self.peak, self.steps, self.layout = module, peak, steps, layout
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)

    def update(self, step: int, loss: Tensor) -> None:
        """Update number `step`, counted from 0, by `loss`."""
        for group in self.optimizer.param_groups:
            group["lr"] = cosine_schedule(step, self.peak, self.peak / 10, max(1, self.steps // 20), self.steps)
        loss.backward()
        distributed.average_gradients(self.module, self.layout.dp_group)
        distributed.clip_gradients(self.module, 1.0, is_sharded, self.layout.tp_group)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def distil(model: GPT, i: int, inputs: Tensor, exact: Tensor, config: Any, layout: Layout) -> tuple[float, float]:
    """Train layer i, its sync dropped, to give `exact` for `inputs`; returns its relative error before and after.

    inputs, exact: (windows, T, C) of this replica; config is drop_syncs.py's. With its `elastic` the layer with its
    sync is trained beside it.
    """
    block, synced, dropped = model.transformer.h[i], model.with_sync("baseline"), model.with_sync("spd")
    size = max(1, config.distil_batch_size // layout.dp_size)
    steps_of_epoch = -(-len(inputs) // size)
    descent = Descent(block, config.distil_learning_rate, config.distil_epochs * steps_of_epoch, layout)

    def loss_of(rows):
        x, target = inputs[rows].to(layout.device), exact[rows].to(layout.device)
        with layout.autocast():
            loss = relative_error(dropped.run_blocks(x, range(i, i + 1)), target)
            if config.elastic:
                loss = loss + relative_error(synced.run_blocks(x, range(i, i + 1)), target)
        return loss

    def error():
        with torch.no_grad():
            losses = [loss_of(slice(first, first + size)).item() for first in range(0, len(inputs), size)]
        return sum(losses) / len(losses)

    before, step = error(), 0
    for epoch in range(config.distil_epochs):
        generator = torch.Generator().manual_seed(distributed.seed_of(config.seed, i, epoch))
        order = torch.randperm(len(inputs), generator=generator)
        for first in range(0, len(inputs), size):
            descent.update(step, loss_of(order[first : first + size]))
            step += 1
    return before, error()


@torch.no_grad()
def run_layer(model: GPT, i: int, x: Tensor, batch_size: int, layout: Layout) -> Tensor:
    """All windows x (windows, T, C) through layer i; on the CPU."""
    outputs = []
    for part in x.split(batch_size):
        with layout.autocast():
            outputs.append(model.run_blocks(part.to(layout.device), range(i, i + 1)).cpu())
    return torch.cat(outputs)


def divergence(model: GPT, teacher: GPT, idx: Tensor, layout: Layout) -> Tensor:
    """Mean over tokens of KL(teacher || model) of their next-token distributions, in nats, on idx (B, T)."""

    def log_probs(one):
        with layout.autocast():
            logits = one.lm_head(one.transformer.ln_f(one.hidden_states(idx)))
        return F.log_softmax(logits.float().flatten(0, 1), dim=-1)

    with torch.no_grad():
        expected = log_probs(teacher)
    return F.kl_div(log_probs(model), expected, reduction="batchmean", log_target=True)
