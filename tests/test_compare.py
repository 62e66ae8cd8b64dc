"""compare.py on logs that the training code's own writer made, and on the recorded ones."""

import csv
from pathlib import Path

import pytest
from scipy import stats

import compare
from run_log import RunLog, step_line

RECORDED = sorted((Path(__file__).parents[1] / "results").glob("*/*/log.txt"))
ARCHITECTURES = {"2": "baseline", "1": "spd"}


def make(folder, name, pattern, losses, n_shard=2, max_iters=20, n_params=609344, hidden=0, dtype="float32", **changes):
    """A run's folder with the evaluations `losses` at steps 0, 10, 20 ..."""
    architecture = ARCHITECTURES.get(pattern[0], "grouped") if len(set(pattern)) == 1 else "grouped"
    config = {"architecture": architecture, "n_shard": n_shard, "max_iters": max_iters, "dataset": "text"}
    config |= {"block_size": 8, "n_layer": 12, "n_head": 4, "n_embd": 64, "learning_rate": 1e-3, "seed": 1}
    config |= {"dtype": None}  # the header says what that came to
    (folder / name).mkdir()
    log = RunLog(folder / name / "log.txt")
    header = {"architecture": architecture, "sync_pattern": pattern, "parameters": f"0.61M ({n_params})"}
    log.header({**header, "hidden syncs": hidden, "dtype": dtype, "tokens a step": 512, "config": config | changes})
    for i, loss in enumerate(losses):
        log.line(step_line(10 * i, loss, loss))
    log.close()


@pytest.fixture
def runs(tmp_path):
    make(tmp_path, "out-base", "2" * 12, [4.0, 3.0, 2.0])
    make(tmp_path, "out-spd", "1" * 12, [4.0, 3.1, 2.01])
    make(tmp_path, "out-g6", "01" * 6, [4.0, 3.2, 2.04])
    make(tmp_path, "out-g3", "000100010001", [4.0, 3.3, 2.10])
    return tmp_path


def load(folder):
    return compare.load_runs(sorted(folder.glob("out*")))


def test_table_and_verdict(runs):
    loaded = load(runs)
    assert [run.syncs for run in loaded] == [24, 12, 6, 3]
    lines = [line.split() for line in compare.table(loaded).splitlines()]
    assert lines[1] == "out-base Baseline 2 222222222222 24 0.0% 0.61M 0.017 2.0000 +0.00% 20".split()
    assert lines[2] == "out-spd SPD 2 111111111111 12 50.0% 0.61M 0.017 2.0100 +0.50% 20".split()
    assert lines[3] == "out-g6 Grouped-6 2 010101010101 6 75.0% 0.61M 0.017 2.0400 +2.00% 20".split()
    assert lines[4] == "out-g3 Grouped-3 2 000100010001 3 87.5% 0.61M 0.017 2.1000 +5.00% 20".split()
    assert "within 2.1% of the baseline: 6 (Grouped-6, +2.00%" in compare.verdict(loaded, 2.1)
    assert "within 0.6% of the baseline: 12 (SPD" in compare.verdict(loaded, 0.6)
    assert "no variant is within 0.1%" in compare.verdict(loaded, 0.1)
    assert compare.warnings(loaded) == []


def test_unfinished_runs_are_marked_and_do_not_decide(runs):
    make(runs, "out-g2", "000001000001", [4.0, 2.9])
    make(runs, "out-new", "000000000001", [])
    loaded = load(runs)
    text = compare.table(loaded)
    assert "-3.33% at 10*" in text and "10 of 20*" in text and "0 of 20*" in text and "unfinished" in text
    assert "3 (Grouped-3, +5.00%, 87.5% fewer syncs) (2 unfinished not counted)" in compare.verdict(loaded, 6)


def test_a_log_that_is_being_written(runs):
    with open(runs / "out-spd" / "log.txt", "a") as file:
        file.write("step 30: train loss 1.")
    assert load(runs)[1].losses == {0: 4.0, 10: 3.1, 20: 2.01} and load(runs)[1].deviation is None


