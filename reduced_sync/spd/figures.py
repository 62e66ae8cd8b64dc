"""The figure that drop_syncs.py draws."""

import math
from pathlib import Path

from reduced_sync.spd.log import DropLog


def draw_dropping(logs: dict[str, DropLog], path: str | Path) -> None:
    """A figure of runs of drop_syncs.py, by name: what each sync is worth, and perplexity against syncs.

    Perplexity is the geometric mean over the texts of how far it lies above that with all syncs, in percent; a curve a
    run and stage. Raises OSError.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    worth, loss = figure.subplots(1, 2)
    for name, log in logs.items():
        for sublayer, measured in (("attention", log.sensitivities), ("MLP", log.mlp_sensitivities)):
            if measured:
                layers, s, _ = zip(*measured, strict=True)
                worth.plot(layers, s, "o-", markersize=4, label=f"{name} {sublayer}".strip())
        dense = log.perplexities[0][3]
        curves = {}
        for stage, syncs, _, perplexities in log.perplexities:
            mean = sum(math.log(value / dense[text]) for text, value in perplexities.items()) / len(dense)
            curves.setdefault(stage, {})[syncs] = 100 * (math.exp(mean) - 1)
        start = curves.pop("dense")
        for stage, points in curves.items():
            points = sorted((points | start).items() if len(points) > 1 else points.items())
            loss.plot(*zip(*points, strict=True), "o-", markersize=4, label=f"{name} {stage}".strip())
    worth.set_yscale("symlog", linthresh=0.1)
    worth.set(xlabel="layer", ylabel="sensitivity (perplexity)", title="What the sync after a sublayer is worth")
    loss.set_yscale("symlog", linthresh=1)
    loss.set(xlabel="sync points in a forward pass", ylabel="perplexity above that with all syncs (%)")
    loss.set_title("Perplexity against syncs")
    for axes in (worth, loss):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
