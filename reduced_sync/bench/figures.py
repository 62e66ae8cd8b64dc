"""The figure that bench.py decode draws."""

from pathlib import Path

from reduced_sync.bench.results import Case


def draw_decoding(table: list[Case], path: str | Path) -> None:
    """A figure of TPOT against sync count at tp_size 2 or more: measured points, line and bounds. Raises OSError."""
    from matplotlib.figure import Figure

    cases = [case for case in table if case.tp_size > 1]
    figure = Figure(figsize=(6 * len(cases), 4.5), layout="constrained")
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        counts = [row.syncs for row in case.rows]
        for key, style, label in (("tpot_s", "o", "measured"), ("silent_tpot_s", "x", "all-reduces send nothing")):
            axes.plot(counts, [1000 * getattr(row, key) for row in case.rows], style, label=label)
        ends = [0, max(counts)]
        if case.compute_s is not None:
            line = [1000 * (case.compute_s + n * case.all_reduce_s) for n in ends]
            axes.plot(ends, line, "-", color="tab:blue", linewidth=1, label="compute + syncs x all-reduce")
        axes.axhline(1000 * case.bound_s, color="0.4", linestyle=":", label="memory-bandwidth bound")
        at = (1, case.batch_size, case.prompt)
        alone = next((c for c in table if (c.tp_size, c.batch_size, c.prompt) == at), None)
        if alone:
            one = 1000 * alone.rows[0].tpot_s
            axes.axhline(one, color="tab:green", linestyle="--", label="one process, all cores")
        title = f"tp_size {case.tp_size}, batch {case.batch_size}, prompt {case.prompt}"
        if case.added_delay_s:
            title += f", all-reduces of {1e6 * case.added_delay_s:.0f} us at least"
        axes.set(xlabel="sync points in a forward pass", ylabel="time per token (ms)", title=title, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