def test_seeds_are_one_line(runs):
    """Mean, standard deviation, and the margin against the same interval from scipy."""
    make(runs, "out-base-2", "2" * 12, [4.0, 3.0, 2.02], seed=2)
    make(runs, "out-base-3", "2" * 12, [4.0, 3.0, 1.98], seed=3)
    make(runs, "out-spd-2", "1" * 12, [4.0, 3.0, 2.05], seed=2)
    loaded = load(runs)
    base, spd, g6, _ = loaded
    assert [len(arm.seeds) for arm in loaded] == [3, 2, 1, 1] and compare.warnings(loaded) == []
    assert base.losses[20] == pytest.approx(2.0) and base.deviation == pytest.approx(0.02)
    assert spd.losses[20] == pytest.approx(2.03) and spd.deviation == pytest.approx(0.04 / 2**0.5)
    deviation, freedom = compare.noise(loaded)
    pooled = (2 * 0.01**2 + (0.04 / 2**0.5 / 2.03) ** 2) / 3
    assert freedom == 3 and deviation == pytest.approx(100 * pooled**0.5)
    half = stats.t.interval(0.95, 3, scale=deviation * (1 / 2 + 1 / 3) ** 0.5)[1]
    assert compare.gap(spd, loaded).percent == pytest.approx(1.5) and compare.gap(spd, loaded).margin == pytest.approx(
        half
    )
    assert compare.gap(g6, loaded).margin > half and compare.gap(base, loaded).margin is None
    lines = compare.table(loaded).splitlines()
    make(runs, "out-base-4", "2" * 12, [4.0], seed=4)  # has just begun
    assert load(runs)[0].losses == base.losses and "3 of 4" in compare.table(load(runs))
    assert lines[1].split()[:4] == ["out-base", "and", "2", "more"] and f"+1.50%  {half:.2f}%" in lines[2]
    compare.draw(loaded, runs / "figure.png", 2)


def test_an_equal_variance_t_test_agrees(tmp_path):
    """Two arms alone: the interval is the one that scipy's own t-test gives."""
    base, spd = [2.0, 2.03, 1.99], [2.05, 2.02, 2.08]
    for seed, (a, b) in enumerate(zip(base, spd, strict=True)):
        make(tmp_path, f"out-base-{seed}", "2" * 12, [4.0, 3.0, a], seed=seed)
        make(tmp_path, f"out-spd-{seed}", "1" * 12, [4.0, 3.0, b], seed=seed)
    arms = load(tmp_path)
    low, high = stats.ttest_ind(spd, base).confidence_interval(0.95)
    assert compare.gap(arms[1], arms).margin / 100 * arms[0].losses[20] == pytest.approx((high - low) / 2, rel=0.02)


def test_sizes_controls_and_learning_rates(runs):
    """A gap is to the deep baseline of the own size at its best learning rate; a control is no baseline."""
    make(runs, "out-base-lr", "2" * 12, [4.0, 3.0, 1.95], learning_rate=2e-3)
    make(runs, "out-control", "22", [4.0, 3.0, 1.9], n_params=615000, n_layer=2, n_embd=160)
    make(runs, "out-big", "2" * 12, [4.0, 3.0, 1.5], n_params=5_000_000, n_embd=192, max_iters=40)
    make(runs, "out-big-spd", "1" * 12, [4.0, 3.0, 1.53], n_params=5_010_000, n_embd=192, max_iters=40)
    make(runs, "out-ladder", "2" * 12, [4.0, 3.0, 2.0], hidden=23, overlap="ladder")
    loaded = load(runs)
    by_name = {arm.names[0]: arm for arm in loaded}
    assert by_name["out-ladder"].variant == "Baseline ladder"
    gaps = {name: compare.gap(arm, loaded) for name, arm in by_name.items()}
    assert gaps["out-spd"].percent == pytest.approx(100 * (2.01 / 1.95 - 1))
    assert gaps["out-control"].percent == pytest.approx(100 * (1.9 / 1.95 - 1))
    assert gaps["out-big-spd"].percent == pytest.approx(2) and not gaps["out-big-spd"].final
    text = compare.verdict(loaded, 50)
    assert "12x64, n_shard 2: the fewest syncs within 50% of the baseline: 1 and 23 hidden (Baseline ladder" in text
    assert "12x192, n_shard 2: can't say yet: the baseline out-big has not finished" in text
    table = compare.table(loaded).splitlines()
    assert "hidden" in table[0] and "lr" in table[0].split() and "size" in table[0].split()
    assert compare.warnings(loaded) == ["warning: the runs differ in learning_rate: 0.001, 0.002"]
    compare.draw(loaded, runs / "figure.png", 2)


