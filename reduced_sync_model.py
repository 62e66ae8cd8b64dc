"""A GPT whose tensor-parallel shards synchronize less often than after every sublayer. The whole model in one file.

The transformer is cut into `n_shard` shards, each with n_head/n_shard heads and n_hidden/n_shard MLP neurons of every
layer. Standard tensor parallelism (TP, Megatron-LM, arXiv 1909.08053) all-reduces the shards' outputs after every
attention and every MLP. Here a SyncRule says where: `baseline`, `spd`, `grouped-4`, or one character per layer,

    2  after attention and after the MLP (standard TP)
    1  after the MLP only (sync-point drop, SPD, arXiv 2502.20727)
    a  after attention only
    0  not at all

Between two sync points a shard sees the last synced stream x plus its own local delta d; a sync adds the sum of all
deltas to x. That is Stream.sync, with every all-reduce of the forward pass but the last of +delayed-layer. Those of the
backward pass come from Stream.reset: the gradient of x, which all shards read, is the sum of theirs.

Shapes: B batch, T time, C n_embd, S shards on this rank (n_shard / tp_size), D head size. A tensor with a leading S is
per shard. `model = GPT(GPTConfig(n_shard=2, sync="spd"))` needs no launcher and no process group.
"""

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

# ---------------------------------------------------------------------------------------------------------------------
# Sync rules


def baseline(n_layer: int) -> str:
    """The pattern of standard TP: 2 syncs per layer, 24 for 12 layers."""
    return "2" * n_layer


def spd(n_layer: int) -> str:
    """Sync-point drop (arXiv 2502.20727): one sync per layer, 12 for 12 layers."""
    return "1" * n_layer


