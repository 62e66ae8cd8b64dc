"""Compare runs: a table, the fewest syncs that still learn as well, and a figure, from their log.txt files.

$ python compare.py out-*
$ python compare.py out-* --tolerance=1 --png=figure.png --csv=table.csv

Runs that differ in their seed alone are one line: the mean of their losses, and its standard deviation. A gap is to the
baseline, standard TP of the same size (parameters within 2 %) and, where there is one, of the same float type and
n_shard; among several learning rates the one with the lowest loss; a shallower dense model is no baseline but a
control. +- is half of the gap's 95 % confidence interval, by Student's t and the standard deviation pooled over all
lines with several seeds, so that it also says something where there is one.

Whatever runs of one size differ in, besides the architecture, is named in a warning; runs on other data, or evaluated
on other windows of it, have no gap. Below 10 tokens a parameter a verdict is no answer, and says so.

Works while the runs go on: an unfinished run is marked, its gap taken at the last step that the baseline has too.
"""

import argparse
import csv
import itertools
import math
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from reduced_sync.commands import check_figure, one_line, set_up
from reduced_sync.run_log import changes, read_log, settings
from reduced_sync_model import count_syncs

LEAST_TOKENS = 10  # a parameter; shorter runs cannot tell variants apart: EXPERIMENT_SUMMARY.md
HEADER = "sync_pattern parameters dtype config".split()  # lines that a header must have, and keys of its config
CONFIG = """architecture n_shard n_layer n_head n_embd dataset seed learning_rate min_lr max_iters
gradient_accumulation_steps batch_size block_size eval_iters""".split()


