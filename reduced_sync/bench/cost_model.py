"""A small cost model of tensor-parallel inference.

One forward pass of B sequences with T new tokens each, behind a context of tokens in the KV cache, on one TP rank:

    n_layer * overhead  +  max(bytes / bandwidth, flops / peak)  +  syncs * (alpha + payload * beta)

bytes: this rank's weights and its part of the cache, read once. flops: two per weight and token, and attention.
payload: B * T * n_embd numbers of the weights' type. alpha and beta of an all-reduce over n ranks are those of a ring,
as in NCCL's own cost model: alpha = base + 2 (n - 1) * step, beta = 2 (n - 1) / n / bus bandwidth. Of a sync that is
hidden, what the sublayer that runs meanwhile leaves: max(0, all-reduce - sublayer). Seconds, bytes, flops throughout.

Communication takes none of the processor's time. So it does not hold on a CPU, where gloo works on the core that should
compute meanwhile: hidden syncs cost more than this says, TPOT is up to a third too low (results/decode-all).
"""

from dataclasses import dataclass

from reduced_sync.hardware import Accelerator, Link
from reduced_sync_model import GPTConfig


@dataclass(frozen=True)
class Forward:
    """A forward pass of a rank. tokens = context is a prefill (TTFT), tokens = 1 a decoded token (TPOT)."""

    tp_size: int
    batch_size: int
    tokens: int  # new ones of each sequence
    context: int  # and with those in the cache before them
    itemsize: int = 4  # bytes of a weight, of a number in the cache, and of one that is sent

    def payload(self, n_embd: int) -> int:
        """Bytes of an all-reduce."""
        return self.itemsize * self.batch_size * self.tokens * n_embd


def sublayers(config: GPTConfig, forward: Forward) -> list[tuple[float, float]]:
    """[(bytes, flops)] of a rank for an attention and for an MLP."""
    c, batch_size, tokens, context = config, forward.batch_size, forward.tokens, forward.context
    width, kv_width = c.n_head * c.head_size, max(c.n_kv_head, c.n_shard) * c.head_size  # each shard has a KV head
    seen = context - (tokens - 1) / 2  # causal: a token sees those before it
    attention, mlp = 2 * c.n_embd * (width + kv_width), (3 if c.mlp == "swiglu" else 2) * c.n_embd * c.n_hidden
    cache, products = 2 * batch_size * context * kv_width, 4 * batch_size * tokens * seen * width
    parts = (attention, cache, products), (mlp, 0, 0)
    return [
        (
            forward.itemsize * (weights + cache) / forward.tp_size,
            (2 * batch_size * tokens * weights + products) / forward.tp_size,
        )
        for weights, cache, products in parts
    ]


def bytes_read(config: GPTConfig, forward: Forward) -> float:
    """Bytes that a rank reads: its parts of blocks and cache, the head whole."""
    block = sum(n_bytes for n_bytes, _ in sublayers(config, forward))
    return config.n_layer * block + forward.itemsize * config.vocab_size * config.n_embd


def flops(config: GPTConfig, forward: Forward) -> float:
    """Floating point operations of a rank; logits only of the last position."""
    block = sum(n_flops for _, n_flops in sublayers(config, forward))
    return config.n_layer * block + 2 * forward.batch_size * config.vocab_size * config.n_embd


def forward_seconds(
    config: GPTConfig, accelerator: Accelerator, link: Link | None, forward: Forward, added_delay: float = 0.0
) -> float:
    """The model at the top of this file.

    link: None where all-reduces send nothing. added_delay: seconds that an all-reduce takes at least.
    """
    compute = flops(config, forward) / accelerator.peak_flops
    memory = bytes_read(config, forward) / accelerator.bandwidth
    seconds = config.n_layer * accelerator.overhead + max(memory, compute)
    if link is None or forward.tp_size == 1:
        return seconds
    all_reduce = max(added_delay, link.all_reduce(forward.payload(config.n_embd), forward.tp_size))
    rule = config.rule
    if not rule.hidden:
        return seconds + rule.syncs * all_reduce
    attention, mlp = (
        accelerator.overhead / 2 + max(n_bytes / accelerator.bandwidth, n_flops / accelerator.peak_flops)
        for n_bytes, n_flops in sublayers(config, forward)
    )
    if rule.method.delays_a_layer:
        hidden = rule.hidden * max(0.0, all_reduce - attention - mlp)
        return seconds + hidden + (rule.syncs - rule.hidden) * all_reduce
    # one after an attention is hidden by the MLP, one after an MLP by the next attention, and the last by nothing
    after_attention = sum(syncs for syncs, _ in rule.syncs_after())
    after_mlp = rule.syncs - after_attention - 1
    hidden = after_attention * max(0.0, all_reduce - mlp) + after_mlp * max(0.0, all_reduce - attention)
    return seconds + hidden + all_reduce
