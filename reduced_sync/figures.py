"""The figures that compare.py and bench.py draw."""

import math
from dataclasses import dataclass
from pathlib import Path

from reduced_sync.drop_log import DropLog
from reduced_sync.runs import Arm, by_scale, comparable, differ, reference_of, too_short


def draw_comparison(arms: list[Arm], path: str | Path, tolerance: float) -> None:
    """A figure, a row a size, two panels each: validation loss over steps, and the last one over syncs. Raises OSError.

    Of an architecture at several learning rates only the best is drawn. What is within `tolerance` percent of the
    baseline is shaded.
    """
    from matplotlib.figure import Figure

    groups = [_at_their_best(group) for group in by_scale(arms)]
    figure = Figure(figsize=(12, 4.8 * len(groups)), layout="constrained")
    for group, (curves, points) in zip(groups, figure.subplots(len(groups), 2, squeeze=False), strict=True):
        look = Look(group, reference_of(group, arms))
        _draw_curves(curves, look)
        _draw_points(points, look, tolerance)
    figure.savefig(path, dpi=130)


def _at_their_best(arms):
    """The arms without those that another learning rate beats."""
    best = {}
    for arm in arms:
        rates = ("learning_rate", "min_lr / learning_rate") if arm.finished else ()
        others = {key: value for key, value in arm.settings.items() if key not in rates}
        key = (arm.model, arm.data, arm.changed, str(others))
        if key not in best or arm.losses.get(arm.step, math.inf) < best[key].losses.get(best[key].step, math.inf):
            best[key] = arm
    return list(best.values())


@dataclass
class Look:
    """How the arms of one size are told apart in both panels."""

    group: list
    reference: Arm | None  # the baseline

    def __post_init__(self):
        self.counts = sorted({arm.syncs for arm in self.group if not arm.all_synced})
        self.shards = sorted({arm.n_shard for arm in self.group})

    def style(self, n_shard: int) -> str:
        """The dashes of a line."""
        return ["-", "--", ":", "-."][self.shards.index(n_shard) % 4]

    def marker(self, n_shard: int) -> str:
        """The shape of a point."""
        return "os^D"[self.shards.index(n_shard) % 4]

    def is_control(self, arm: Arm) -> bool:
        """Whether it is a dense model of another depth than the baseline."""
        return arm.all_synced and self.reference is not None and arm.n_layer != self.reference.n_layer

    def colour(self, arm: Arm) -> str | tuple:
        """Black for the baseline, red for a control, the others by their syncs."""
        import matplotlib

        if arm.all_synced:
            return "tab:red" if self.is_control(arm) else "black"
        return matplotlib.colormaps["viridis"](self.counts.index(arm.syncs) / max(1, len(self.counts) - 1) * 0.9)

    def label(self, arm: Arm) -> str:
        """The variant, and what of the rest differs in the group."""
        size = f" {arm.n_layer}x{arm.n_embd}" if differ(self.group, "n_layer", "n_embd") else ""
        rate = f", lr {arm.learning_rate:g}" if differ(self.group, "learning_rate") else ""
        shard = f", n_shard {arm.n_shard}" if len(self.shards) > 1 else ""
        dtype = f", {arm.dtype}" if differ(self.group, "dtype") else ""
        other = "" if self.is_comparable(arm) else ", other windows or data"
        count = "" if arm.is_selective else f", {arm.syncs} syncs"  # its name says it
        return f"{arm.title}{size}{count}{shard}{rate}{dtype}{other}"

    def is_comparable(self, arm: Arm) -> bool:
        """Whether its losses are those of the same tokens as the baseline's."""
        return self.reference is None or comparable(arm, self.reference)


