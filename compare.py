"""Compare runs: a table, the fewest syncs that still learn as well, and a figure, from their log.txt files.

$ python compare.py out-*
$ python compare.py out-* --tolerance=1 --png=figure.png --csv=table.csv

Works while the runs go on: an unfinished run is marked, its gap taken at the last step that the baseline has too.
A run is compared with the baseline (pattern all 2) of its own n_shard, or with the only baseline there is.
"""

import argparse
import csv
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from reduced_sync_model import count_syncs
from run_log import read_log

# where runs differ in one of these, their losses are not those of the same experiment
SAME = ("dataset", "block_size", "tokens a step", "max_iters", "n_layer", "n_head", "n_embd", "learning_rate", "seed")


@dataclass
class Run:
    """One run's log: the header's facts, and its evaluations as {step: validation loss}."""

    name: str
    variant: str
    pattern: str
    n_shard: int
    n_params: int
    max_iters: int
    same: dict
    losses: dict

    @property
    def syncs(self):
        return count_syncs(self.pattern)

    @property
    def reduction(self):
        """Percent fewer syncs than standard TP."""
        return 100 * (1 - self.syncs / (2 * len(self.pattern)))

    @property
    def step(self):
        return max(self.losses, default=0)

    @property
    def finished(self):
        return self.max_iters in self.losses

    @property
    def is_baseline(self):
        return set(self.pattern) == {"2"}


@dataclass
class Gap:
    """How far a run's loss is above the baseline's, in percent, at the last step that both have evaluated."""

    percent: float
    step: int
    final: bool  # both have finished


def load_runs(paths):
    """The runs in `paths`, folders with a log.txt or logs, most syncs first. Raises ValueError with one clear line."""
    runs = []
    for path in map(Path, paths):
        log_path = path / "log.txt" if path.is_dir() else path
        try:
            log = read_log(log_path)
            config, pattern = log.header["config"], log.header["sync_pattern"]
            syncs = count_syncs(pattern)
            architecture = config["architecture"]
            label = {"baseline": "Baseline", "spd": "SPD"}.get(architecture, f"{architecture.capitalize()}-{syncs}")
            runs.append(
                Run(
                    name=path.name if path.is_dir() else path.parent.name,
                    variant=label,
                    pattern=pattern,
                    n_shard=config["n_shard"],
                    n_params=int(log.header["parameters"].split("(")[1].rstrip(")")),
                    max_iters=config["max_iters"],
                    same={key: config.get(key, log.header.get(key)) for key in SAME},
                    losses={step: loss for step, _, loss in log.evaluations},
                )
            )
        except OSError as error:
            raise ValueError(f"{log_path}: {error.strerror}; name folders that hold a log.txt") from None
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            raise ValueError(f"{log_path}: its header is not that of a run: {error}") from None
    return sorted(runs, key=lambda run: (run.n_shard, -run.syncs, run.name))


def baseline_of(run, runs):
    """The baseline to compare `run` with, or None if there is none or more than one that it could be."""
    baselines = [other for other in runs if other.is_baseline]
    own = [other for other in baselines if other.n_shard == run.n_shard]
    candidates = own or baselines
    return candidates[0] if len(candidates) == 1 else None


def gap(run, runs):
    """The run's Gap to its baseline, or None where there is nothing to compare."""
    reference = baseline_of(run, runs)
    common = set(run.losses) & set(reference.losses) if reference is not None else set()
    if not common:
        return None
    step = max(common)
    percent = 100 * (run.losses[step] / reference.losses[step] - 1)
    return Gap(percent, step, run.finished and reference.finished)