def grouped(n_layer: int, n_syncs: int) -> str:
    """`n_syncs` groups of layers on rank-local streams, each ended by a sync. Raises ValueError if they do not fit."""
    if n_syncs < 1 or n_layer % n_syncs:
        fitting = ", ".join(f"grouped-{n}" for n in range(1, n_layer + 1) if n_layer % n == 0)
        raise ValueError(f"grouped-{n_syncs} does not divide n_layer={n_layer} into equal groups; allowed: {fitting}")
    return ("0" * (n_layer // n_syncs - 1) + "1") * n_syncs


def selective(n_layer: int, pattern: str) -> str:
    """Any pattern of one character per layer. Raises ValueError unless it is valid for `n_layer` layers."""
    if not pattern or set(pattern) - set("210a"):
        raise ValueError(f"sync={pattern!r}: a pattern has one of 2 1 0 a per layer")
    if len(pattern) != n_layer:
        raise ValueError(f"sync={pattern!r} has {len(pattern)} characters; it needs n_layer={n_layer} of them")
    if pattern[-1] not in "12":
        raise ValueError(f"sync={pattern!r}: the last layer must end in a sync, so its character is 1 or 2")
    return pattern


NAMED_PATTERNS = {"baseline": baseline, "spd": spd}
MOST_LAYERS = 2**16  # a pattern has one character per layer


@dataclass(frozen=True)
class SyncRule:
    """When and how shards synchronize: a pattern, one character per layer, and at most one of METHODS.

    Its text is PATTERN or PATTERN+METHOD: `spd`, `grouped-4` (4 syncs in all), `110111011101`, `baseline+ladder`.
    """

    pattern: str
    method_name: str = ""

    @classmethod
    def parse(cls, text: str, n_layer: int) -> "SyncRule":
        """The rule that `text` names for `n_layer` layers. Raises ValueError."""
        name, plus, method_name = text.partition("+")
        named = [name for name in METHODS if name]
        if plus and method_name not in named:
            raise ValueError(f"sync={text!r}: what follows the + is one of {', '.join(named)}")
        if name in NAMED_PATTERNS:
            pattern = NAMED_PATTERNS[name](n_layer)
        elif re.fullmatch(r"grouped-[0-9]{1,4}", name):
            pattern = grouped(n_layer, int(name.removeprefix("grouped-")))
        elif name and set(name) <= set("210a"):
            pattern = selective(n_layer, name)
        else:
            known = f"{', '.join(NAMED_PATTERNS)}, grouped-N (N syncs in all) and one of 2 1 0 a per layer"
            raise ValueError(f"sync={text!r}: allowed are {known}, each with or without +{', +'.join(named)}")
        rule = cls(pattern, method_name)
        if method_name == "parallel" and set(pattern) - set("10"):
            raise ValueError(f"sync={text!r}: a parallel block has one sync or none, so its characters are 1 and 0")
        if rule.method.delays_a_layer and (set(pattern) != {"2"} or n_layer < 2):
            raise ValueError(f"sync={text!r}: it delays every sync of two or more layers: baseline+delayed-layer")
        if rule.method.hides and rule.syncs < 2:
            raise ValueError(f"sync={text!r}: a single sync, the last, has nothing to hide behind")
        return rule

    def __str__(self):
        n_layer = len(self.pattern)
        names = {pattern(n_layer): name for name, pattern in NAMED_PATTERNS.items()}
        if n_layer % self.syncs == 0:
            names.setdefault(grouped(n_layer, self.syncs), f"grouped-{self.syncs}")
        return "+".join(filter(None, (names.get(self.pattern, self.pattern), self.method_name)))

    @property
    def syncs(self) -> int:
        """All-reduces of one forward pass."""
        return sum(map(sum, self.syncs_after())) - self.method.delays_a_layer  # then two are dropped, for one mean

    @property
    def hidden(self) -> int:
        """Those of them behind which a sublayer runs: all but the last one, or those of the inner layers."""
        if self.method.delays_a_layer:
            return 2 * len(self.pattern) - 4
        return self.syncs - 1 if self.method.hides else 0

    @property
    def diagram(self) -> str:
        """A attention, M MLP, | an all-reduce: of the pattern 21 it is `A|M| AM|`."""
        return " ".join(f"A{'|' * attention}M{'|' * mlp}" for attention, mlp in self.syncs_after())

    def syncs_after(self) -> list[tuple[bool, bool]]:
        """For each layer, whether there is a sync after its attention, and whether there is one after its MLP."""
        return [(character in "2a", character in "21") for character in self.pattern]

    @property
    def method(self) -> "Method":
        """What its name stands for."""
        return METHODS[self.method_name]


# ---------------------------------------------------------------------------------------------------------------------
# The stream and the block


class Stream:
    """The residual stream of a forward pass.

    x (B, T, C): as last synced. d (S, B, T, C): what each shard has added since, or None. h: what the shards see, x
    itself after a sync, else x + d, (S, B, T, C). Under bfloat16 autocast d and h are bfloat16 and x is float32.
    """

    def __init__(self, x: Tensor, config: "GPTConfig", tp_group: dist.ProcessGroup | None):
        self.n_shard, self.n_layer, self.tp_group = config.n_shard, config.n_layer, tp_group
        self.reset(x)

    def reset(self, x: Tensor) -> None:
        """All shards see x. copy_to_ranks adds up what they send back in the backward pass."""
        self.x, self.d, self.h = x, None, copy_to_ranks(x, self.tp_group)

    def read(self) -> Tensor:
        """What the shards see: (B, T, C) where all see the same, else (S, B, T, C) per shard."""
        return self.h

    def of_stream(self, y: Tensor) -> Tensor:
        """y as it may be added to a stream, which can be beyond float16's range."""
        return y.to(self.x.dtype) if y.dtype == torch.float16 else y

    def keep(self, y: Tensor) -> None:
        """No sync: y (S, B, T, C) stays with its shard."""
        y = self.of_stream(y)
        self.d = y if self.d is None else self.d + y
        self.h = self.h.to(y.dtype) + y

    def sync(self, y: Tensor) -> None:
        """A sync point: x plus the sum of all shards' deltas, of which y (S, B, T, C) is the last."""
        self.reset(self.x + sum_over_ranks(self.total(y), self.tp_group))

    def total(self, y: Tensor) -> Tensor:
        """What a sync adds to x, before it is summed over the ranks: (B, T, C)."""
        return (y if self.d is None else self.d + y).sum(0, dtype=self.x.dtype)

    def end(self) -> Tensor:
        """x (B, T, C) behind the last layer."""
        return self.x


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: "GPTConfig", n_local_shard: int):
        super().__init__()
        self.ln_1 = Norm(config, n_local_shard)
        self.attn = CausalSelfAttention(config, n_local_shard)
        self.ln_2 = Norm(config, n_local_shard)
        self.mlp = MLP(config, n_local_shard)

    def forward(
        self, stream: Stream, after_attention: bool, after_mlp: bool, rope=None, past=None, mask: Tensor | None = None
    ):
        """Add this layer to the stream, which syncs after the attention, after the MLP, after both or not at all.

        past: this layer's part of a KVCache.
        """
        y = self.attn(self.ln_1(stream.read()), rope, past, mask)
        if after_attention:
            stream.sync(y)
        else:
            stream.keep(y)

        y = self.mlp(self.ln_2(stream.read()))
        if after_mlp:
            stream.sync(y)
        else:
            stream.keep(y)


# ---------------------------------------------------------------------------------------------------------------------
# Collectives: the conjugate functions f and g of Megatron-LM (arXiv 1909.08053, section 3)


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of `x` over the ranks of `group`, in a fresh tensor: x itself may be in use as the residual stream."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad, ctx.group), None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def copy_to_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """f: identity forward, all-reduce backward. For x where shards start to read it, never for the skip path."""
    return x if group is None else _CopyToRanks.apply(x, group)


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """g: all-reduce forward, identity backward."""
    return x if group is None else _SumOverRanks.apply(x, group)


class _Arrived(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, arrived):
        return arrived.view_as(arrived)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def start_sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor | None]:
    """g in two halves: this one starts the all-reduce and returns what finish_sum_over_ranks takes.

    As operators, since dist.all_reduce(async_op=True) would end a compiled graph.
    """
    return x, None if group is None else torch.ops._c10d_functional.all_reduce(x.detach(), "sum", group.group_name)


def finish_sum_over_ranks(x: Tensor, pending: Tensor | None) -> Tensor:
    """Wait for the sum of `x` over the ranks. Its backward is g's: identity."""
    return x if pending is None else _Arrived.apply(x, torch.ops._c10d_functional.wait_tensor(pending))


# ---------------------------------------------------------------------------------------------------------------------
# Layers, each for the S shards that this rank holds: their parameters lead with S. What goes in is per shard, or the
# synced stream (B, T, C) that all shards see; a norm's gains, (S, 1, 1, C), make either one (S, B, T, C).


class Norm(nn.Module):
    """A layer norm or RMS norm (arXiv 1910.07467) per shard. weight and bias (S, C); an RMS norm has no bias."""

    def __init__(self, config: "GPTConfig", n_local_shard: int):
        super().__init__()
        self.normalize = F.rms_norm if config.norm == "rmsnorm" else F.layer_norm
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(n_local_shard, config.n_embd))
        has_bias = config.bias and config.norm == "layernorm"
        self.bias = nn.Parameter(torch.zeros(n_local_shard, config.n_embd)) if has_bias else None

    def forward(self, h: Tensor) -> Tensor:
        """h (B, T, C) or (S, B, T, C) -> (S, B, T, C)."""
        h = self.normalize(h, h.shape[-1:], eps=self.eps) * self.weight[:, None, None]
        return h if self.bias is None else h + self.bias[:, None, None]


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (S, B, T, in) times weight (S, in, out), plus bias (S, out) or None -> (S, B, T, out)."""
    rows = x.flatten(1, 2)  # (S, B*T, in)
    if len(weight) == 1:  # a plain product is faster than a batch of one
        rows, weight = rows.squeeze(0), weight.squeeze(0)
        y = rows @ weight if bias is None else torch.addmm(bias.squeeze(0), rows, weight)
        return y.unflatten(0, (1, *x.shape[1:3]))
    y = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias[:, None], rows, weight)
    return y.unflatten(1, x.shape[1:3])


class ColumnParallel(nn.Module):
    """A linear layer cut by its output. weight (S, out, in), bias (S, out)."""

    def __init__(self, n_local_shard: int, n_in: int, n_out: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_local_shard, n_out, n_in))
        self.bias = nn.Parameter(torch.zeros(n_local_shard, n_out)) if bias else None

    def forward(self, h: Tensor) -> Tensor:
        """h (S, B, T, in) -> (S, B, T, out)."""
        return multiply(h, self.weight.mT, self.bias)


class RowParallel(nn.Module):
    """A linear layer cut by its input: its output is the sum over shards. weight (S, in, out), bias (S, out)."""

    def __init__(self, n_local_shard: int, n_in: int, n_out: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_local_shard, n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_local_shard, n_out)) if bias else None

    def forward(self, y: Tensor) -> Tensor:
        """y (S, B, T, in) -> (S, B, T, out), of which a sync makes the sum."""
        return multiply(y, self.weight, self.bias)


class HeadNorm(nn.Module):
    """An RMS norm of each head by itself (QK norm, arXiv 2010.04245). weight (S, D), the same for a shard's heads."""

    def __init__(self, config: "GPTConfig", n_local_shard: int):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(n_local_shard, config.head_size))

    def forward(self, heads: Tensor) -> Tensor:
        """heads (S, B, T, any, D) -> the same shape."""
        normed = F.rms_norm(heads, heads.shape[-1:], eps=self.eps) * self.weight[:, None, None, None]
        return normed.to(heads.dtype)  # under autocast, that of the values


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE (arXiv 2104.09864): x (..., T, D), the halves of D as pairs, turned by `rope`, cos and sin (T, D/2)."""
    (a, b), (cos, sin) = x.chunk(2, dim=-1), rope
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class CausalSelfAttention(nn.Module):
    """A shard has H heads of queries and K of keys and values, shared where K < H (GQA, arXiv 2305.13245)."""

    def __init__(self, config: "GPTConfig", n_local_shard: int):
        super().__init__()
        self.dropout, self.head_size = config.dropout, config.head_size
        self.n_local_head = config.n_head // config.n_shard
        self.n_local_kv_head = max(1, config.n_kv_head // config.n_shard)
        n_qkv = (self.n_local_head + 2 * self.n_local_kv_head) * self.head_size
        self.c_attn = ColumnParallel(n_local_shard, config.n_embd, n_qkv, config.bias or config.qkv_bias)
        self.q_norm = HeadNorm(config, n_local_shard) if config.qk_norm else None
        self.k_norm = HeadNorm(config, n_local_shard) if config.qk_norm else None
        self.c_proj = RowParallel(n_local_shard, self.n_local_head * self.head_size, config.n_embd, config.bias)

    def forward(self, h: Tensor, rope=None, past=None, mask: Tensor | None = None) -> Tensor:
        """h (S, B, T, C) -> (S, B, T, C).

        rope: for rotate(). past: this layer's (keys, values) of a KVCache, and the places (T,) in it that these tokens
        take. mask (S*B or 1, 1, T, places), as scaled_dot_product_attention has it: what each token sees of the
        cache's first places, or of h; None: of h, itself and all before.
        """
        S, B, T, _ = h.shape
        qkv = self.c_attn(h).unflatten(-1, (-1, self.head_size))  # (S, B, T, H+2K, D)
        q, k, v = qkv.split((self.n_local_head, self.n_local_kv_head, self.n_local_kv_head), dim=3)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(2, 3).flatten(0, 1) for t in (q, k, v))  # (S*B, heads, T, D): each shard's by themselves
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if past is not None:
            keys, values, places = past  # (S*B, K, capacity, D) twice
            keys.index_copy_(2, places, k.to(keys.dtype))
            values.index_copy_(2, places, v.to(values.dtype))
            if mask is not None:
                k, v = keys[:, :, : mask.size(-1)], values[:, :, : mask.size(-1)]
        options = dict(attn_mask=mask, is_causal=mask is None, dropout_p=self.dropout if self.training else 0.0)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.n_local_kv_head < self.n_local_head, **options)
        y = y.transpose(1, 2).reshape(S, B, T, -1)  # (S, B, T, H*D)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """Of mlp="swiglu" (arXiv 2002.05202) the neurons have a gate each."""

    def __init__(self, config: "GPTConfig", n_local_shard: int):
        super().__init__()
        n_local_hidden = config.n_hidden // config.n_shard
        self.dropout = config.dropout
        self.c_fc = ColumnParallel(n_local_shard, config.n_embd, n_local_hidden, config.bias)
        self.c_gate = (
            ColumnParallel(n_local_shard, config.n_embd, n_local_hidden, config.bias)
            if config.mlp == "swiglu"
            else None
        )
        self.c_proj = RowParallel(n_local_shard, n_local_hidden, config.n_embd, config.bias)

    def neurons(self, h: Tensor) -> Tensor:
        """h (S, B, T, C) -> (S, B, T, n_hidden/n_shard)."""
        if self.c_gate is None:
            return F.gelu(self.c_fc(h), approximate="tanh")  # tanh: GPT-2's own
        return F.silu(self.c_gate(h)) * self.c_fc(h)

    def forward(self, h: Tensor) -> Tensor:
        """h (S, B, T, C) -> (S, B, T, C)."""
        return F.dropout(self.c_proj(self.neurons(h)), self.dropout, self.training)


# ---------------------------------------------------------------------------------------------------------------------
# Other methods of waiting less. Each differs from the plain stream, or the plain block, in what it overrides.


class ParallelBlock(Block):
    """Attention and MLP read the same stream (GPT-J; PaLM, arXiv 2204.02311). Its layers sync at their end or not."""

    def forward(
        self, stream: Stream, after_attention: bool, after_mlp: bool, rope=None, past=None, mask: Tensor | None = None
    ):
        h = stream.read()
        y = self.attn(self.ln_1(h), rope, past, mask) + self.mlp(self.ln_2(h))
        if after_mlp:
            stream.sync(y)
        else:
            stream.keep(y)


class Desync(Stream):
    """A sync adds the mean of the shards' earlier deltas, and the sum of the last ones (arXiv 2501.06589v1)."""

    def total(self, y: Tensor) -> Tensor:
        return (y if self.d is None else self.d / self.n_shard + y).sum(0, dtype=self.x.dtype)


