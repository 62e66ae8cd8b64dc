"""SPD on trained models (arXiv 2502.20727): what dropping syncs costs, and the losses by which a model is repaired.

`batches` are token ids (B, T) on this rank's device, the share of its data-parallel replica. All ranks have to call
what takes them.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reduced_sync import distributed
from reduced_sync.distributed import Layout
from reduced_sync_model import GPT


def head_nats(model: GPT, x: Tensor, idx: Tensor) -> float:
    """The summed loss in nats of x (B, T, C) behind the last layer, of the tokens idx (B, T) but the first of each."""
    logits = model.lm_head(model.transformer.ln_f(x[:, :-1])).float()
    return F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten(), reduction="sum").item()


@torch.no_grad()
def mean_loss(model: GPT, batches: Iterable[Tensor], layout: Layout) -> float:
    """Mean loss in nats of all tokens but the first of each window."""
    total = count = 0.0
    for idx in batches:
        with layout.autocast():
            total += head_nats(model, model.hidden_states(idx), idx)
        count += idx[:, 1:].numel()
    total, count = distributed.sum_over_world([total, count], layout.device)
    return total / count


@torch.no_grad()
def sensitivities(
    model: GPT, dropped: str, batches: Iterable[Tensor], layout: Layout
) -> tuple[list[float], list[float]]:
    """(s, perplexities): the paper's algorithm 1 for the first n layers of a model, which all have a sync to drop.

    The pattern `dropped` is the model's with those syncs dropped: all 1 for all 2, or 0...01 for all 1. perplexities[i]
    is that with the layers from i on dropped, perplexities[n] the model's own, and s[i] the difference of i and i + 1.
    What the layers before i compute is computed once, for all i.
    """
    L, after = model.config.n_layer, model.with_sync(dropped)
    n = sum(old != new for old, new in zip(model.config.rule.pattern, dropped, strict=True))
    total, count = [0.0] * (n + 1), 0
    for idx in batches:
        with layout.autocast():
            before = [model.embed(idx)]
            for i in range(n):
                before.append(model.run_blocks(before[-1], range(i, i + 1)))
            for i in range(n + 1):
                total[i] += head_nats(model, after.run_blocks(before[i], range(i, L)), idx)
        count += idx[:, 1:].numel()
    *total, count = distributed.sum_over_world([*total, count], layout.device)
    perplexities = [math.exp(min(nats / count, 700.0)) for nats in total]
    return [perplexities[i] - perplexities[i + 1] for i in range(n)], perplexities


def changed_groups(pattern: str) -> list[range]:
    """The groups of layers that compute something else than with all syncs.

    A group ends with the next sync between layers: in SPD it is one layer, after characters 0 and a it is several.
    """
    ends = [i + 1 for i, character in enumerate(pattern) if character in "12"]
    groups = [range(first, end) for first, end in zip([0, *ends], ends, strict=False)]
    return [layers for layers in groups if set(pattern[layers.start : layers.stop]) != {"2"}]


def part_of(model: GPT, layers: range) -> nn.Module:
    """Those layers as a module, their parameters called as in the model."""
    blocks = nn.ModuleDict({str(i): model.transformer.h[i] for i in layers})
    return nn.ModuleDict({"transformer": nn.ModuleDict({"h": blocks})})


def relative_error(x: Tensor, exact: Tensor) -> Tensor:
    """Mean over positions of |x - exact|^2 / |exact|^2, so that the few huge ones do not hide the others."""
    return ((x - exact).square().sum(-1) / exact.square().sum(-1)).mean()


def group_errors(model: GPT, teacher: GPT, idx: Tensor, layout: Layout) -> Iterator[Tensor]:
    """Yield the relative error of each changed group of the model on what the teacher's layers before it compute.

    The teacher has all syncs. Each error's backward ends at its own group; done before the next one is asked for, it
    needs the memory of one group.
    """
    first = 0
    with torch.no_grad():
        x = teacher.embed(idx)
    for layers in changed_groups(model.config.rule.pattern):
        with torch.no_grad(), layout.autocast():
            x = teacher.run_blocks(x, range(first, layers.start))
            exact = teacher.run_blocks(x, layers)
        with layout.autocast():
            output = model.run_blocks(x, layers)
        yield relative_error(output, exact)
        x, first = exact, layers.stop


def log_probs(model: GPT, idx: Tensor, layout: Layout) -> Tensor:
    """The model's next-token distributions for idx (B, T): log-probabilities (B*T, vocab_size) in float32."""
    with layout.autocast():
        logits = model.lm_head(model.transformer.ln_f(model.hidden_states(idx)))
    return F.log_softmax(logits.float().flatten(0, 1), dim=-1)


def divergence(model: GPT, idx: Tensor, expected: Tensor, layout: Layout) -> Tensor:
    """The mean over tokens of KL(expected || model) in nats, on idx (B, T); expected: as log_probs gives them."""
    return F.kl_div(log_probs(model, idx, layout), expected, reduction="batchmean", log_target=True)


def divergences(compile: bool) -> Callable:
    """The function from (model, teacher, idx, layout) to an iterator over one loss, KL(teacher || model)."""
    expect, diverge = map(torch.compile, (log_probs, divergence)) if compile else (log_probs, divergence)

    def losses(model, teacher, idx, layout):
        with torch.no_grad():
            expected = expect(teacher, idx, layout)
        yield diverge(model, idx, expected, layout)

    return losses