def table(runs):
    """The comparison as text, a line a run."""
    rows = [("run", "variant", "n_shard", "pattern", "syncs", "fewer", "parameters", "val loss", "gap", "step")]
    for run in runs:
        difference = gap(run, runs)
        rows.append(
            (
                run.name,
                run.variant,
                str(run.n_shard),
                run.pattern,
                str(run.syncs),
                f"{run.reduction:.1f}%",
                f"{run.n_params / 1e6:.2f}M",
                f"{run.losses[run.step]:.4f}" if run.losses else "-",
                f"{difference.percent:+.2f}%{'' if difference.final else f' at {difference.step}*'}"
                if difference
                else "-",
                f"{run.step}" + ("" if run.finished else f" of {run.max_iters}*"),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = {0, 1, 3}
    lines = [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    if not all(run.finished for run in runs):
        lines.append("* unfinished: its gap is provisional")
    return "\n".join(lines)


def warnings(runs):
    """A line for each setting in which the runs differ though a comparison needs it to be the same."""
    lines = []
    for key in SAME:
        values = {str(run.same[key]) for run in runs}
        if len(values) > 1:
            lines.append(f"warning: the runs differ in {key}: {', '.join(sorted(values))}")
    return lines


def verdict(runs, tolerance):
    """For each n_shard a line: the fewest syncs within `tolerance` percent of the baseline, or why it can't be said."""
    lines = []
    for n_shard in sorted({run.n_shard for run in runs}):
        group = [run for run in runs if run.n_shard == n_shard]
        reference = baseline_of(group[0], runs)
        start = f"n_shard {n_shard}: "
        if reference is None:
            count = sum(run.is_baseline for run in runs)
            lines.append(
                start + f"can't say: {count or 'no'} baseline{'s' if count else ''} among the runs, one is needed"
            )
        elif not reference.finished:
            lines.append(start + f"can't say yet: the baseline {reference.name} has not finished")
        elif not [run for run in group if run.finished and not run.is_baseline]:
            lines.append(start + "can't say: no variant has finished")
        else:
            good = [run for run in group if run.finished and gap(run, runs).percent <= tolerance]  # nan is not <=
            unfinished = sum(not run.finished for run in group)
            note = f" ({unfinished} unfinished not counted)" if unfinished else ""
            if not [run for run in good if not run.is_baseline]:
                lines.append(start + f"no variant is within {tolerance:g}% of the baseline{note}")
            else:
                best = min(good, key=lambda run: (run.syncs, run.losses[run.step]))
                lines.append(
                    start + f"the fewest syncs within {tolerance:g}% of the baseline: {best.syncs} ({best.variant}, "
                    f"{gap(best, runs).percent:+.2f}%, {best.reduction:.1f}% fewer syncs){note}"
                )
    return "\n".join(lines)


def write_csv(runs, path):
    """One row a run, numbers in full. Raises OSError."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        head = "run variant n_shard sync_pattern syncs reduction_percent parameters step max_iters val_loss gap_percent"
        writer.writerow([*head.split(), "gap_step"])
        for run in runs:
            difference = gap(run, runs)
            end = (difference.percent, difference.step) if difference else ("", "")
            start = (run.name, run.variant, run.n_shard, run.pattern, run.syncs, run.reduction, run.n_params)
            writer.writerow((*start, run.step, run.max_iters, run.losses.get(run.step, ""), *end))


def draw(runs, path, tolerance):
    """A PNG of two panels: validation loss over steps, and the final one over the number of syncs. Raises OSError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, (curves, points) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    counts = sorted({run.syncs for run in runs if not run.is_baseline})
    shards = sorted({run.n_shard for run in runs})
    styles = {n: style for n, style in zip(shards, ["-", "--", ":", "-."] * len(shards), strict=False)}
    markers = {n: marker for n, marker in zip(shards, "os^D" * len(shards), strict=False)}

    def colour(run):
        if run.is_baseline:
            return "black"
        return plt.get_cmap("viridis")(counts.index(run.syncs) / max(1, len(counts) - 1) * 0.9)

    for run in runs:
        label = f"{run.variant}, {run.syncs} syncs" + (f", n_shard {run.n_shard}" if len(shards) > 1 else "")
        steps = sorted(run.losses)
        losses = [run.losses[step] for step in steps]
        curves.plot(steps, losses, styles[run.n_shard], color=colour(run), label=label, linewidth=1.6)
    curves.set(xlabel="step", ylabel="validation loss (nats per token)", title="Loss curves")
    final = [run.losses[run.step] for run in runs if run.losses and math.isfinite(run.losses[run.step])]
    if final:  # the start of the curves would squeeze what matters
        curves.set_ylim(min(final) * 0.97, min(final) * 1.35)
    curves.legend(fontsize=8)
    curves.grid(alpha=0.3)

    for n in shards:
        group = [run for run in runs if run.n_shard == n and run.losses]
        points.plot(
            [run.syncs for run in group],
            [run.losses[run.step] for run in group],
            styles[n],
            color="0.6",
            linewidth=1,
            zorder=1,
        )
        for run in group:
            face = colour(run) if run.finished else "none"
            points.scatter(
                run.syncs, run.losses[run.step], marker=markers[n], s=55, facecolor=face, edgecolor=colour(run)
            )
        if group:
            points.scatter([], [], marker=markers[n], color="0.4", label=f"n_shard {n}")
    reference = next((run for run in runs if run.is_baseline and run.losses), None)
    if reference is not None:
        loss = reference.losses[reference.step]
        points.axhspan(
            loss, loss * (1 + tolerance / 100), color="tab:green", alpha=0.12, label=f"within {tolerance:g}%"
        )
    ticks = sorted({run.syncs for run in runs})
    points.set_xscale("log", base=2)
    points.set_xticks(ticks, [str(tick) for tick in ticks])
    points.xaxis.set_minor_formatter(NullFormatter())
    points.set(xlabel="sync points in a forward pass", ylabel="validation loss (nats per token)")
    points.set_title("Loss against syncs" + ("" if all(run.finished for run in runs) else " (hollow: unfinished)"))
    points.legend(fontsize=8)
    points.grid(alpha=0.3)
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="folders with a log.txt, or logs; default: out*/log.txt")
    parser.add_argument("--tolerance", type=float, default=2.0, help="percent above the baseline that count as equal")
    parser.add_argument("--png", default="comparison.png", help="where the figure goes")
    parser.add_argument("--csv", help="where the table goes as CSV, if anywhere")
    args = parser.parse_args(argv)
    try:
        paths = args.paths or sorted(Path().glob("out*/log.txt"))
        if not paths:
            raise ValueError("no out*/log.txt here; name the runs' folders")
        runs = load_runs(paths)
        print(table(runs), *warnings(runs), verdict(runs, args.tolerance), sep="\n")
        if args.csv:
            write_csv(runs, args.csv)
        draw(runs, args.png, args.tolerance)
        print(f"figure: {args.png}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