class Tracks(Stream):
    """A sync makes every shard's stream the mean of all (Parallel Track, arXiv 2602.07306)."""

    def total(self, y: Tensor) -> Tensor:
        return super().total(y) / self.n_shard


class Ladder(Stream):
    """The all-reduce of a sync is in flight while the next sublayer runs, which sees nothing of it (arXiv 2501.06589).

    in_flight: a sync in flight, or None. before: what the shards see of the x before it.
    """

    def reset(self, x: Tensor) -> None:
        super().reset(x)
        self.before, self.in_flight = self.h, None

    def keep(self, y: Tensor) -> None:
        self.arrive()
        super().keep(y)

    def sync(self, y: Tensor) -> None:
        """A sync point, which ends when the next sublayer has run."""
        self.arrive()
        self.in_flight = start_sum_over_ranks(self.total(y), self.tp_group)
        self.d, self.h = None, self.meanwhile(y)

    def meanwhile(self, y: Tensor) -> Tensor:
        """What the shards see while the sync of y is in flight."""
        return self.before

    def arrive(self) -> None:
        """Wait for the sync in flight, if any. Its sum takes the place of the shards' own parts."""
        if self.in_flight is not None:
            self.reset(self.x + finish_sum_over_ranks(*self.in_flight))

    def end(self) -> Tensor:
        self.arrive()
        return self.x


