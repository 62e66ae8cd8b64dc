"""The figure that compare.py draws."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from reduced_sync.compare.frontier import conditions_of, on_frontier
from reduced_sync.compare.runs import (
    Arm,
    by_size_class,
    comparable,
    differ,
    group_baseline,
    is_control,
    means_by_rate,
    too_short_note,
)


def draw_comparison(arms: list[Arm], path: str | Path, tolerance: float) -> None:
    """A figure, a row a size: validation loss over steps, the last one over syncs, and over each condition's times.

    Where learning rates were tuned, there is a panel of the loss over them. What is within `tolerance` percent of the
    baseline is shaded. Raises OSError.
    """
    from matplotlib.figure import Figure

    groups, conditions = by_size_class(arms), conditions_of(arms)
    tuned = any(len(arm.arms_by_rate) > 1 for arm in arms)
    n_panels = 2 + tuned + len(conditions)
    figure = Figure(figsize=(6 * n_panels, 4.8 * len(groups)), layout="constrained")
    labels = []
    for group, panels in zip(groups, figure.subplots(len(groups), n_panels, squeeze=False), strict=True):
        style = Style(group, group_baseline(group, arms))
        _draw_curves(panels[0], style)
        labels.append((panels[1], _draw_points(panels[1], style, tolerance)))
        if tuned:
            _draw_rates(panels[2], style)
        for axes, condition in zip(panels[2 + tuned :], conditions, strict=True):
            labels.append((axes, _draw_times(axes, style, condition, tolerance)))
    figure.draw_without_rendering()  # now the panels have their final sizes
    for axes, points in labels:
        _label_points(axes, points)
    figure.savefig(path, dpi=130)


@dataclass
class Style:
    """How the arms of one size are told apart in all panels."""

    group: list
    baseline: Arm | None  # the baseline

    def __post_init__(self):
        self.counts = sorted({arm.syncs for arm in self.group if not arm.is_standard_tp})
        self.shards = sorted({arm.n_shard for arm in self.group})

    def dashes(self, n_shard: int) -> str:
        """The dashes of a line."""
        return ["-", "--", ":", "-."][self.shards.index(n_shard) % 4]

    def marker(self, n_shard: int) -> str:
        """The shape of a point."""
        return "os^D"[self.shards.index(n_shard) % 4]

    def color(self, arm: Arm) -> str | tuple:
        """Black for the baseline, red for a control, the others by their syncs."""
        import matplotlib

        if arm.is_standard_tp:
            return "tab:red" if is_control(arm, self.baseline) else "black"
        return matplotlib.colormaps["viridis"](self.counts.index(arm.syncs) / max(1, len(self.counts) - 1) * 0.9)

    def legend_label(self, arm: Arm) -> str:
        """The sync rule, and what of the rest differs in the group."""
        size = f" {arm.size}" if differ(self.group, "size") else ""
        rate = f", lr {arm.learning_rate:g}" if differ(self.group, "learning_rate") else ""
        shard = f", n_shard {arm.n_shard}" if len(self.shards) > 1 else ""
        dtype = f", {arm.dtype}" if differ(self.group, "dtype") else ""
        other = "" if self.is_comparable(arm) else ", other windows or data"
        return f"{arm.sync}{size}, {arm.syncs} syncs{shard}{rate}{dtype}{other}"

    def point_label(self, arm: Arm) -> str:
        """A short label at a point whose color and shape tell the rest."""
        dtype = "" if self.baseline is None or arm.dtype == self.baseline.dtype else f" {arm.dtype}"
        return (arm.size if is_control(arm, self.baseline) else arm.sync) + dtype

    def legend_group(self, arm: Arm) -> str:
        """What its color says."""
        if is_control(arm, self.baseline):
            return "control"
        return "baseline" if arm.is_standard_tp else f"{arm.syncs} syncs"

    def is_comparable(self, arm: Arm) -> bool:
        """Whether its losses are those of the same tokens as the baseline's."""
        return self.baseline is None or comparable(arm, self.baseline)


def _draw_curves(axes, style):
    """Validation loss over steps, a line an arm. Of many the legend names the colors and dashes alone."""
    group = style.group
    for arm in group:
        keys = {"color": style.color(arm), "label": style.legend_label(arm) if len(group) <= 12 else None}
        axes.plot(list(arm.losses), list(arm.losses.values()), style.dashes(arm.n_shard), linewidth=1.6, **keys)
    if len(group) > 12:
        for kind, color in {style.legend_group(arm): style.color(arm) for arm in group}.items():
            axes.plot([], [], color=color, label=kind)
        for n in style.shards:
            axes.plot([], [], style.dashes(n), color="0.4", label=f"n_shard {n}")
    final = [arm.losses[arm.step] for arm in group if arm.losses and math.isfinite(arm.losses[arm.step])]
    if final and min(final) > 0:  # with the start of the curves what matters would be small
        axes.set_ylim(min(final) * 0.97, min(final) * 1.35)
    axes.set(
        xlabel="step",
        ylabel="validation loss (nats per token)",
        title=f"Loss curves{f', {style.baseline.size}' if style.baseline else ''}",
    )
    axes.legend(fontsize=8, loc="upper right")
    axes.grid(alpha=0.3)