def test_when_nothing_can_be_said(tmp_path):
    make(tmp_path, "out-spd", "1" * 12, [4.0, 3.1, 2.01])
    assert "no baseline among the runs" in compare.verdict(load(tmp_path), 2)
    make(tmp_path, "out-base", "2" * 12, [4.0, 3.0])
    assert "the baseline out-base has not finished" in compare.verdict(load(tmp_path), 2)
    make(tmp_path, "out-base2", "2" * 12, [4.0, 3.0, 2.0])
    assert "2 baselines among the runs" in compare.verdict(load(tmp_path), 2)


def test_each_n_shard_has_its_own_baseline(runs):
    make(runs, "out-base4", "2" * 12, [4.0, 3.0, 1.9], n_shard=4)
    make(runs, "out-spd4", "1" * 12, [4.0, 3.0, 2.01], n_shard=4)
    loaded = load(runs)
    gaps = {run.names[0]: compare.gap(run, loaded).percent for run in loaded}
    assert gaps["out-spd"] == pytest.approx(0.5) and gaps["out-spd4"] == pytest.approx(100 * (2.01 / 1.9 - 1))
    assert len(compare.verdict(loaded, 2).splitlines()) == 2


def test_each_float_type_has_its_own_baseline(runs):
    for seed, loss in ((1, 1.9), (2, 1.94)):
        make(runs, f"out-half-base{seed}", "2" * 12, [4.0, 3.0, loss], dtype="bfloat16", seed=seed)
    make(runs, "out-half-spd", "1" * 12, [4.0, 3.0, 2.01], dtype="bfloat16")
    loaded = load(runs)
    gaps = {run.names[0]: compare.gap(run, loaded).percent for run in loaded}
    assert gaps["out-spd"] == pytest.approx(0.5) and gaps["out-half-spd"] == pytest.approx(100 * (2.01 / 1.92 - 1))
    assert "dtype" in compare.table(loaded).split("\n")[0].split()
    assert "warning: the runs differ in dtype: bfloat16, float32" in compare.warnings(loaded)


def test_nan_is_never_within_the_tolerance(runs):
    make(runs, "out-nan", "000000000001", [4.0, float("nan"), float("nan")])
    loaded = load(runs)
    assert "3 (Grouped-3" in compare.verdict(loaded, 50) and "nan" in compare.table(loaded)
    compare.draw(loaded, runs / "figure.png", 2)


def test_settings_that_differ_are_named(runs):
    make(runs, "out-g2", "000001000001", [4.0, 2.9, 2.0], learning_rate=2e-3)
    assert compare.warnings(load(runs)) == ["warning: the runs differ in learning_rate: 0.001, 0.002"]


def test_command_writes_figure_and_csv(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    assert compare.main(["--csv=table.csv", "--tolerance=2.1"]) == 0
    assert "fewest syncs within 2.1%" in capsys.readouterr().out
    png = (runs / "comparison.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 20000
    rows = list(csv.DictReader(open(runs / "table.csv")))
    assert [(row["run"], int(row["syncs"]), float(row["val_loss"])) for row in rows][:2] == [
        ("out-base", 24, 2.0),
        ("out-spd", 12, 2.01),
    ]
    assert float(rows[3]["gap_percent"]) == pytest.approx(5)


@pytest.mark.parametrize("arguments", [["nowhere"], [], ["text"], ["out-base", "--png=no/such/folder.png"]])
def test_mistakes_end_with_one_line(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("not a log\n")
    if arguments[:1] == ["out-base"]:
        make(tmp_path, "out-base", "2" * 12, [4.0])
    assert compare.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("folder", sorted({path.parents[1] for path in RECORDED}), ids=lambda p: p.name)
def test_recorded_logs(folder, tmp_path):
    """The logs that the documents cite: complete, comparable, and their table stands in the document."""
    loaded = compare.load_runs(sorted(path.parent for path in folder.glob("*/log.txt")))
    assert len(loaded) >= 4 and all(run.finished for run in loaded)
    # tuned, where they differ in the one, and with a baseline of each in the other
    assert all("learning_rate" in line or "dtype" in line for line in compare.warnings(loaded))
    assert all(compare.baseline_of(run, loaded).dtype == run.dtype for run in loaded)
    text = compare.table(loaded)
    assert text in (folder.parents[1] / "EXPERIMENT_SUMMARY.md").read_text(encoding="utf-8")
    compare.draw(loaded, tmp_path / "figure.png", 2)