class Delayed(Ladder):
    """As Ladder, but meanwhile each shard sees its own part of the sum."""

    def meanwhile(self, y: Tensor) -> Tensor:
        y = self.of_stream(y)
        return self.h.to(y.dtype) + y


class DelayedLayer(Stream):
    """Delayed TP as Kog publish it: others' outputs of a module come a layer late, with the same module's next ones.

    The first layer is in step. What the last one computes for others is never sent, and the end is the mean of the
    shards' streams; where Kog take the mean of each one's final norm, here the norm is of the mean.
    """

    def reset(self, x: Tensor) -> None:
        super().reset(x)
        self.in_flight = []  # (y, what finish_sum_over_ranks takes) of the modules of the last layer

    def __init__(self, x: Tensor, config: "GPTConfig", tp_group: dist.ProcessGroup | None):
        super().__init__(x, config, tp_group)
        self.modules = 0  # that have run

    def sync(self, y: Tensor) -> None:
        """Add y (S, B, T, C) to its shards, and what the others' same module had a layer before."""
        self.modules += 1
        if self.modules <= 2:
            super().sync(y)
            return
        self.h = self.h + y
        if self.modules > 4:
            before, pending = self.in_flight.pop(0)
            self.h = self.h + copy_to_ranks(finish_sum_over_ranks(*pending), self.tp_group) - before
        if self.modules <= 2 * self.n_layer - 2:
            self.in_flight.append((y, start_sum_over_ranks(y.sum(0, dtype=self.x.dtype), self.tp_group)))

    def end(self) -> Tensor:
        return sum_over_ranks(self.h.sum(0) / self.n_shard, self.tp_group)


