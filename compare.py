"""Compare runs: a table, the fewest syncs that still learn as well, and a figure, from their log.txt files.

$ python compare.py out-*
$ python compare.py out-* --tolerance=1 --png=figure.png --csv=table.csv

Runs that differ in their seed alone are one line: the mean of their losses, and its standard deviation. A gap is to the
baseline, standard TP of the same size (parameters within 2 %) and, where there is one, of the same float type and
n_shard; among several learning rates the one with the lowest loss; a shallower dense model is no baseline but a
control. +- is half of the gap's 95 % confidence interval, by Student's t and the standard deviation pooled over all
lines with several seeds, so that it also says something where there is one.

Works while the runs go on: an unfinished run is marked, its gap taken at the last step that the baseline has too.
"""

import argparse
import csv
import math
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from commands import check_figure, one_line, set_up
from reduced_sync_model import count_syncs
from run_log import read_log

# where runs differ in one of these, their losses are not those of the same experiment
SAME = ("dataset", "block_size", "tokens a step", "max_iters", "learning_rate", "dtype")
# what does not change what a run learns, and the seed
OTHER = """seed out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint checkpoint_interval
checkpoint_minutes init_from wandb_log wandb_project wandb_run_name tp_size backend device compile timeout_s
max_bad_steps""".split()


@dataclass
class Arm:
    """Runs that differ in their seed alone: the header's facts, and evaluations as {seed: {step: validation loss}}."""

    names: list
    variant: str
    pattern: str
    hidden: int  # syncs in flight while the next sublayer runs
    n_shard: int
    n_layer: int
    n_embd: int
    n_params: int
    max_iters: int
    tokens: int  # of the whole run
    same: dict
    setting: str
    seeds: dict
    scale: int = 0  # the how-maniest size, where there are several

    @property
    def learning_rate(self):
        return self.same["learning_rate"]

    @property
    def dtype(self):
        return self.same["dtype"]

    @property
    def syncs(self):
        return count_syncs(self.pattern)

    @property
    def reduction(self):
        """Percent fewer syncs than standard TP with as many layers."""
        return 100 * (1 - self.syncs / (2 * len(self.pattern)))

    @property
    def counted(self):
        """The losses of the finished seeds, or of all where none has finished."""
        return [losses for losses in self.seeds.values() if self.max_iters in losses] or list(self.seeds.values())

    @property
    def losses(self):
        """The mean over the seeds that count, at the steps that all of them have evaluated."""
        steps = set.intersection(*map(set, self.counted))
        return {step: statistics.fmean(losses[step] for losses in self.counted) for step in sorted(steps)}

    @property
    def step(self):
        return max(self.losses, default=0)

    @property
    def finished(self):
        return self.max_iters in self.losses

    @property
    def deviation(self):
        """Standard deviation over seeds of the last loss; None for one seed."""
        last = [losses[self.step] for losses in self.counted] if self.losses else []
        return statistics.stdev(last) if len(last) > 1 else None

    @property
    def all_synced(self):
        return set(self.pattern) == {"2"} and not self.hidden


@dataclass
class Gap:
    """How far an arm's loss is above the baseline's, in percent, at the last step that both have evaluated."""

    percent: float
    step: int
    final: bool  # both have finished
    margin: float | None  # half of the 95 % confidence interval; None where no noise is known


