"""Compare runs by their log.txt files: a table, the fewest syncs that still learn as well, and a figure.

$ python compare.py out-*
$ python compare.py out-* --tolerance=1 --png=figure.png --csv=table.csv
$ python compare.py out-* --latency=decode.json                                       # which is fastest, as measured
$ python compare.py out-* --link=nvlink --accelerator=h100 --tp_size=2 --batch_size=1      # or PREDICTED

Each line is an arm: an architecture at one size, at its best learning rate, and the mean of its seeds. The gap is
100 ln(loss / baseline's loss) in percent, the mean over the seeds that both have. The baseline is standard TP of the
same size (parameters within 4 %), as deep as the deepest arm of that size, and of the same float type and n_shard if
there is one; of several n_shard the best one. A dense model of fewer layers is a control, not a baseline. +- is half of
the gap's 95 % confidence interval, from Student's t and the noise: what remains of the losses at a size once each arm's
and each seed's mean is taken out, an analysis of variance that takes all arms to be equally noisy.

The verdict on an arm is `within` or `outside` if the whole interval lies on one side of the tolerance, otherwise
`open`, with the number of seeds that would settle it. An arm has no verdict if it is `unfinished` or has `diverged`, if
its learning rate or its baseline's is `not bracketed` by worse rates on either side, at most twofold away (study.py
finds them), if it is `too short` (below 10 tokens per parameter) or of `other length` than its baseline, if the
`baseline diverged` or has only `other seeds`, or if no two arms share two seeds (`one seed`). Where no arm has a
verdict, the last line says what was seen so far.

A warning names every other setting that affects losses in which runs of one size differ. Runs on other data, or
evaluated on other windows, have no gap.

--latency reads each run's time per token from what `bench.py decode --json=decode.json` measured for the same model:
the same n_layer, n_embd, vocab_size, sync, block, n_head and n_shard (for a dense model the last two do not matter).
--link predicts it with the cost model of bench.py predict, in bfloat16 with a full context. Either adds columns, a
panel and a verdict. A run is on the frontier unless it is dominated: another one is at least as fast, and its loss is
lower beyond noise.

--predict=12x768 extrapolates the gaps to another size, from those of two sizes or more, by two forms over ln N.

This also works while runs are training: an unfinished run is marked, and its gap is at the last step that the baseline
has too.
"""

from reduced_sync.cli import set_up

if __name__ == "__main__":  # before the imports that take seconds: Ctrl-C ends them in silence
    set_up()

import sys
from dataclasses import dataclass
from pathlib import Path

from reduced_sync.cli import check_distinct, check_figure, one_line_errors
from reduced_sync.compare.figures import draw_comparison
from reduced_sync.compare.frontier import add_measured, add_predicted
from reduced_sync.compare.prediction import predict
from reduced_sync.compare.report import report, write_csv
from reduced_sync.compare.runs import load_runs
from reduced_sync.configurator import option, parse
from reduced_sync.hardware import GPUS, LINKS


@dataclass
class Options:
    """Every key."""

    paths: tuple[str, ...] = option((), "folders with a log.txt, or logs; default: out*/log.txt")
    tolerance: float = option(2.0, "percent above the baseline that count as equal", least=0)
    png: str = option("comparison.png", "file for the figure: .png, .pdf or .svg", is_path=True)
    csv: str | None = option(None, "file for the table as CSV", is_path=True)
    latency: str | None = option(None, "measured times per token: what bench.py decode wrote with --json", is_path=True)
    link: str | None = option(None, "predict the times per token, with this link between ranks", allowed=tuple(LINKS))
    accelerator: str | None = option(None, "with link: what a rank computes on; default: h100", allowed=tuple(GPUS))
    tp_size: int | None = option(None, "ranks; needed with link; with latency, default: the most in the file", least=1)
    batch_size: int | None = option(None, "with latency or link: sequences; default: the fewest in it, or 1", least=1)
    predict: str | None = option(None, "extrapolate the gaps to this size, LAYERSxWIDTH")


# what an option needs one of
NEEDED = dict(batch_size=("latency", "link"), tp_size=("latency", "link"), accelerator=("link",), link=("tp_size",))


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
        if options.latency == "":
            raise ValueError("--latency is empty: it must name a file")
        paths = options.paths or sorted(Path().glob("out*/log.txt"))
        if not paths:
            raise ValueError("no out*/log.txt here; name the runs' folders")
        logs = [path / "log.txt" if path.is_dir() else path for path in map(Path, paths)]
        check_distinct({"csv": options.csv, "png": options.png}, filter(None, [*logs, options.latency]))
        arms, skipped = load_runs(paths)
        for line in skipped:
            print(f"skipped: {line}", file=sys.stderr)
        if options.latency:
            add_measured(arms, options.latency, options.tp_size, options.batch_size)
        if options.link:
            add_predicted(arms, options.link, options.accelerator or "h100", options.tp_size, options.batch_size or 1)
        print(report(arms, options.tolerance))
        if options.csv:
            write_csv(arms, options.csv, options.tolerance)
        draw_comparison(arms, options.png, options.tolerance)
        print(f"figure: {options.png}")
        if options.predict:
            print(predict(arms, options.predict))


if __name__ == "__main__":
    main(sys.argv[1:])