class Method(NamedTuple):
    """The classes of a rule's layers and of its stream, and whether a sublayer runs behind each sync but the last."""

    block: type[Block] = Block
    stream: type[Stream] = Stream
    hides: bool = False
    delays_a_layer: bool = False  # they arrive a layer later: the first layer's are in step, the last one's are dropped


METHODS = {
    "": Method(),
    "parallel": Method(block=ParallelBlock),
    "desync": Method(stream=Desync),
    "tracks": Method(stream=Tracks),
    "ladder": Method(stream=Ladder, hides=True),
    "delayed": Method(stream=Delayed, hides=True),
    "delayed-layer": Method(stream=DelayedLayer, hides=True, delays_a_layer=True),
}


# ---------------------------------------------------------------------------------------------------------------------
# Parameters: how each is cut into shards. Dense tensors have nanoGPT's names and nn.Linear's layout (out, in).


class Role(NamedTuple):
    """How a dense tensor is cut, and whether it is a matrix: matrices decay and can be kept in fewer bits.

    replicated  not at all: it acts on the synced stream, and every rank has it
    copied      each shard has one of its own, equal at the start
    heads       by its output, Q, K and V each by heads: ((n_head + 2*n_kv_head)*D, ...) -> (S, (H + 2*K)*D, ...);
                where there are fewer KV heads than shards, each shard that reads one has a copy of it
    output      by its output: (out, ...) -> (S, out/n_shard, ...)
    input       by its input, transposed so that all shards' rows are one matrix: (out, in) -> (S, in/n_shard, out)
    divided     into equal parts, of which a sync makes the sum: (C) -> (S, C)
    """

    cut: str
    is_matrix: bool


ROLES = {
    "wte.weight": Role("replicated", True),
    "wpe.weight": Role("replicated", True),
    "ln_1.weight": Role("copied", False),
    "ln_1.bias": Role("copied", False),
    "attn.c_attn.weight": Role("heads", True),
    "attn.c_attn.bias": Role("heads", False),
    "attn.q_norm.weight": Role("copied", False),
    "attn.k_norm.weight": Role("copied", False),
    "attn.c_proj.weight": Role("input", True),
    "attn.c_proj.bias": Role("divided", False),
    "ln_2.weight": Role("copied", False),
    "ln_2.bias": Role("copied", False),
    "mlp.c_fc.weight": Role("output", True),
    "mlp.c_fc.bias": Role("output", False),
    "mlp.c_gate.weight": Role("output", True),
    "mlp.c_gate.bias": Role("output", False),
    "mlp.c_proj.weight": Role("input", True),
    "mlp.c_proj.bias": Role("divided", False),
    "ln_f.weight": Role("replicated", False),
    "ln_f.bias": Role("replicated", False),
    "lm_head.weight": Role("replicated", True),
}


def role_of(name: str) -> Role:
    """The role of the parameter `name` of a GPT, such as transformer.h.3.attn.c_attn.weight."""
    return ROLES[re.sub(r"^transformer\.(h\.\d+\.)?", "", name)]


def is_sharded(name: str) -> bool:
    """Whether the parameter `name` has the shard dimension."""
    return role_of(name).cut != "replicated"