def load_runs(paths):
    """The runs in `paths`, folders with a log.txt or logs, as Arms: by size, n_shard and most syncs first.

    Raises ValueError with one clear line.
    """
    arms = []
    for path in map(Path, paths):
        log_path = path / "log.txt" if path.is_dir() else path
        try:
            log = read_log(log_path)
            config, pattern = log.header["config"], log.header["sync_pattern"]
            config["dtype"] = log.header.get("dtype")  # what it came to where the config left it open
            arm = Arm(
                names=[path.name if path.is_dir() else path.parent.name],
                variant=_variant(config, pattern),
                pattern=pattern,
                hidden=int(log.header.get("hidden syncs", 0)),
                n_shard=config["n_shard"],
                n_layer=config["n_layer"],
                n_embd=config["n_embd"],
                n_params=int(log.header["parameters"].split("(")[1].rstrip(")")),
                max_iters=config["max_iters"],
                tokens=int(log.header["tokens a step"]) * config["max_iters"],
                same={key: config.get(key, log.header.get(key)) for key in SAME},
                setting=str(sorted((key, value) for key, value in config.items() if key not in OTHER)),
                seeds={config["seed"]: {step: loss for step, _, loss in log.evaluations}},
            )
        except OSError as error:
            raise ValueError(f"{log_path}: {error.strerror}; name folders that hold a log.txt") from None
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            raise ValueError(f"{log_path}: its header is not that of a run: {error}") from None
        for other in arms:
            if other.setting == arm.setting and not set(other.seeds) & set(arm.seeds):
                other.names += arm.names
                other.seeds |= arm.seeds
                break
        else:
            arms.append(arm)
    smallest = scale = 0
    for arm in sorted(arms, key=lambda arm: arm.n_params):
        if arm.n_params > 1.04 * smallest:  # shards' norms and controls: within 2 % of the middle
            smallest, scale = arm.n_params, scale + 1
        arm.scale = scale
    return sorted(arms, key=lambda arm: (arm.scale, arm.n_shard, -arm.syncs, arm.names))


def _variant(config, pattern):
    """A short name: SPD, Grouped-4 (4 syncs), with what differs from the usual block behind it."""
    architecture = config["architecture"]
    name = {"baseline": "Baseline", "spd": "SPD"}.get(
        architecture, f"{architecture.capitalize()}-{count_syncs(pattern)}"
    )
    extra = [config.get("overlap", ""), config.get("merge", "sum").removeprefix("sum")]
    extra.append("parallel" if config.get("parallel_block") else "")
    return " ".join([name, *filter(None, extra)])


def baseline_of(arm, arms):
    """The baseline to compare `arm` with, or None if there is none or more than one that it could be."""
    synced = [other for other in arms if other.all_synced]
    deepest = {scale: max(a.n_layer for a in synced if a.scale == scale) for scale in {a.scale for a in synced}}
    baselines = [other for other in synced if other.n_layer == deepest[other.scale]]
    for name in ("scale", "dtype", "n_shard"):
        baselines = [other for other in baselines if getattr(other, name) == getattr(arm, name)] or baselines
    rates = {other.learning_rate for other in baselines}
    if len(rates) == len(baselines) > 1:
        baselines = [min(baselines, key=lambda other: (not other.finished, other.losses.get(other.step, math.inf)))]
    return baselines[0] if len(baselines) == 1 else None


def noise(arms):
    """(standard deviation of a run's last loss over seeds in percent of it, degrees of freedom), pooled."""
    several = [arm for arm in arms if arm.finished and arm.deviation is not None]
    freedom = sum(len(arm.counted) - 1 for arm in several)
    squares = sum((len(arm.counted) - 1) * (arm.deviation / arm.losses[arm.step]) ** 2 for arm in several)
    return (100 * math.sqrt(squares / freedom) if freedom else None), freedom


def gap(arm, arms):
    """The arm's Gap to its baseline, or None where there is nothing to compare."""
    reference = baseline_of(arm, arms)
    common = set(arm.losses) & set(reference.losses) if reference is not None else set()
    if not common:
        return None
    step, margin = max(common), None
    percent = 100 * (arm.losses[step] / reference.losses[step] - 1)
    deviation, freedom = noise([other for other in arms if other.scale == arm.scale])
    if deviation is not None and reference is not arm:
        from scipy.stats import t

        margin = t.ppf(0.975, freedom) * deviation * math.sqrt(1 / len(arm.counted) + 1 / len(reference.counted))
    return Gap(percent, step, arm.finished and reference.finished, margin)