@dataclass
class Arm:
    """Runs that differ in their seed alone: the header's facts, and evaluations as {seed: {step: validation loss}}."""

    names: list
    variant: str
    pattern: str
    hidden: int  # syncs in flight while the next sublayer runs
    n_shard: int
    n_layer: int
    n_head: int
    n_embd: int
    n_params: int
    max_iters: int
    tokens: int  # of the whole run
    learning_rate: float
    dtype: str
    settings: dict  # all that should be the same in runs that are compared
    data: tuple  # name, sha256 of train, sha256 of val; None for one that is not known
    changed: str  # settings that changed where the run was resumed
    seeds: dict
    scale: int = 0  # the how-maniest size, where there are several

    @property
    def model(self):
        return self.variant, self.pattern, self.n_shard, self.n_layer, self.n_head, self.n_embd

    @property
    def title(self):
        """The variant, with the pattern where it does not follow from it."""
        return f"{self.variant} {self.pattern}" if self.is_selective else self.variant

    @property
    def is_selective(self):
        return self.variant.startswith("Selective")

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

    What is no run is skipped with a note on stderr. Raises ValueError with one clear line where nothing else is left.
    """
    arms, skipped = [], []
    for path in map(Path, paths):
        try:
            arm = read_run(path)
        except ValueError as error:
            skipped.append(str(error))
            continue
        for other in arms:
            if same_experiment(other, arm) and not set(other.seeds) & set(arm.seeds):
                other.names += arm.names
                other.seeds |= arm.seeds
                other.settings = arm.settings | other.settings  # what one of them knows
                if None in other.data:
                    other.data = arm.data
                break
        else:
            arms.append(arm)
    if skipped and not arms:
        raise ValueError(skipped[0] + (f" (and {len(skipped) - 1} more that are no runs)" if skipped[1:] else ""))
    for line in skipped:
        print(f"skipped: {line}", file=sys.stderr)
    smallest = scale = 0
    for arm in sorted(arms, key=lambda arm: arm.n_params):
        if arm.n_params > 1.04 * smallest:  # shards' norms and controls: within 2 % of the middle
            smallest, scale = arm.n_params, scale + 1
        arm.scale = scale
    return sorted(arms, key=lambda arm: (arm.scale, arm.n_shard, -arm.syncs, arm.names))


def read_run(path):
    """The run whose folder or log is `path`, as an Arm. Raises ValueError with one clear line where it is none, yet."""
    log_path = path / "log.txt" if path.is_dir() else path
    try:
        log = read_log(log_path)
    except OSError as error:
        if any(path.glob("*/log.txt")):
            raise ValueError(f"{path}: its runs are in folders of their own: compare.py {path}/*/") from None
        raise ValueError(f"{log_path}: {error.strerror}; name folders that hold a log.txt") from None
    header = log.header
    try:
        if missing := [f"# {key}:" for key in HEADER if key not in header]:
            raise ValueError(f"it has no line {', '.join(missing)}" if header else "there is none, yet")
        config = header["config"]
        if missing := [key for key in CONFIG if key not in config]:
            raise ValueError(f"its config has no {', '.join(missing)}")
        # a config says which dtype was asked for, its header what that came to
        configs = [part["config"] | {"dtype": part.get("dtype")} for part in log.headers.values() if "config" in part]
        rate, own = float(config["learning_rate"]), settings(configs[-1])
        own["min_lr / learning_rate"] = f"{own.pop('min_lr') / (rate or 1):.4g}"
        own |= {key: value for key, value in configs[0].items() if key == "init_from" and value != "resume"}
        seed, pattern = own.pop("seed"), header["sync_pattern"]
        if len(pattern) != config["n_layer"]:
            raise ValueError(f"sync_pattern {pattern!r} with n_layer={config['n_layer']}")
        hashes = [header.get(f"{split} data", "").removeprefix("sha256 ") for split in ("train", "val")]
        return Arm(
            names=[path.name if path.is_dir() else path.parent.name],
            variant=_variant(config, pattern),
            pattern=pattern,
            hidden=int(header.get("hidden syncs", 0)),
            n_shard=int(config["n_shard"]),
            n_layer=int(config["n_layer"]),
            n_head=int(config["n_head"]),
            n_embd=int(config["n_embd"]),
            n_params=int(header["parameters"].split("(")[1].rstrip(")")),
            max_iters=int(config["max_iters"]),
            tokens=int(own["tokens a step"]) * int(config["max_iters"]),
            learning_rate=rate,
            dtype=header["dtype"],
            settings=own,
            data=(config["dataset"], *(digest if digest not in ("", "unknown") else None for digest in hashes)),
            changed=", ".join(filter(None, itertools.starmap(changes, itertools.pairwise(configs)))),
            seeds={seed: {step: loss for step, _, loss in log.evaluations}},
        )
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{log_path}: its header is not that of a run: {error}") from None


def same_data(a, b):
    """Whether two arms have the same data: by its content, or by its name where a log does not know the content."""
    return a.data[1:] == b.data[1:] if None not in a.data + b.data else a.data[0] == b.data[0]


def comparable(a, b):
    """Whether the losses of two arms are those of the same tokens."""
    return same_data(a, b) and a.settings["evaluation"] == b.settings["evaluation"]


def same_experiment(a, b):
    """Whether two arms differ in their seed alone. What an older log does not say is no difference."""
    shared = a.settings.keys() & b.settings.keys()
    equal = all(a.settings[key] == b.settings[key] for key in shared) and same_data(a, b)
    return a.model == b.model and equal and not a.changed and not b.changed


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
    """The baseline to compare `arm` with, or None if there is none or more than one that it could be.

    Evaluated on the same tokens; of the same size, dtype and n_shard where there is one.
    """
    synced = [other for other in arms if other.all_synced]
    deepest = {scale: max(a.n_layer for a in synced if a.scale == scale) for scale in {a.scale for a in synced}}
    baselines = [other for other in synced if other.n_layer == deepest[other.scale] and comparable(other, arm)]
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
    """A line for each setting in which runs of one size differ, and for each run that changed some on its way."""
    lines = []
    for group in _by_scale(arms):
        for key in dict.fromkeys(key for arm in group for key in arm.settings):
            values = {str(arm.settings[key]) for arm in group if key in arm.settings}
            if len(values) > 1:
                end = ": no gap between them" if key == "evaluation" else ""
                lines.append(f"warning: the runs differ in {key}: {', '.join(sorted(values))}{end}")
        if not all(itertools.starmap(same_data, itertools.combinations(group, 2))):
            names = {
                f"{name} (sha256 {str(train)[:8]}, {str(val)[:8]})" for name, train, val in (a.data for a in group)
            }
            lines.append(f"warning: the runs differ in data: {', '.join(sorted(names))}: no gap between them")
        if len({tuple(sorted(arm.seeds)) for arm in group if len(arm.seeds) == 1}) > 1:
            lines.append("warning: single runs differ in seed")
    lines += [f"warning: {arm.names[0]} was resumed with other settings: {arm.changed}" for arm in arms if arm.changed]
    references = [(arm, baseline_of(arm, arms)) for arm in arms]
    if any(reference is not None and reference.scale != arm.scale for arm, reference in references):
        lines.append("warning: some runs have no baseline of their own size: they are compared with another's")
    return lines


def _by_scale(arms):
    return [[arm for arm in arms if arm.scale == scale] for scale in sorted({arm.scale for arm in arms})]


def _reference(group, arms):
    """The baseline of the first arm of `group` that has one."""
    return next(filter(None, (baseline_of(arm, arms) for arm in group)), None)


def too_short(arms):
    """A text that says so where some arms were trained on too few tokens to tell variants apart."""
    fewest = f"{min(arm.tokens / arm.n_params for arm in arms):.2g}"
    return f"too short to tell: {fewest} tokens a parameter" if float(fewest) < LEAST_TOKENS else ""


def verdict(arms, tolerance):
    """For each size and n_shard a line: the fewest syncs within `tolerance` percent of the baseline, or why not."""
    lines = []
    for scale, n_shard in sorted({(arm.scale, arm.n_shard) for arm in arms}):
        group = [arm for arm in arms if (arm.scale, arm.n_shard) == (scale, n_shard)]
        reference = _reference(group, arms)
        size = f"{reference.n_layer}x{reference.n_embd}, " if reference is not None and len(_by_scale(arms)) > 1 else ""
        start = f"{size}n_shard {n_shard}: "
        variants = [arm for arm in group if not arm.all_synced and arm.finished]
        gaps = [(arm, difference) for arm in variants if (difference := gap(arm, arms)) is not None]
        if reference is not None and all(arm.all_synced and arm.n_layer < reference.n_layer for arm in group):
            continue  # controls only
        if reference is None or (variants and not gaps):
            synced = [other for other in arms if other.all_synced]
            reason = f"{len(synced) or 'no'} baseline{'s' if synced else ''} among the runs, one is needed"
            if synced and not any(itertools.starmap(comparable, itertools.product(variants or group, synced))):
                reason = "evaluated on other windows or data than the baseline"
            lines.append(start + f"can't say: {reason}")
        elif not reference.finished:
            lines.append(start + f"can't say yet: the baseline {reference.names[0]} has not finished")
        elif not variants:
            lines.append(start + "can't say: no variant has finished")
        else:
            if short := too_short([reference, *(arm for arm, _ in gaps)]):
                start += f"{short}, at least {LEAST_TOKENS} are needed. Seen so far, no answer: "
            good = [(arm, difference) for arm, difference in gaps if difference.percent <= tolerance]  # nan is not <=
            notes = {"unfinished": sum(not arm.finished for arm in group)}
            notes["evaluated on other windows or data"] = len(variants) - len(gaps)
            note = "".join(f" ({count} {why} not counted)" for why, count in notes.items() if count)
            if not good:
                lines.append(start + f"no variant is within {tolerance:g}% of the baseline{note}")
            else:
                best, difference = min(good, key=lambda pair: (pair[0].syncs - pair[0].hidden, pair[1].percent))
                count = f"{best.syncs - best.hidden} and {best.hidden} hidden" if best.hidden else best.syncs
                lines.append(
                    start + f"the fewest syncs within {tolerance:g}% of the baseline: {count} ({best.title}, "
                    f"{difference.percent:+.2f}%, {best.reduction:.1f}% fewer syncs){note}"
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
        rates = ("learning_rate", "min_lr / learning_rate") if arm.finished else ()
        others = {key: value for key, value in arm.settings.items() if key not in rates}
        key = (arm.model, arm.data, arm.changed, str(others))
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
    reference = _reference(group, arms)

    def colour(arm):
        if arm.all_synced:
            return "black" if reference is None or arm.n_layer == reference.n_layer else "tab:red"  # red: a control
        return plt.get_cmap("viridis")(counts.index(arm.syncs) / max(1, len(counts) - 1) * 0.9)

    def label(arm):
        size = f" {arm.n_layer}x{arm.n_embd}" if _differ(group, "n_layer", "n_embd") else ""
        rate = f", lr {arm.learning_rate:g}" if _differ(group, "learning_rate") else ""
        shard = f", n_shard {arm.n_shard}" if len(shards) > 1 else ""
        dtype = f", {arm.dtype}" if _differ(group, "dtype") else ""
        other = "" if reference is None or comparable(arm, reference) else ", other windows or data"
        syncs = "" if arm.is_selective else f", {arm.syncs} syncs"  # its name says them
        return f"{arm.title}{size}{syncs}{shard}{rate}{dtype}{other}"

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

    shown = [arm for arm in group if arm.losses and (reference is None or comparable(arm, reference))]
    ticks = sorted({arm.syncs for arm in shown})
    # joined: evenly spread syncs, fewer from point to point, and nothing else that differs
    family = [arm for arm in shown if " " not in arm.variant and not arm.is_selective and colour(arm) != "tab:red"]
    for n, dtype in sorted({(arm.n_shard, arm.dtype) for arm in family}):
        line = [arm for arm in family if (arm.n_shard, arm.dtype) == (n, dtype)]
        losses = [arm.losses[arm.step] for arm in line]
        points.plot([arm.syncs for arm in line], losses, styles[n], color="0.6", linewidth=1, zorder=1)
    for arm in shown:
        loss, edge = arm.losses[arm.step], colour(arm)
        face = edge if arm.finished else "none"
        points.errorbar(arm.syncs, loss, arm.deviation or 0, color=edge, capsize=3, zorder=2)
        points.scatter(arm.syncs, loss, marker=markers[arm.n_shard], s=55, facecolor=face, edgecolor=edge, zorder=3)
        if arm not in family:
            name = f"{arm.pattern if arm.is_selective else ''} {arm.variant.partition(' ')[2]}".strip()
            left = arm.is_selective or arm.syncs == ticks[-1]
            place = {"xytext": (-6, 3), "ha": "right"} if left else {"xytext": (6, 3)}
            text = name or f"{arm.n_layer}x{arm.n_embd}"
            points.annotate(text, (arm.syncs, loss), textcoords="offset points", fontsize=7, **place)
    for n in sorted({arm.n_shard for arm in shown}):
        points.scatter([], [], marker=markers[n], color="0.4", label=f"n_shard {n}")
    if reference is not None and reference.losses:
        loss = reference.losses[reference.step]
        points.axhspan(
            loss, loss * (1 + tolerance / 100), color="tab:green", alpha=0.12, label=f"within {tolerance:g}%"
        )
    points.set_xscale("log", base=2)
    points.set_xticks(ticks, [str(tick) for tick in ticks])
    points.xaxis.set_minor_formatter(NullFormatter())
    points.set(xlabel="sync points in a forward pass", ylabel="validation loss (nats per token)")
    title = "Loss against syncs" + ("" if all(arm.finished for arm in group) else " (hollow: unfinished)")
    short = too_short([arm for arm in group if colour(arm) != "tab:red"] or group)
    points.set_title(f"{title}\n{short}" if short else title)
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
        if not 0 <= args.tolerance < math.inf:
            raise ValueError(f"--tolerance={args.tolerance} must be at least 0, and finite")
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