def shard_tensor(name: str, dense: Tensor, config: "GPTConfig") -> Tensor:
    """One dense tensor -> (n_shard, ...), or itself where it is replicated."""
    n_shard = config.n_shard
    match role_of(name).cut:
        case "replicated":
            return dense
        case "copied":
            return dense.expand(n_shard, -1)
        case "heads":
            q, k, v = dense.split([n * config.head_size for n in (config.n_head, config.n_kv_head, config.n_kv_head)])
            copies = max(1, n_shard // config.n_kv_head)
            k, v = (t.unflatten(0, (n_shard // copies, -1)).repeat_interleave(copies, 0) for t in (k, v))
            return torch.cat((q.unflatten(0, (n_shard, -1)), k, v), dim=1)
        case "output":
            return dense.unflatten(0, (n_shard, -1))
        case "input":
            return dense.t().unflatten(0, (n_shard, -1))
        case "divided":
            return (dense / n_shard).expand(n_shard, -1)


def initial_weights(config: "GPTConfig") -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of every random tensor of a dense model, sampled on the CPU in a fixed order."""
    C, D, hidden = config.n_embd, config.head_size, config.n_hidden
    small = 0.02 / math.sqrt(2 * config.n_layer)  # GPT-2: the 2*n_layer layers that write to the residual stream
    yield "transformer.wte.weight", torch.normal(0.0, 0.02, (config.vocab_size, C))
    if config.position == "learned":
        yield "transformer.wpe.weight", torch.normal(0.0, 0.02, (config.block_size, C))
    for i in range(config.n_layer):
        n_qkv = (config.n_head + 2 * config.n_kv_head) * D
        yield f"transformer.h.{i}.attn.c_attn.weight", torch.normal(0.0, 0.02, (n_qkv, C))
        yield f"transformer.h.{i}.attn.c_proj.weight", torch.normal(0.0, small, (C, config.n_head * D))
        yield f"transformer.h.{i}.mlp.c_fc.weight", torch.normal(0.0, 0.02, (hidden, C))
        if config.mlp == "swiglu":
            yield f"transformer.h.{i}.mlp.c_gate.weight", torch.normal(0.0, 0.02, (hidden, C))
        yield f"transformer.h.{i}.mlp.c_proj.weight", torch.normal(0.0, small, (C, hidden))
    if not config.tie_embeddings:
        yield "lm_head.weight", torch.normal(0.0, 0.02, (config.vocab_size, C))


# ---------------------------------------------------------------------------------------------------------------------
# The model


@dataclass
class GPTConfig:
    """The whole model's shape, whatever part of it a rank holds. Raises ValueError for what cannot be built."""

    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257 padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in the linear layers and layer norms, as in GPT-2
    n_shard: int = 1
    sync: str = "baseline"  # the SyncRule: baseline, spd, grouped-N or one of 2 1 0 a per layer, and +METHOD
    norm: str = "layernorm"  # or rmsnorm; this and what follows: Llama's family beside GPT-2's
    norm_eps: float = 1e-5
    position: str = "learned"  # or rope
    rope_theta: float = 10000.0
    rope_inv_freq: tuple = ()  # radians per position of each of the D/2 pairs; empty: by rope_theta
    mlp: str = "gelu"  # or swiglu
    n_hidden: int = 0  # neurons of an MLP; 0: 4*n_embd
    n_kv_head: int = 0  # heads of keys and values; 0: n_head
    head_size: int = 0  # 0: n_embd/n_head
    qkv_bias: bool = False  # biases of queries, keys and values where `bias` gives none, as in Qwen2
    qk_norm: bool = False  # an RMS norm of each head of queries and keys, before rope, as in Qwen3
    tie_embeddings: bool = True  # lm_head and wte are one matrix

    def __post_init__(self):
        for field in fields(self):  # which may come from a file
            name, value = field.name, getattr(self, field.name)
            if type(value) not in {float: (float, int), tuple: (tuple, list)}.get(field.type, (field.type,)):
                raise ValueError(f"{name}={value!r} must be {field.type.__name__}, not {type(value).__name__}")
            least = int(name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_shard"))
            most = MOST_LAYERS if name == "n_layer" else 2**31
            if field.type is int and not least <= value <= most:
                raise ValueError(f"{name}={value} must be at least {least}, and at most {most}")
            if name in ("norm_eps", "rope_theta") and not 0 < value < 1e18:
                raise ValueError(f"{name}={value} must be above 0, and below 1e18")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        if not self.head_size and self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        self.head_size = self.head_size or self.n_embd // self.n_head
        self.n_kv_head = self.n_kv_head or self.n_head
        self.n_hidden = self.n_hidden or 4 * self.n_embd
        self.rope_inv_freq = tuple(self.rope_inv_freq)  # a list where it comes from JSON
        if not all(type(speed) in (float, int) and abs(speed) < 1e30 for speed in self.rope_inv_freq):
            raise ValueError(f"rope_inv_freq={self.rope_inv_freq!r} must be finite numbers")
        if self.rope_inv_freq and len(self.rope_inv_freq) != self.head_size // 2:
            raise ValueError(
                f"rope_inv_freq has {len(self.rope_inv_freq)} numbers, not head_size/2={self.head_size // 2}"
            )
        for name in ("n_head", "n_hidden"):
            if getattr(self, name) % self.n_shard:
                raise ValueError(f"{name}={getattr(self, name)} is not divisible by n_shard={self.n_shard}")
        if self.n_head % self.n_kv_head or (self.n_kv_head % self.n_shard and self.n_shard % self.n_kv_head):
            raise ValueError(
                f"n_kv_head={self.n_kv_head} must divide n_head={self.n_head}, and divide or be a multiple of "
                f"n_shard={self.n_shard}"
            )
        if self.position == "rope" and self.head_size % 2:
            raise ValueError(f"head_size={self.head_size} must be even for position='rope': it turns pairs")
        choices = {"norm": ("layernorm", "rmsnorm"), "position": ("learned", "rope"), "mlp": ("gelu", "swiglu")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: allowed are {', '.join(map(repr, allowed))}")
        self.rule = SyncRule.parse(self.sync, self.n_layer)
        self.sync = str(self.rule)

    def check_tp_size(self, tp_size: int, name: str = "") -> None:
        """Raise ValueError unless `tp_size` ranks can share this model, which the error calls `name`."""
        if self.n_shard % tp_size:
            of = f" of {name}" if name else ""
            raise ValueError(f"n_shard={self.n_shard}{of} is not divisible by tp_size={tp_size}")
        if self.dropout > 0 and tp_size > 1:
            raise ValueError(f"dropout={self.dropout} needs tp_size=1, not {tp_size}: ranks would drop differently")


class KVCache:
    """Keys and values of the tokens that a model has seen, for this rank's shards, allocated for `capacity` tokens.

    model(idx, cache=cache) adds those of idx: a whole prompt to an empty cache (prefill), then one token at a time
    (decode). Setting `length`, of the tokens in it, to 0 empties it. capacity: None for block_size.
    """

    def __init__(self, model: "GPT", batch_size: int, capacity: int | None = None):
        c, wte = model.config, model.transformer.wte.weight
        n_local_shard = c.n_shard // model.tp_size
        shape = (
            n_local_shard * batch_size,
            max(1, c.n_kv_head // c.n_shard),
            c.block_size if capacity is None else capacity,
            c.head_size,
        )  # (S*B, K, capacity, D)
        # zeros: what a step sees but does not attend to must be finite
        self.layers = [(wte.new_zeros(shape), wte.new_zeros(shape)) for _ in range(c.n_layer)]
        self.rope = model.rope_cos_sin(shape[2])
        self.length = 0


class GPT(nn.Module):
    """`GPT(config)` holds all shards in one process; with a process group it holds this rank's n_shard / tp_size.

    Raises ValueError for a layout that the model cannot be cut into. The initial weights are the dense model's, sampled
    from torch's global generator and cut, so they do not depend on the layout.
    """

    def __init__(self, config: GPTConfig, tp_group: dist.ProcessGroup | None = None):
        super().__init__()
        self.config = config
        self.tp_size = tp_group.size() if tp_group is not None else 1
        config.check_tp_size(self.tp_size)
        self.tp_group = tp_group if self.tp_size > 1 else None
        n_local_shard = config.n_shard // self.tp_size
        first = n_local_shard * (tp_group.rank() if self.tp_group is not None else 0)
        self.local_shards = slice(first, first + n_local_shard)

        block = config.rule.method.block
        layers = dict(wte=nn.Embedding(config.vocab_size, config.n_embd))
        if config.position == "learned":
            layers |= dict(wpe=nn.Embedding(config.block_size, config.n_embd))
        layers |= dict(drop=nn.Dropout(config.dropout))
        layers |= dict(h=nn.ModuleList([block(config, n_local_shard) for _ in range(config.n_layer)]))
        if config.norm == "rmsnorm":
            layers |= dict(ln_f=nn.RMSNorm(config.n_embd, config.norm_eps))
        else:
            layers |= dict(ln_f=nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias))
        self.transformer = nn.ModuleDict(layers)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        if self.lm_head.weight.is_meta:  # shapes alone: torch.normal would sample on the CPU all the same
            return
        parameters = dict(self.named_parameters())
        with torch.no_grad():
            for name, dense in initial_weights(config):
                parameters[name].copy_(self.local_part(name, shard_tensor(name, dense, config)))

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Token ids (B, T) -> logits and, where targets (B, T) are given, the mean loss in nats (-1: no target).

        With a KVCache idx continues the tokens in it. Logits are (B, T, vocab_size) with targets, else (B, 1,
        vocab_size), those of the last position. Raises ValueError for a sequence longer than block_size, and for more
        than one token behind those in a cache.
        """
        x = self.hidden_states(idx, cache)
        if targets is None:
            return self.lm_head(self.transformer.ln_f(x[:, -1:])), None
        logits = self.lm_head(self.transformer.ln_f(x))
        # in float32 also under autocast: in bfloat16 a token's log-softmax is off by 0.02
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(exact.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)
        return logits, loss

    def hidden_states(
        self, idx: Tensor, cache: KVCache | None = None, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Token ids (B, T) -> the synced stream behind the last layer (B, T, C), which ln_f and lm_head make logits of.

        For rows of unlike length: positions (B, T) of the ids, and mask (B, T, past_length + T), what each of them
        sees. Only with a mask may several tokens follow those in a cache.
        """
        T, past_length = idx.size(1), 0 if cache is None else cache.length
        if (length := past_length + T) > self.config.block_size:
            raise ValueError(f"a sequence of {length} tokens is longer than block_size={self.config.block_size}")
        if past_length and T > 1 and mask is None:
            raise ValueError(f"{T} tokens behind the {past_length} in the cache: decoding takes one at a time")
        if mask is not None:
            mask = mask.repeat(self.config.n_shard // self.tp_size, 1, 1)[:, None]  # (S*B, 1, T, past_length+T)
        elif past_length:
            mask = idx.new_ones(1, 1, 1, length, dtype=torch.bool)
        places = None if cache is None else torch.arange(past_length, length, device=idx.device)
        x = self.transformer.drop(self.embed(idx, places if positions is None else positions))
        x = self.run_blocks(x, places=places, cache=cache, mask=mask)
        if cache is not None:
            cache.length = length
        return x

    def decode_step(self, idx: Tensor, place: Tensor, cache: KVCache, n_seen: int) -> Tensor:
        """Token ids (B, 1), whose place in the cache is `place` (1,), on their device -> logits (B, 1, vocab_size).

        Its operations depend on n_seen alone, so that a CUDA graph can repeat them: the tokens see as much of the
        cache's first n_seen places as is filled. cache.length is neither read nor changed.
        """
        x = self.embed(idx, place)
        mask = x.new_zeros(n_seen).masked_fill_(torch.arange(n_seen, device=x.device) > place, -torch.inf)
        x = self.run_blocks(x, places=place, cache=cache, mask=mask[None, None, None])
        return self.lm_head(self.transformer.ln_f(x))

    def embed(self, idx: Tensor, positions: Tensor | None = None) -> Tensor:
        """Token ids (B, T) at positions (B or 1, T) or (T,), None for the first ones -> x (B, T, C)."""
        x = self.transformer.wte(idx)
        if self.config.position == "rope":  # the attention's
            return x
        return x + self.transformer.wpe.weight[slice(idx.size(1)) if positions is None else positions]

    def run_blocks(
        self,
        x: Tensor,
        layers: range | None = None,
        places: Tensor | None = None,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, C), a synced stream, through all layers, or through `layers`, the last of which syncs; (B, T, C).

        places (T,): those of the tokens in the cache, where there is one.
        """
        if cache is None:
            rope = self.rope_cos_sin(x.size(1))
        else:  # only differences of positions count
            rope = cache.rope and tuple(table[places] for table in cache.rope)
        stream = self.config.rule.method.stream(x, self.config, self.tp_group)
        syncs_after = self.config.rule.syncs_after()
        for i in range(self.config.n_layer) if layers is None else layers:
            past = None if cache is None else (*cache.layers[i], places)
            self.transformer.h[i](stream, *syncs_after[i], rope, past, mask)
        return stream.end()

    def rope_cos_sin(self, T: int) -> tuple[Tensor, Tensor] | None:
        """cos and sin, each (T, D/2), of inv_freq times position, of the first T positions; None: learned."""
        c, weight = self.config, self.transformer.wte.weight
        if c.position == "learned":
            return None
        exact = dict(device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
        if c.rope_inv_freq:
            inv_freq = torch.tensor(c.rope_inv_freq, **exact)
        else:
            inv_freq = 1.0 / c.rope_theta ** (torch.arange(0, c.head_size, 2, **exact) / c.head_size)
        angles = torch.arange(T, **exact)[:, None] * inv_freq
        return angles.cos(), angles.sin()

    def with_sync(self, sync: str) -> "GPT":
        """This model under another pattern of syncs. It shares all weights. Raises ValueError for an impossible one."""
        model = copy.copy(self)
        model.config = replace(self.config, sync=sync)
        if model.config.rule.method.block is not self.config.rule.method.block:
            raise ValueError(f"sync={sync!r} has other layers than this model's {self.config.sync!r}")
        return model

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Parameters of the whole model, all ranks together; like nanoGPT's count, without the position embedding."""
        n = sum(p.numel() * (self.tp_size if is_sharded(name) else 1) for name, p in self.named_parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding and self.config.position == "learned" else n

    def local_part(self, name: str, full: Tensor) -> Tensor:
        """This rank's slice of the whole model's parameter (or optimizer state) called `name`."""
        return full[self.local_shards] if is_sharded(name) else full

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.Optimizer:
        """AdamW, fused on CUDA and CPU; matrices and embeddings decay, biases and norm gains do not."""
        named = list(self.named_parameters())
        groups = [
            {"params": [p for name, p in named if role_of(name).is_matrix], "weight_decay": weight_decay},
            {"params": [p for name, p in named if not role_of(name).is_matrix], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ("cuda", "cpu"))
