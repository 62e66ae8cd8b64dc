"""A small cost model of tensor-parallel inference, and public figures of links to feed it.

One forward pass of B sequences with T new tokens each, behind a context of tokens in the KV cache, on one TP rank:

    n_layer * overhead  +  max(bytes / bandwidth, flops / peak)  +  syncs * (alpha + payload * beta)

bytes: this rank's weights and its part of the cache, read once. flops: two a weight and token, and attention. payload:
B * T * n_embd float32 numbers. alpha and beta of an all-reduce over n ranks are those of a ring, as in NCCL's own cost
model: alpha = base + 2 (n - 1) * step, beta = 2 (n - 1) / n / bus bandwidth. Seconds, bytes and flops throughout.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reduced_sync.accelerators import Accelerator


@dataclass
class Shape:
    """A GPT's sizes; `itemsize` is the bytes of a weight and of a number in the cache."""

    n_layer: int
    n_embd: int
    vocab_size: int
    itemsize: int = 4


@dataclass
class Link:
    """All-reduce over a link: seconds `base` and `step`, and the bus bandwidth in bytes/s."""

    base: float
    step: float
    bandwidth: float
    source: str = ""

    def all_reduce(self, payload: float, n: int) -> float:
        """Seconds of one all-reduce of `payload` bytes over n ranks; 0 for one rank."""
        return self.base + 2 * (n - 1) * (self.step + payload / n / self.bandwidth) if n > 1 else 0.0


# From public threads, as read there; their ranges are wide, and other drivers, sizes and software give other figures.
LINKS = {
    "nvlink": Link(
        6.6e-6, 0.6e-6, 180e9, "H100 NVLink, NCCL: tuner constants (LL ring); 8 ranks, 2 KiB-1 MiB: sglang#22734"
    ),
    "nvlink-oneshot": Link(3.3e-6, 0.19e-6, 65e9, "H100 NVLink, custom one-shot kernel, 2, 4, 8 ranks: sglang#2904"),
    "no-p2p": Link(38.5e-6, 0.3e-6, 1.9e9, "through host memory, NCCL: sglang#39605 (2 ranks), nccl#1530 (8)"),
    "pcie": Link(0.2e-6, 3.2e-6, 12.8e9, "PCIe Gen4 peer to peer, NCCL: sglang-V100#2 (4 ranks), vllm#50576 (8)"),
    "infiniband": Link(18e-6, 1.0e-6, 343e9, "2 nodes, HDR or NDR, NCCL: nccl-tests#150 (2 ranks), nccl#1244 (16)"),
    "10gbe": Link(0.0, 40e-6, 1.25e9, "TCP: half of an 80 us round trip (grpc#7988) a ring step, line rate; inferred"),
}


def bytes_read(shape: Shape, tp_size: int, batch_size: int, context: int) -> float:
    """Bytes that a rank reads to decode one token of each sequence: blocks and cache in parts, the head whole."""
    block = 12 * shape.n_embd**2 / tp_size
    cache = 2 * batch_size * context * shape.n_embd / tp_size
    return shape.itemsize * (shape.n_layer * (block + cache) + shape.vocab_size * shape.n_embd)


def flops(shape: Shape, tp_size: int, batch_size: int, tokens: int, context: int) -> float:
    """Floating point operations of a rank; logits only of the last position. `context` includes the new tokens."""
    block = 24 * shape.n_embd**2 * tokens  # 2 * 12 C^2 a token
    attention = 4 * shape.n_embd * tokens * (context - (tokens - 1) / 2)  # causal: a token sees those before it
    return batch_size * (shape.n_layer * (block + attention) / tp_size + 2 * shape.vocab_size * shape.n_embd)


def forward_seconds(
    shape: Shape,
    accelerator: Accelerator,
    link: Link | None,
    tp_size: int,
    syncs: int,
    batch_size: int,
    tokens: int,
    context: int,
) -> float:
    """The model at the top of this file. tokens = context is a prefill (TTFT), tokens = 1 a decoded token (TPOT)."""
    compute = flops(shape, tp_size, batch_size, tokens, context) / accelerator.peak
    memory = bytes_read(shape, tp_size, batch_size, context) / accelerator.bandwidth
    payload = 4 * batch_size * tokens * shape.n_embd
    communication = syncs * link.all_reduce(payload, tp_size) if link is not None else 0.0
    return shape.n_layer * accelerator.overhead + max(memory, compute) + communication


def fit(x: Sequence[float], seconds: Sequence[float]) -> tuple[float, float, list[float]]:
    """Least squares of seconds = start + slope * x, such as compute + syncs * all_reduce: (start, slope, residuals)."""
    design = np.stack([np.ones(len(x)), np.asarray(x, float)], axis=1)
    (start, slope), *_ = np.linalg.lstsq(design, np.asarray(seconds, float), rcond=None)
    return float(start), float(slope), [float(s - start - slope * n) for n, s in zip(x, seconds, strict=True)]
