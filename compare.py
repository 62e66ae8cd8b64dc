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
import math
import os
import sys
from pathlib import Path

from reduced_sync.commands import check_figure, one_line, set_up
from reduced_sync.comparison import report
from reduced_sync.runs import load_runs


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
