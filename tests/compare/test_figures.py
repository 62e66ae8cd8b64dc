"""What the figure shows, and of what it can be drawn."""

import itertools

import pytest
from make_runs import load, make, row, write_latency

from reduced_sync.compare import figures
from reduced_sync.compare.figures import draw_comparison
from reduced_sync.compare.frontier import add_measured
from reduced_sync.compare.report import verdict
from reduced_sync.compare.runs import gap_of


def test_lines_of_a_figure(runs, monkeypatch):
    """A name that does not tell the pattern has it behind it, and only evenly spread syncs are joined.

    What was evaluated on other windows is no point beside the others.
    """
    from matplotlib.axes import Axes

    for name, pattern, loss in (("early", "222000000001", 2.0), ("late", "000001111112", 1.9)):
        make(runs, f"out-{name}", pattern, [4.0, 3.0, loss])
    make(runs, "out-other", "000001000001", [4.0, 3.0, 2.0], eval_iters=0)
    curves, joined, notes = [], [], []
    plot, write = Axes.plot, Axes.text

    def remember_plot(axes, x, y, *style, label=None, **keys):
        curves.append(label) if label else joined.append(x)
        return plot(axes, x, y, *style, label=label, **keys)

    def remember_note(axes, x, y, text, **keys):
        notes.append(text)
        return write(axes, x, y, text, **keys)

    monkeypatch.setattr(Axes, "plot", remember_plot)
    monkeypatch.setattr(Axes, "text", remember_note)
    draw_comparison(load(runs), runs / "figure.png", 2)
    assert {"222000000001, 7 syncs", "000001111112, 8 syncs", "grouped-3, 3 syncs"} < set(curves)
    assert "grouped-2, 2 syncs, other windows or data" in curves
    assert joined == [[24, 12, 6, 3]] and sorted(notes) == ["000001111112", "222000000001"]
    assert "8 (000001111112, -5.13%" in verdict(load(runs), -2)


def test_the_frontier_that_is_drawn_is_the_tables(runs, monkeypatch):
    """By the noise of all arms, those without a time included."""
    arms, asked = load(runs), []
    add_measured(arms, write_latency(runs, row(0.1, "1" * 12)), None, None)
    monkeypatch.setattr(figures, "on_frontier", lambda arm, others, condition: asked.append(others) or True)
    draw_comparison(arms, runs / "figure.png", 2)
    assert asked and all(others == arms for others in asked)


def test_labels_of_thirty_arms_cover_neither_one_another_nor_a_point(tmp_path, monkeypatch):
    """And the legend of the curves names colors and dashes in the place of thirty lines."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    rows = []
    for i, (pattern, n_shard) in enumerate(itertools.product(map("{:04b}1".format, range(15)), (2, 4))):
        make(tmp_path, f"out-{i}", pattern, [4.0, 3.0, 2 + 0.01 * (i % 7)], n_shard=n_shard)
        rows.append(row(0.01 + 0.001 * (i % 5) if i else 0.003, pattern, n_shard=n_shard))  # not far from one another
    arms = load(tmp_path)
    add_measured(arms, write_latency(tmp_path, *rows), None, None)
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    draw_comparison(arms, tmp_path / "figure.png", 2)
    drawn[0].draw_without_rendering()
    curves, _, times = drawn[0].axes
    assert len(curves.get_legend().get_texts()) == 4 + 2  # 1 to 4 syncs, two n_shard
    assert len(times.texts) == 30
    boxes = [Text.get_window_extent(text) for text in times.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    points = times.transData.transform([(1000 * arm.tpots[s], arm.losses[20]) for arm in arms for s in arm.tpots])
    assert not any(box.contains(*point) for box in boxes for point in points)
    assert all(times.bbox.x0 - 1 < box.x0 and box.x1 < times.bbox.x1 + 1 for box in boxes)


def test_a_text_that_was_memorised(tmp_path):
    """Losses of 0.0000 have a gap of nothing, or one without end, and a figure."""
    make(tmp_path, "out-base", "22", [4.0, 1.0, 0.0])
    make(tmp_path, "out-spd", "11", [4.0, 1.0, 0.0])
    make(tmp_path, "out-late", "01", [4.0, 1.0, 0.5])
    loaded = load(tmp_path)
    assert [gap_of(run, loaded).percent for run in loaded] == [0.0, 0.0, float("inf")]
    draw_comparison(loaded, tmp_path / "figure.png", 2.0)


@pytest.mark.filterwarnings("error")
def test_a_run_that_has_not_evaluated_is_drawn_without_a_warning(tmp_path):
    make(tmp_path, "out-base", "22", [])
    draw_comparison(load(tmp_path), tmp_path / "figure.png", 2.0)