def table(arms):
    """The comparison as text, a line an arm. Columns that only some comparisons need are left out of the others."""
    several = max((len(arm.seeds) for arm in arms), default=1) > 1
    columns = {  # heading: (aligned to the left, shown, cell of an arm and its gap)
        "run": (True, True, lambda a, g: a.names[0] + (f" and {len(a.names) - 1} more" if len(a.names) > 1 else "")),
        "variant": (True, True, lambda a, g: a.variant),
        "size": (False, _differ(arms, "n_layer", "n_embd"), lambda a, g: f"{a.n_layer}x{a.n_embd}"),
        "n_shard": (False, True, lambda a, g: str(a.n_shard)),
        "pattern": (True, True, lambda a, g: a.pattern),
        "syncs": (False, True, lambda a, g: str(a.syncs)),
        "hidden": (False, any(arm.hidden for arm in arms), lambda a, g: str(a.hidden)),
        "fewer": (False, True, lambda a, g: f"{a.reduction:.1f}%"),
        "parameters": (False, True, lambda a, g: f"{a.n_params / 1e6:.2f}M"),
        "tok/param": (False, True, lambda a, g: f"{a.tokens / a.n_params:.2g}"),
        "lr": (False, _differ(arms, "learning_rate"), lambda a, g: f"{a.learning_rate:g}"),
        "dtype": (True, _differ(arms, "dtype"), lambda a, g: a.dtype),
        "seeds": (False, several, _seeds_cell),
        "val loss": (False, True, lambda a, g: f"{a.losses[a.step]:.4f}" if a.losses else "-"),
        "sd": (False, several, lambda a, g: f"{a.deviation:.4f}" if a.deviation is not None else ""),
        "gap": (False, True, _gap_cell),
        "+-": (False, several, lambda a, g: f"{g.margin:.2f}%" if g and g.margin is not None else ""),
        "step": (False, True, lambda a, g: f"{a.step}" + ("" if a.finished else f" of {a.max_iters}*")),
    }
    columns = {heading: (left, cell) for heading, (left, shown, cell) in columns.items() if shown}
    gaps = [gap(arm, arms) for arm in arms]
    rows = [list(columns)]
    rows += [[cell(arm, g) for _, cell in columns.values()] for arm, g in zip(arms, gaps, strict=True)]
    lines = [""] * len(rows)
    for (left, _), cells in zip(columns.values(), zip(*rows, strict=True), strict=True):
        width = max(map(len, cells))
        padded = [cell.ljust(width) if left else cell.rjust(width) for cell in cells]
        lines = [f"{line}  {cell}" if line else cell for line, cell in zip(lines, padded, strict=True)]
    lines = [line.rstrip() for line in lines]
    if not all(arm.finished for arm in arms):
        lines.append("* unfinished: its gap is provisional")
    return "\n".join(lines)


def _differ(arms, *names):
    return len({tuple(getattr(arm, name) for name in names) for arm in arms}) > 1


def _seeds_cell(arm, difference):
    count, started = len(arm.counted), len(arm.seeds)
    return f"{count}" if count == started else f"{count} of {started}"


def _gap_cell(arm, difference):
    if difference is None:
        return "-"
    return f"{difference.percent:+.2f}%" + ("" if difference.final else f" at {difference.step}*")


def warnings(arms):
    """A line for each setting in which runs of one size differ though a comparison needs it to be the same."""
    lines = []
    for group in _by_scale(arms):
        for key in SAME:
            values = {str(arm.same[key]) for arm in group}
            if len(values) > 1:
                lines.append(f"warning: the runs differ in {key}: {', '.join(sorted(values))}")
        if len({tuple(sorted(arm.seeds)) for arm in group if len(arm.seeds) == 1}) > 1:
            lines.append("warning: single runs differ in seed")
    references = [(arm, baseline_of(arm, arms)) for arm in arms]
    if any(reference is not None and reference.scale != arm.scale for arm, reference in references):
        lines.append("warning: some runs have no baseline of their own size: they are compared with another's")
    return lines


def _by_scale(arms):
    return [[arm for arm in arms if arm.scale == scale] for scale in sorted({arm.scale for arm in arms})]