def _draw_curves(axes, look):
    """Validation loss over steps, a line an arm."""
    group = look.group
    for arm in group:
        keys = {"color": look.colour(arm), "label": look.label(arm), "linewidth": 1.6}
        axes.plot(list(arm.losses), list(arm.losses.values()), look.style(arm.n_shard), **keys)
    final = [arm.losses[arm.step] for arm in group if arm.losses and math.isfinite(arm.losses[arm.step])]
    if final and min(final) > 0:  # with the start of the curves what matters would be small
        axes.set_ylim(min(final) * 0.97, min(final) * 1.35)
    axes.set(xlabel="step", ylabel="validation loss (nats per token)", title="Loss curves")
    axes.legend(fontsize=8 if len(group) < 16 else 5, ncols=1 + len(group) // 24)
    axes.grid(alpha=0.3)


def _draw_points(axes, look, tolerance):
    """The last validation loss over syncs, a point an arm."""
    from matplotlib.ticker import NullFormatter

    shown = [arm for arm in look.group if arm.losses and look.is_comparable(arm)]
    ticks = sorted({arm.syncs for arm in shown})
    # joined: evenly spread syncs, fewer from point to point, and nothing else that differs
    family = [arm for arm in shown if " " not in arm.variant and not arm.is_selective and not look.is_control(arm)]
    for n, dtype in sorted({(arm.n_shard, arm.dtype) for arm in family}):
        line = [arm for arm in family if (arm.n_shard, arm.dtype) == (n, dtype)]
        losses = [arm.losses[arm.step] for arm in line]
        axes.plot([arm.syncs for arm in line], losses, look.style(n), color="0.6", linewidth=1, zorder=1)
    for arm in shown:
        loss, edge = arm.losses[arm.step], look.colour(arm)
        face = edge if arm.finished else "none"
        axes.errorbar(arm.syncs, loss, arm.deviation or 0, color=edge, capsize=3, zorder=2)
        axes.scatter(arm.syncs, loss, marker=look.marker(arm.n_shard), s=55, facecolor=face, edgecolor=edge, zorder=3)
        if arm not in family:
            name = f"{arm.pattern if arm.is_selective else ''} {arm.variant.partition(' ')[2]}".strip()
            left = arm.is_selective or arm.syncs == ticks[-1]
            place = {"xytext": (-6, 3), "ha": "right"} if left else {"xytext": (6, 3)}
            text = name or f"{arm.n_layer}x{arm.n_embd}"
            axes.annotate(text, (arm.syncs, loss), textcoords="offset points", fontsize=7, **place)
    for n in sorted({arm.n_shard for arm in shown}):
        axes.scatter([], [], marker=look.marker(n), color="0.4", label=f"n_shard {n}")
    if look.reference is not None and look.reference.losses:
        loss = look.reference.losses[look.reference.step]
        end = loss * (1 + tolerance / 100)
        axes.axhspan(loss, end, color="tab:green", alpha=0.12, label=f"within {tolerance:g}%")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="sync points in a forward pass", ylabel="validation loss (nats per token)")
    title = "Loss against syncs" + ("" if all(arm.finished for arm in look.group) else " (hollow: unfinished)")
    short = too_short([arm for arm in look.group if not look.is_control(arm)] or look.group)
    axes.set_title(f"{title}\n{short}" if short else title)
    if axes.get_legend_handles_labels()[1]:  # some have evaluated
        axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def draw_decoding(table: list[dict], path: str | Path) -> None:
    """A figure of TPOT against sync count at tp_size 2 or more: measured points, fit and bounds. Raises OSError.

    `table` holds the cases that bench.py's decode returns.
    """
    from matplotlib.figure import Figure

    cases = [case for case in table if case["tp_size"] > 1]
    figure = Figure(figsize=(6 * len(cases), 4.5), layout="constrained")
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        counts = [row["syncs"] for row in case["patterns"]]
        for key, style, label in (("tpot_s", "o", "measured"), ("silent_tpot_s", "x", "all-reduces send nothing")):
            axes.plot(counts, [1000 * row[key] for row in case["patterns"]], style, label=label)
        ends = [0, max(counts)]
        if "fit_compute_s" in case:
            fitted = [1000 * (case["fit_compute_s"] + n * case["fit_all_reduce_s"]) for n in ends]
            axes.plot(ends, fitted, "-", color="tab:blue", linewidth=1, label="fit: compute + syncs x all-reduce")
        axes.axhline(1000 * case["bound_s"], color="0.4", linestyle=":", label="memory-bandwidth bound")
        alone = next((c for c in table if c["tp_size"] == 1 and c["batch_size"] == case["batch_size"]), None)
        if alone:
            one = 1000 * alone["patterns"][0]["tpot_s"]
            axes.axhline(one, color="tab:green", linestyle="--", label="one process, all cores")
        title = f"tp_size {case['tp_size']}, batch {case['batch_size']}, prompt {case['prompt']}"
        if case.get("added_delay_s"):
            title += f", all-reduces of {1e6 * case['added_delay_s']:.0f} us at least"
        axes.set(xlabel="sync points in a forward pass", ylabel="time per token (ms)", title=title, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def draw_dropping(logs: dict[str, DropLog], path: str | Path) -> None:
    """A figure of runs of drop_syncs.py, by name: what each block's sync is worth, and perplexity against syncs.

    Perplexity is the geometric mean over the texts of how far it lies above that with all syncs, in percent; a curve a
    run and stage. Raises OSError.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    worth, loss = figure.subplots(1, 2)
    for name, log in logs.items():
        if log.sensitivities:
            blocks, s, _ = zip(*log.sensitivities, strict=True)
            worth.plot(blocks, s, "o-", markersize=4, label=name)
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
    worth.set(
        xlabel="block", ylabel="sensitivity (perplexity)", title="What the sync after a block's attention is worth"
    )
    loss.set_yscale("symlog", linthresh=1)
    loss.set(xlabel="sync points in a forward pass", ylabel="perplexity above that with all syncs (%)")
    loss.set_title("Perplexity against syncs")
    for axes in (worth, loss):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
