"""The figure that drop_syncs.py draws."""

import math
from pathlib import Path

from reduced_sync.dropping.log import DropLog


def draw_dropping(log: DropLog, path: str | Path) -> None:
    """A figure of a run of drop_syncs.py: what each sync is worth, and the perplexity after each stage.

    Perplexity is the geometric mean over the texts of how far it lies above that with all syncs. Raises OSError.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    worth, loss = figure.subplots(1, 2)
    for sublayer, measured in log.sensitivities.items():
        layers, s, _ = zip(*measured, strict=True)
        worth.plot(layers, s, "o-", markersize=4)
        worth.set_title(f"What the sync after a layer's {sublayer} is worth")
    worth.set_yscale("symlog", linthresh=0.1)
    worth.set(xlabel="layer", ylabel="sensitivity (perplexity)")
    dense = log.perplexities[0][3]
    for stage, syncs, _, perplexities in log.perplexities:
        mean = sum(math.log(value / dense[text]) for text, value in perplexities.items()) / len(dense)
        loss.bar(f"{stage}\n{syncs} syncs", 100 * (math.exp(mean) - 1), color="C0")
    loss.set(ylabel="perplexity above that with all syncs (%)", title="Perplexity after each stage")
    for axes in (worth, loss):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