def verdict(arms, tolerance):
    """For each size and n_shard a line: the fewest syncs within `tolerance` percent of the baseline, or why not."""
    lines = []
    for scale, n_shard in sorted({(arm.scale, arm.n_shard) for arm in arms}):
        group = [arm for arm in arms if (arm.scale, arm.n_shard) == (scale, n_shard)]
        reference = baseline_of(group[0], arms)
        size = f"{reference.n_layer}x{reference.n_embd}, " if reference is not None and len(_by_scale(arms)) > 1 else ""
        start = f"{size}n_shard {n_shard}: "
        variants = [arm for arm in group if not arm.all_synced and arm.finished]
        if reference is not None and all(arm.all_synced and arm.n_layer < reference.n_layer for arm in group):
            continue  # controls only
        if reference is None:
            count = sum(arm.all_synced for arm in arms)
            lines.append(
                start + f"can't say: {count or 'no'} baseline{'s' if count else ''} among the runs, one is needed"
            )
        elif not reference.finished:
            lines.append(start + f"can't say yet: the baseline {reference.names[0]} has not finished")
        elif not variants:
            lines.append(start + "can't say: no variant has finished")
        else:
            good = [arm for arm in variants if gap(arm, arms).percent <= tolerance]  # nan is not <=
            unfinished = sum(not arm.finished for arm in group)
            note = f" ({unfinished} unfinished not counted)" if unfinished else ""
            if not good:
                lines.append(start + f"no variant is within {tolerance:g}% of the baseline{note}")
            else:
                best = min(good, key=lambda arm: (arm.syncs - arm.hidden, arm.losses[arm.step]))
                count = f"{best.syncs - best.hidden} and {best.hidden} hidden" if best.hidden else best.syncs
                lines.append(
                    start + f"the fewest syncs within {tolerance:g}% of the baseline: {count} ({best.variant}, "
                    f"{gap(best, arms).percent:+.2f}%, {best.reduction:.1f}% fewer syncs){note}"
                )
    return "\n".join(lines)


def write_csv(arms, path):
    """One row an arm, numbers in full. Raises OSError."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        head = "run variant n_layer n_embd n_shard sync_pattern syncs hidden_syncs reduction_percent parameters tokens "
        head += "learning_rate dtype seeds step max_iters val_loss val_loss_sd gap_percent gap_margin gap_step"
        writer.writerow(head.split())
        for arm in arms:
            difference, a = gap(arm, arms), arm
            end = (difference.percent, difference.margin, difference.step) if difference else ("", "", "")
            start = (a.names[0], a.variant, a.n_layer, a.n_embd, a.n_shard, a.pattern, a.syncs, a.hidden, a.reduction)
            middle = (a.n_params, a.tokens, a.learning_rate, a.dtype, len(a.counted), a.step, a.max_iters)
            writer.writerow((*start, *middle, a.losses.get(a.step, ""), a.deviation, *end))


def draw(arms, path, tolerance):
    """A figure, a row a size, two panels each: validation loss over steps, and the last one over syncs. Raises OSError.

    Of an architecture at several learning rates only the best is drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = [_at_their_best(group) for group in _by_scale(arms)]
    shape = {"figsize": (12, 4.8 * len(groups)), "layout": "constrained", "squeeze": False}
    figure, rows = plt.subplots(len(groups), 2, **shape)
    for group, (curves, points) in zip(groups, rows, strict=True):
        _draw_scale(group, arms, curves, points, tolerance)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _at_their_best(arms):
    """The arms without those that another learning rate beats."""
    best = {}
    for arm in arms:
        key = (arm.variant, arm.pattern, arm.n_shard, arm.n_embd, arm.dtype, "" if arm.finished else arm.setting)
        if key not in best or arm.losses.get(arm.step, math.inf) < best[key].losses.get(best[key].step, math.inf):
            best[key] = arm
    return list(best.values())


