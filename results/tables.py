"""The tables of recorded results in the documents, made from the logs and files that they are about: make results.

A table stands between two comments, of which the first says what it is and the folder of results/ that it is made from:

    <!-- make results: runs pilot -->
    <!-- end -->

$ python -m results.tables
"""

import itertools
import re
import statistics
from pathlib import Path

from reduced_sync.bench.results import read_results
from reduced_sync.cli import one_line_errors
from reduced_sync.compare.prediction import predict
from reduced_sync.compare.report import report
from reduced_sync.compare.runs import baseline_of, gap_of, load_runs
from reduced_sync.dropping.log import read_drop_log, table_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
DOCUMENTS = [ROOT / "README.md", ROOT / "EXPERIMENT_SUMMARY.md", *sorted(RESULTS.glob("*/README.md"))]
TABLE = re.compile(r"(<!-- make results: (\w+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def load(folder):
    """The runs below a folder, as arms. Raises ValueError where one is none."""
    arms, skipped = load_runs(sorted(log.parent for log in folder.glob("*/log.txt")))
    if skipped:
        raise ValueError(skipped[0])
    return arms


def markdown(rows):
    """A table in Markdown, of rows of cells; the first is the head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def runs_table(folder):
    """What `python compare.py FOLDER/*/` prints of its runs."""
    return f"```\n{report(load(folder), tolerance=2)}\n```"


def gaps_table(folder):
    """What each way to sync costs at each size and n_shard below a folder: gaps with 95 % intervals, in percent.

    At the float type of most arms. A star marks an arm whose learning rate, or whose baseline's, is not bracketed.
    """
    arms = load(folder)
    dtype = statistics.mode(arm.dtype for arm in arms)
    arms = [arm for arm in arms if arm.dtype == dtype]
    rows, columns = {}, {}
    for arm in sorted(arms, key=lambda a: (-a.syncs / a.n_layer, a.hidden, -a.n_layer, a.sync)):
        baseline, gap = baseline_of(arm, arms), gap_of(arm, arms)
        column = (baseline.size_class, baseline.size, max(2, arm.n_shard))
        columns[column] = f"{baseline.size}, {column[-1]} shards"
        cell = loss_of(arm) if arm is baseline else f"{gap.percent:+.1f}"
        cell += "" if arm is baseline or gap.margin is None else f" ±{gap.margin:.1f}"
        cell += "" if arm.bracketed and baseline.bracketed else "*"
        rows.setdefault(rule_of(arm, baseline), {})[column] = cell + seeds_of(arm)
    order = sorted(rows, key=lambda rule: rule if rule.startswith("control") else "")  # controls last
    lines = [["gap, %", *(columns[column] for column in sorted(columns))]]
    lines += [[rule, *(rows[rule].get(column, "") for column in sorted(columns))] for rule in order]
    return markdown(lines)


def rates_table(folder):
    """The losses of those arms below a folder that were run at several learning rates."""
    arms, rows = load(folder), {}
    for arm in (arm for arm in arms if len(arm.arms_by_rate) > 1):
        shards = f", {arm.n_shard} shards" if arm.n_shard > 1 else ""
        name = f"{arm.size}, {rule_of(arm, baseline_of(arm, arms))}{shards}"
        rows[name] = {rate.learning_rate: loss_of(rate) + seeds_of(rate) for rate in arm.arms_by_rate}
    rates = sorted({rate for cells in rows.values() for rate in cells})
    lines = [["loss", *(f"{rate:g}" for rate in rates)]]
    return markdown(lines + [[name, *(cells.get(rate, "") for rate in rates)] for name, cells in rows.items()])


def prediction_table(folder):
    """What `python compare.py FOLDER/*/ --predict=12x768` says of that size."""
    return f"```\n{predict(load(folder), '12x768')}\n```"


def loss_of(arm):
    """An arm's last loss as the tables have it."""
    return f"{arm.losses[arm.step]:.4f}"


def seeds_of(arm):
    """In brackets how many seeds an arm has, unless it is one."""
    return f" ({len(arm.counted_losses)})" if len(arm.counted_losses) > 1 else ""


def rule_of(arm, baseline):
    """An arm's sync rule, in words where it is one for any depth."""
    if fewer := baseline.n_layer - arm.n_layer:
        return f"control, {fewer} layer{'s' if fewer > 1 else ''} fewer"
    return "after attention" if arm.sync == "a" * (arm.n_layer - 1) + "1" else f"`{arm.sync}`"


def decoding_table(folder):
    """What bench.py decode measured, of its JSON files in a folder: a table for each case."""
    files = map(read_results, sorted(folder.glob("*.json")))
    cases = [case for options, results in files if options["command"] == "decode" for case in results]
    return "\n\n".join(map(decoding_case, cases))


def training_table(folder):
    """What bench.py train measured, of train.json in a folder: tokens/s and memory, with ratios to our first."""
    _, results = read_results(folder / "train.json")
    ours = next(row for row in results if not row.candidate.startswith("gpt2"))
    lines = [["candidate", "tokens/s", "speed", "peak memory, GB", "memory"]]
    for row in results:
        speed, memory = row.tokens_per_s / ours.tokens_per_s, row.peak_bytes / ours.peak_bytes
        cells = [f"{row.tokens_per_s:,.0f}", f"{speed:.2f}x", f"{row.peak_bytes / 1e9:.1f}", f"{memory:.2f}x"]
        lines.append([row.candidate, *cells])
    return markdown(lines)


def decoding_case(case):
    """The candidates at one tp_size, batch size and prompt: milliseconds, and how much faster than the first."""
    head = f"**tp_size {case.tp_size}, batch {case.batch_size}, prompt {case.prompt}.**"
    others = {case.reference: case.reference_times, f"Ours, {case.rows[0].candidate}, compiled": case.compiled}
    others["The same without communication"] = case.compiled_silent
    for name, times in others.items():
        if times is not None:
            bound = f" (memory alone {1000 * times.bound_s:.1f} ms)" if times.bound_s else ""
            head += f" {name}: TTFT {1000 * times.ttft_s:.0f} ms, TPOT {1000 * times.tpot_s:.1f} ms{bound}."
    head += f" Ours, eager: memory alone {1000 * case.bound_s:.1f} ms."
    columns = ["variant", "syncs", "TTFT, ms", "TPOT, ms", "faster"]
    columns += ["in all-reduces, ms", "without them, ms"] if case.tp_size > 1 else []
    lines = [columns]
    for row in case.rows:
        cells = [row.candidate, row.count]
        cells += [f"{1000 * row.ttft_s:.0f}", f"{1000 * row.tpot_s:.1f}"]
        cells.append(f"{case.rows[0].tpot_s / row.tpot_s:.2f}x")
        if case.tp_size > 1:
            cells += [f"{1000 * row.in_all_reduces_s:.1f}", f"{1000 * row.silent_tpot_s:.1f}"]
        lines.append(cells)
    return f"{head}\n\n{markdown(lines)}"


def delays_table(folder):
    """What bench.py decode measured with added delays: TPOT with each, and the exposed syncs between two of them."""
    (path,) = folder.glob("*.json")
    _, cases = read_results(path)
    delays = [f"{1000 * case.added_delay_s:g}" for case in cases]
    columns = ["variant", "syncs", *(f"{delay} ms" for delay in delays)]
    columns += [f"exposed, {a} to {b} ms" for a, b in itertools.pairwise(delays)]
    lines = [columns]
    for rows in zip(*(case.rows for case in cases), strict=True):
        cells = [rows[0].candidate, rows[0].count]
        cells += [f"{1000 * row.tpot_s:.1f}" for row in rows]
        cells += [f"{row.exposed_syncs:.1f} ({row.model_exposed_syncs:.1f})" for row in rows[1:]]
        lines.append(cells)
    return markdown(lines)


def serving_table(folder):
    """What measure.py of results/serving measured, of measured.txt in a folder: medians over rounds.

    The ratios to the first, too: of figures of the same round.
    """
    found, columns = {}, ["family, ranks", "added delay, ms", "load", "vllm", "baseline", "spd", "grouped-4"]
    for line in (folder / "measured.txt").read_text().splitlines():
        name, *cells = (cell.strip() for cell in line.rstrip("| ").split("|"))
        family, variant, tp_size, delay, number, kind = (word.partition("=")[2] or word for word in name.split())
        load = f"TTFT, prompt {cells[1]}, ms" if kind == "prefill" else f"tokens/s, clients {cells[0]}"
        row = found.setdefault((f"{family}, {tp_size}", f"{int(delay) / 1000:g}", load), {})
        row.setdefault(variant, {})[number] = float(cells[3 if kind == "prefill" else 2])
    lines = [columns]
    for key, row in found.items():
        first, cells = next(row[variant] for variant in columns[3:] if variant in row), []
        for rounds in (row.get(variant) for variant in columns[3:]):
            if rounds:
                ratio = statistics.median(figure / first[number] for number, figure in rounds.items())
            cells.append(f"{statistics.median(rounds.values()):.1f} ({ratio:.2f}x)" if rounds else "")
        lines.append([*key, *cells])
    return markdown(lines)


def dropping_table(folder):
    """The perplexities of every run of drop_syncs.py below a folder."""
    return table_of({log.parent.name: read_drop_log(log) for log in sorted(folder.glob("*/log.txt"))})


TABLES = {
    "runs": runs_table,
    "gaps": gaps_table,
    "rates": rates_table,
    "prediction": prediction_table,
    "decoding": decoding_table,
    "delays": delays_table,
    "training": training_table,
    "dropping": dropping_table,
    "serving": serving_table,
}


def renewed(text):
    """A document's text with all its tables made anew."""
    return TABLE.sub(lambda match: f"{match[1]}\n{TABLES[match[2]](RESULTS / match[3])}\n\n{match[4]}", text)


if __name__ == "__main__":
    with one_line_errors():
        for path in DOCUMENTS:
            path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")
