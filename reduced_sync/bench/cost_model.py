"""A small cost model of tensor-parallel inference.

One forward pass of B sequences with T new tokens each, behind a context of tokens in the KV cache, on one TP rank:

    n_layer * overhead  +  max(bytes / bandwidth, flops / peak)  +  syncs * (alpha + payload * beta)

bytes: this rank's weights and its part of the cache, read once. flops: two a weight and token, and attention. payload:
B * T * n_embd float32 numbers. alpha and beta of an all-reduce over n ranks are those of a ring, as in NCCL's own cost
model: alpha = base + 2 (n - 1) * step, beta = 2 (n - 1) / n / bus bandwidth. Of a sync that is hidden, what the
sublayer that runs meanwhile leaves: max(0, all-reduce - sublayer). Seconds, bytes and flops throughout.

Communication takes none of the processor's time. So it does not hold on a CPU, where gloo works on the core that should
compute meanwhile: hidden syncs cost more than this says, TPOT is up to a third too low (results/decode-all).
"""

from collections.abc import Sequence

import numpy as np

from reduced_sync.hardware import Accelerator, Link
from reduced_sync_model import GPTConfig


def sublayers(
    config: GPTConfig, tp_size: int, batch_size: int, tokens: int, context: int, itemsize: int = 4
) -> list[tuple[float, float]]:
    """[(bytes, flops)] of a rank for an attention and for an MLP. `context` includes the new tokens.

    itemsize: bytes of a weight and of a number in the cache.
    """
    c = config
    width, kv_width = c.n_head * c.head_size, max(c.n_kv_head, c.n_shard) * c.head_size  # each shard has a KV head
    seen = context - (tokens - 1) / 2  # causal: a token sees those before it
    attention, mlp = 2 * c.n_embd * (width + kv_width), (3 if c.mlp == "swiglu" else 2) * c.n_embd * c.n_hidden
    cache, products = 2 * batch_size * context * kv_width, 4 * batch_size * tokens * seen * width
    parts = (attention, cache, products), (mlp, 0, 0)
    return [
        (itemsize * (weights + cache) / tp_size, (2 * batch_size * tokens * weights + products) / tp_size)
        for weights, cache, products in parts
    ]


def bytes_read(config: GPTConfig, tp_size: int, batch_size: int, context: int, itemsize: int = 4) -> float:
    """Bytes that a rank reads to decode one token of each sequence: blocks and cache in parts, the head whole."""
    block = sum(n_bytes for n_bytes, _ in sublayers(config, tp_size, batch_size, 1, context, itemsize))
    return config.n_layer * block + itemsize * config.vocab_size * config.n_embd


def flops(config: GPTConfig, tp_size: int, batch_size: int, tokens: int, context: int) -> float:
    """Floating point operations of a rank; logits only of the last position. `context` includes the new tokens."""
    block = sum(n_flops for _, n_flops in sublayers(config, tp_size, batch_size, tokens, context))
    return config.n_layer * block + 2 * batch_size * config.vocab_size * config.n_embd


def forward_seconds(
    config: GPTConfig,
    accelerator: Accelerator,
    link: Link | None,
    tp_size: int,
    batch_size: int,
    tokens: int,
    context: int,
    itemsize: int = 4,
    added_delay: float = 0.0,
) -> float:
    """The model at the top of this file. tokens = context is a prefill (TTFT), tokens = 1 a decoded token (TPOT).

    link: None where all-reduces send nothing. added_delay: seconds that an all-reduce takes at least.
    """
    compute = flops(config, tp_size, batch_size, tokens, context) / accelerator.peak
    memory = bytes_read(config, tp_size, batch_size, context, itemsize) / accelerator.bandwidth
    seconds = config.n_layer * accelerator.overhead + max(memory, compute)
    if link is None or tp_size == 1:
        return seconds
    all_reduce = max(added_delay, link.all_reduce(4 * batch_size * tokens * config.n_embd, tp_size))
    rule = config.rule
    if not rule.hidden:
        return seconds + rule.syncs * all_reduce
    attention, mlp = (
        accelerator.overhead / 2 + max(n_bytes / accelerator.bandwidth, n_flops / accelerator.peak)
        for n_bytes, n_flops in sublayers(config, tp_size, batch_size, tokens, context, itemsize)
    )
    # one after an attention is hidden by the MLP, one after an MLP by the next attention, and the last by nothing
    after_attention = sum(syncs for syncs, _ in rule.layers())
    after_mlp = rule.syncs - after_attention - 1
    hidden = after_attention * max(0.0, all_reduce - mlp) + after_mlp * max(0.0, all_reduce - attention)
    return seconds + hidden + all_reduce


def fit(x: Sequence[float], seconds: Sequence[float]) -> tuple[float, float, list[float]]:
    """Least squares of seconds = start + slope * x, such as compute + syncs * all_reduce: (start, slope, residuals)."""
    design = np.stack([np.ones(len(x)), np.asarray(x, float)], axis=1)
    (start, slope), *_ = np.linalg.lstsq(design, np.asarray(seconds, float), rcond=None)
    return float(start), float(slope), [float(s - start - slope * n) for n, s in zip(x, seconds, strict=True)]
