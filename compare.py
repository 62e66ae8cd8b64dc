"""Compare runs: a table, the fewest syncs that still learn as well, and a figure, from their log.txt files.

$ python compare.py out-*
$ python compare.py out-* --tolerance=1 --png=figure.png --csv=table.csv
$ python compare.py out-* --latency=decode.json                                       # what is fastest? as measured
$ python compare.py out-* --link=nvlink --accelerator=h100 --tp_size=8 --batch=1      # or PREDICTED

Runs that differ in their seed alone are one line: the mean of their losses, and its standard deviation. A gap is to the
baseline, standard TP of the same size (parameters within 2 %) and, where there is one, of the same float type and
n_shard; among several learning rates, or n_shard of which none is its own, the one with the lowest loss; a shallower
dense model is no baseline but a control. +- is half of the gap's 95 % confidence interval, by Student's t and the
standard deviation pooled over all lines with several seeds, so that it also says something where there is one.

Whatever runs of one size differ in, besides the architecture, is named in a warning; runs on other data, or evaluated
on other windows of it, have no gap. Below 10 tokens a parameter a verdict is no answer, and says so.

--latency takes each run's time per token from what `bench.py decode --json=decode.json` measured of the same model:
n_layer, n_embd, vocab_size, sync, block, and n_head and n_shard, which of a dense model make no difference.
--link predicts it by the cost model of bench.py predict for the model of the run's log, in bfloat16 and behind a full
context. Either adds columns, a panel and a verdict. A run, variant, rival or control, is on the frontier unless it is
dominated: another one is as good or better in loss and time.

--equal_time adds the loss that each run had when it had trained for as long as the baseline did in all: updates times
their median time, so without compilation and evaluations, interpolated between evaluations. A slower run is caught in
the middle of its schedule, a faster one has finished. Times from a machine that was busy with other things are wrong.

Works while the runs go on: an unfinished run is marked, its gap taken at the last step that the baseline has too.
"""

from reduced_sync.cli import set_up

if __name__ == "__main__":  # before the imports that take seconds: Ctrl-C ends them in silence
    set_up()

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from reduced_sync.cli import check_figure, one_line_errors
from reduced_sync.compare.figures import draw_comparison
from reduced_sync.compare.frontier import add_measured, add_predicted
from reduced_sync.compare.report import report, write_csv
from reduced_sync.compare.runs import load_runs
from reduced_sync.configurator import option, parse
from reduced_sync.hardware import LINKS, NAMED


@dataclass
class Options:
    """Every key."""

    paths: tuple[str, ...] = option((), "folders with a log.txt, or logs; default: out*/log.txt")
    tolerance: float = option(2.0, "percent above the baseline that count as equal", least=0)
    png: str = option("comparison.png", "where the figure goes: .png, .pdf or .svg", is_path=True)
    csv: str | None = option(None, "where the table goes as CSV, if anywhere", is_path=True)
    latency: str | None = option(None, "what bench.py decode wrote with --json: times per token", is_path=True)
    link: str | None = option(None, "predict the times per token with this link between ranks", allowed=tuple(LINKS))
    accelerator: str | None = option(None, "with link: what a rank computes on; h100", allowed=tuple(NAMED))
    tp_size: int | None = option(None, "with latency or link: ranks; with latency by default the most in it", least=1)
    batch: int | None = option(None, "with latency or link: sequences; by default the fewest in it, or 1", least=1)
    equal_time: bool = option(False, "the losses when each run has trained for as long as the baseline")


# what an option needs one of
NEEDED = {"batch": ("latency", "link"), "tp_size": ("latency", "link"), "accelerator": ("link",), "link": ("tp_size",)}


def main(argv: list[str]) -> None:
    """Compare the runs that argv names."""
    with one_line_errors():
        options = parse(Options, argv, "paths", __doc__)
        check_figure(options.png)
        if options.latency and options.link:
            raise ValueError("times are either measured, --latency, or predicted, --link")
        for key, others in NEEDED.items():
            if getattr(options, key) and not any(getattr(options, other) for other in others):
                raise ValueError(f"--{key} goes with --{' or --'.join(others)}")
        if options.csv and os.path.realpath(options.csv) == os.path.realpath(options.png):
            raise ValueError(f"--csv and --png are one file: {options.csv}")
        paths = options.paths or sorted(Path().glob("out*/log.txt"))
        if not paths:
            raise ValueError("no out*/log.txt here; name the runs' folders")
        arms, skipped = load_runs(paths)
        for line in skipped:
            print(f"skipped: {line}", file=sys.stderr)
        if options.latency:
            add_measured(arms, options.latency, options.tp_size, options.batch)
        if options.link:
            add_predicted(arms, options.link, options.accelerator or "h100", options.tp_size, options.batch or 1)
        print(report(arms, options.tolerance, options.equal_time))
        if options.csv:
            write_csv(arms, options.csv, options.equal_time)
        draw_comparison(arms, options.png, options.tolerance)
        print(f"figure: {options.png}")


if __name__ == "__main__":
    main(sys.argv[1:])