def _draw_scale(group, arms, curves, points, tolerance):
    """The two panels of the arms of one size."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    counts = sorted({arm.syncs for arm in group if not arm.all_synced})
    shards = sorted({arm.n_shard for arm in group})
    styles = {n: style for n, style in zip(shards, ["-", "--", ":", "-."] * len(shards), strict=False)}
    markers = {n: marker for n, marker in zip(shards, "os^D" * len(shards), strict=False)}
    reference = baseline_of(group[0], arms)

    def colour(arm):
        if arm.all_synced:
            return "black" if reference is None or arm.n_layer == reference.n_layer else "tab:red"  # red: a control
        return plt.get_cmap("viridis")(counts.index(arm.syncs) / max(1, len(counts) - 1) * 0.9)

    def label(arm):
        size = f" {arm.n_layer}x{arm.n_embd}" if _differ(group, "n_layer", "n_embd") else ""
        rate = f", lr {arm.learning_rate:g}" if _differ(group, "learning_rate") else ""
        shard = f", n_shard {arm.n_shard}" if len(shards) > 1 else ""
        dtype = f", {arm.dtype}" if _differ(group, "dtype") else ""
        return f"{arm.variant}{size}, {arm.syncs} syncs{shard}{rate}{dtype}"

    for arm in group:
        losses = arm.losses
        curves.plot(
            list(losses), list(losses.values()), styles[arm.n_shard], color=colour(arm), label=label(arm), linewidth=1.6
        )
    curves.set(xlabel="step", ylabel="validation loss (nats per token)", title="Loss curves")
    final = [arm.losses[arm.step] for arm in group if arm.losses and math.isfinite(arm.losses[arm.step])]
    if final:  # the start of the curves would squeeze what matters
        curves.set_ylim(min(final) * 0.97, min(final) * 1.35)
    curves.legend(fontsize=8 if len(group) < 16 else 5, ncols=1 + len(group) // 24)
    curves.grid(alpha=0.3)

    for n in shards:
        line = [arm for arm in group if arm.n_shard == n and arm.losses]
        plain = [arm for arm in line if " " not in arm.variant and colour(arm) != "tab:red"]
        points.plot(
            [arm.syncs for arm in plain],
            [arm.losses[arm.step] for arm in plain],
            styles[n],
            color="0.6",
            linewidth=1,
            zorder=1,
        )
        for arm in line:
            loss, edge = arm.losses[arm.step], colour(arm)
            face = edge if arm.finished else "none"
            points.errorbar(arm.syncs, loss, arm.deviation or 0, color=edge, capsize=3, zorder=2)
            points.scatter(arm.syncs, loss, marker=markers[n], s=55, facecolor=face, edgecolor=edge, zorder=3)
            if arm not in plain:
                name = arm.variant.partition(" ")[2] or f"{arm.n_layer}x{arm.n_embd}"
                points.annotate(name, (arm.syncs, loss), (6, 3), textcoords="offset points", fontsize=7)
        if line:
            points.scatter([], [], marker=markers[n], color="0.4", label=f"n_shard {n}")
    if reference is not None and reference.losses:
        loss = reference.losses[reference.step]
        points.axhspan(
            loss, loss * (1 + tolerance / 100), color="tab:green", alpha=0.12, label=f"within {tolerance:g}%"
        )
    ticks = sorted({arm.syncs for arm in group})
    points.set_xscale("log", base=2)
    points.set_xticks(ticks, [str(tick) for tick in ticks])
    points.xaxis.set_minor_formatter(NullFormatter())
    points.set(xlabel="sync points in a forward pass", ylabel="validation loss (nats per token)")
    points.set_title("Loss against syncs" + ("" if all(arm.finished for arm in group) else " (hollow: unfinished)"))
    points.legend(fontsize=8)
    points.grid(alpha=0.3)


def report(arms, tolerance, png, csv_path=None):
    """Print the table, warnings and verdict; write the figure and, where asked for, the CSV. Raises OSError."""
    print(table(arms), *warnings(arms), verdict(arms, tolerance), sep="\n")
    if csv_path:
        write_csv(arms, csv_path)
    draw(arms, png, tolerance)
    print(f"figure: {png}")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="folders with a log.txt, or logs; default: out*/log.txt")
    parser.add_argument("--tolerance", type=float, default=2.0, help="percent above the baseline that count as equal")
    path = {"type": os.path.expanduser}
    parser.add_argument("--png", **path, default="comparison.png", help="where the figure goes: .png, .pdf or .svg")
    parser.add_argument("--csv", **path, help="where the table goes as CSV, if anywhere")
    args = parser.parse_args(argv)
    try:
        check_figure(args.png)
        paths = args.paths or sorted(Path().glob("out*/log.txt"))
        if not paths:
            raise ValueError("no out*/log.txt here; name the runs' folders")
        report(load_runs(paths), args.tolerance, args.png, args.csv)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    set_up()
    sys.exit(main(sys.argv[1:]))