def _draw_points(axes, style, tolerance):
    """The last validation loss over syncs, a point an arm. Returns them, with the labels that some need."""
    from matplotlib.ticker import NullFormatter

    shown = [arm for arm in style.group if arm.losses and style.is_comparable(arm)]
    ticks = sorted({arm.syncs for arm in shown})
    # joined: evenly spread syncs, fewer from point to point, and nothing else that differs
    family = [
        arm
        for arm in shown
        if re.fullmatch(r"baseline|spd|grouped-\d+", arm.sync) and not is_control(arm, style.baseline)
    ]
    for n, dtype in sorted({(arm.n_shard, arm.dtype) for arm in family}):
        line = [arm for arm in family if (arm.n_shard, arm.dtype) == (n, dtype)]
        losses = [arm.losses[arm.step] for arm in line]
        axes.plot([arm.syncs for arm in line], losses, style.dashes(n), color="0.6", linewidth=1, zorder=1)
    for arm in shown:
        _draw_point(axes, style, arm, arm.syncs, style.color(arm))
    _draw_key(axes, style, shown, tolerance)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="sync points in a forward pass", ylabel="validation loss (nats per token)")
    title = "Loss against syncs" + ("" if all(arm.finished for arm in style.group) else " (hollow: unfinished)")
    short = too_short_note(style.group, style.baseline)
    axes.set_title(f"{title}\n{short}" if short else title)
    # of the family the place says it
    labels = ["" if arm in family else style.point_label(arm) for arm in shown]
    return [(arm.syncs, arm.losses[arm.step], label, "black") for arm, label in zip(shown, labels, strict=True)]


def _draw_rates(axes, style):
    """The last validation loss over learning rates, a line an arm, a star at its best; hollow if not bracketed."""
    for arm in style.group:
        ends = means_by_rate({rate.learning_rate: rate.last_losses for rate in arm.arms_by_rate if rate.finished})
        keys = {"color": style.color(arm), "label": style.legend_label(arm) if len(style.group) <= 12 else None}
        axes.plot(list(ends), list(ends.values()), style.dashes(arm.n_shard), marker=".", linewidth=1.2, **keys)
        if arm.learning_rate in ends:
            face = keys["color"] if arm.bracketed else "white"
            place = (arm.learning_rate, ends[arm.learning_rate])
            axes.scatter(*place, marker="*", s=110, facecolor=face, edgecolor=keys["color"], zorder=3)
    axes.set_xscale("log", base=2)
    rates = sorted({rate.learning_rate for arm in style.group for rate in arm.arms_by_rate})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize=8)
    axes.set(xlabel="learning rate", ylabel="validation loss (nats per token)")
    axes.set_title("Loss against learning rate (hollow: not bracketed)")
    axes.grid(alpha=0.3)


def _draw_times(axes, style, condition, tolerance):
    """The last validation loss over the time per token, a point an arm, the frontier drawn. Returns their labels."""
    shown = [arm for arm in style.group if arm.losses and style.is_comparable(arm) and condition in arm.tpots]
    best = [arm for arm in shown if on_frontier(arm, style.group, condition)]
    best.sort(key=lambda arm: arm.tpots[condition])
    times, losses = [1000 * arm.tpots[condition] for arm in best], [arm.losses[arm.step] for arm in best]
    axes.step(times, losses, where="post", color="tab:blue", linewidth=1, zorder=1, label="frontier")
    labels = []
    for arm in sorted(shown, key=lambda arm: arm in best):  # the frontier's above the others
        time, is_best = 1000 * arm.tpots[condition], arm in best
        _draw_point(axes, style, arm, time, style.color(arm) if is_best else "0.7")
        labels.append((time, arm.losses[arm.step], style.point_label(arm), "black" if is_best else "0.5"))
    _draw_key(axes, style, shown, tolerance)
    axes.set(xlabel="time per token (ms)", ylabel="validation loss (nats per token)")
    axes.set_title(f"Loss against time (grey: dominated)\n{condition}")
    return labels


def _draw_point(axes, style, arm, x, color):
    """The arm's last loss at x, with its standard deviation over seeds; hollow where it has not finished."""
    loss, face = arm.losses[arm.step], color if arm.finished else "none"
    axes.errorbar(x, loss, arm.deviation or 0, color=color, capsize=3, zorder=2)
    axes.scatter(x, loss, marker=style.marker(arm.n_shard), s=55, facecolor=face, edgecolor=color, zorder=3)


def _draw_key(axes, style, shown, tolerance):
    """The shaded tolerance, and the legend of the points' shapes."""
    for n in sorted({arm.n_shard for arm in shown}):
        axes.scatter([], [], marker=style.marker(n), color="0.4", label=f"n_shard {n}")
    if style.baseline is not None and style.baseline.losses:
        loss = style.baseline.losses[style.baseline.step]
        end = loss * math.exp(tolerance / 100)
        axes.axhspan(loss, end, color="tab:green", alpha=0.12, label=f"within {tolerance:g}%")
    if axes.get_legend_handles_labels()[1]:  # some have evaluated
        axes.legend(fontsize=8, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.12))  # below, off the points
    axes.grid(alpha=0.3)


def _label_points(axes, points):
    """Write the text of each of `points`, (x, y, text, color), beside it, where it covers no point or other text."""
    from adjustText import adjust_text

    texts = [axes.text(x, y, text, fontsize=7, color=color) for x, y, text, color in points if text]
    if texts:
        x, y, *_ = zip(*points, strict=True)
        room = dict(expand=(1.4, 2.2), force_static=(0.3, 0.5))  # beside the middle of a point: it has a size
        line = dict(arrowstyle="-", color="0.5", linewidth=0.4)
        adjust_text(texts, x, y, ax=axes, iter_lim=300, min_arrow_len=8, arrowprops=line, **room)
