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

import sys
from dataclasses import dataclass
from pathlib import Path

from reduced_sync.commands import check_figure, one_line_errors, set_up
from reduced_sync.comparison import report
from reduced_sync.config import option, parse
from reduced_sync.runs import load_runs


@dataclass
class Options:
    """Every key."""

    paths: tuple[str, ...] = option((), "folders with a log.txt, or logs; default: out*/log.txt")
    tolerance: float = option(2.0, "percent above the baseline that count as equal", least=0)
    png: str = option("comparison.png", "where the figure goes: .png, .pdf or .svg", is_path=True)
    csv: str | None = option(None, "where the table goes as CSV, if anywhere", is_path=True)


def main(argv: list[str]) -> None:
    """Compare the runs that argv names."""
    with one_line_errors():
        options = parse(Options, argv, "paths", __doc__)
        check_figure(options.png)
        paths = options.paths or sorted(Path().glob("out*/log.txt"))
        if not paths:
            raise ValueError("no out*/log.txt here; name the runs' folders")
        report(load_runs(paths), options.tolerance, options.png, options.csv)


if __name__ == "__main__":
    set_up()
    main(sys.argv[1:])
