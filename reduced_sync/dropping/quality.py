"""How near a model with dropped syncs comes to its teacher, the one with all of them: distributions and greedy text.

`batches` are as in distillation.py.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from reduced_sync import distributed
from reduced_sync.decoding import generate, sample_tokens
from reduced_sync.distributed import Layout
from reduced_sync.dropping.distillation import log_probs
from reduced_sync_model import GPT

CONTINUED = 64  # tokens of a continuation


@torch.no_grad()
def agreement(model: GPT, teacher: GPT, batches: Iterable[Tensor], layout: Layout) -> tuple[float, float]:
    """(KL(teacher || model) per token in nats, the share of tokens for which both think the same one likeliest)."""
    divergence = same = count = 0.0
    for idx in batches:
        expected, found = log_probs(teacher, idx, layout), log_probs(model, idx, layout)
        divergence += F.kl_div(found, expected, reduction="sum", log_target=True).item()
        same += (found.argmax(-1) == expected.argmax(-1)).sum().item()
        count += idx.numel()
    divergence, same, count = distributed.sum_over_world([divergence, same, count], layout.device)
    return divergence / count, same / count


def prompts_of(windows: Tensor, n: int = 8) -> Tensor:
    """The first halves of n of the windows (N, T), spread over them."""
    return windows[:: max(1, len(windows) // n)][:n, : max(1, windows.size(1) // 2)]


def agreed_length(model: GPT, teacher: GPT, batches: Iterable[Tensor], layout: Layout) -> float:
    """How many of CONTINUED tokens both say alike before they part, greedily continuing prompts: the mean."""
    total = count = 0.0
    for idx in batches:
        texts = []
        for one in (teacher, model):
            greedy = generate(one, idx, CONTINUED, lambda logits: sample_tokens(logits, temperature=0), layout.autocast)
            texts.append(torch.stack(list(greedy), dim=1))  # (B, CONTINUED)
        total += (texts[0] == texts[1]).long().cumprod(1).sum().item()
        count += len(idx)
    total, count = distributed.sum_over_world([total, count], layout.device)
    return total / count
