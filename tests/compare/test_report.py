"""The table, the verdicts and the warnings on arms."""

import csv
import math

import pytest
from make_runs import UNTUNED, diverge, load, make, tune
from scipy import stats

from reduced_sync.compare.figures import draw_comparison
from reduced_sync.compare.report import fastest, judge, table, verdict, warnings, write_csv
from reduced_sync.compare.runs import gap_of, load_runs
from reduced_sync.train.experiment import MODERN


def test_table_and_verdict(runs):
    loaded = load(runs)
    assert [run.syncs for run in loaded] == [24, 12, 6, 3]
    lines = [line.split() for line in table(loaded, 2).splitlines()]
    assert lines[1] == "out-base baseline 2 24 0.0% 0.61M 17 2.0000 +0.00% - 20".split()
    assert lines[2] == "out-spd spd 2 12 50.0% 0.61M 17 2.0100 +0.50% not bracketed 20".split()
    assert lines[3] == "out-g6 grouped-6 2 6 75.0% 0.61M 17 2.0400 +1.98% not bracketed 20".split()
    assert lines[4] == "out-g3 grouped-3 2 3 87.5% 0.61M 17 2.1000 +4.88% not bracketed 20".split()
    start = f"n_shard 2: {UNTUNED}the fewest syncs within 2.1% of"
    assert verdict(loaded, 2.1).startswith(f"{start} the baseline: 6 (grouped-6, +1.98%")
    assert "within 0.6% of the baseline: 12 (spd" in verdict(loaded, 0.6)
    assert "no variant is within 0.1%" in verdict(loaded, 0.1)
    assert warnings(loaded) == []


def test_unfinished_runs_are_marked_and_do_not_decide(runs):
    make(runs, "out-g2", "000001000001", [4.0, 2.9])
    make(runs, "out-new", "000000000001", [])
    loaded = load(runs)
    text = table(loaded, 2)
    assert "-3.39% at 10*" in text and "10 of 20*" in text and "0 of 20*" in text and "unfinished" in text
    assert "3 (grouped-3, +4.88%, 87.5% fewer syncs) (not counted: 2 unfinished)" in verdict(loaded, 6)


@pytest.mark.parametrize(
    ("losses", "expected", "line"),
    [
        ([2.01, 2.011], "within", "n_shard 2: the fewest syncs within 2% of the baseline: 2 (spd, +0.52%, 50.0% fewer"),
        ([2.2, 2.203], "outside", "n_shard 2: no variant is within 2% of the baseline"),
        ([2.00, 2.09], "open", "no variant is known to be within 2% of the baseline; spd (+2.20%) is too close"),
        ([2.00, 2.09], "open", "; spd (+2.20%) is too close to 2% to call: over 100 seeds would settle it"),
        ([2.02, 2.08], "open", "; spd (+2.46%) is too close to 2% to call: 81 seeds would settle it"),
    ],
)
def test_a_verdict_is_by_the_interval(tmp_path, losses, expected, line):
    tune(tmp_path, "out-base", "22", [4.0, 3.0, 2.0])
    make(tmp_path, "out-base-2", "22", [4.0, 3.0, 2.0], seed=2)
    tune(tmp_path, "out-spd", "11", [4.0, 3.0, losses[0]])
    make(tmp_path, "out-spd-2", "11", [4.0, 3.0, losses[1]], seed=2)
    arms = load(tmp_path)
    found = gap_of(arms[1], arms)
    assert judge(arms[1], found, arms, 2) == expected and line in verdict(arms, 2)
    if expected == "open":
        needed = found.seeds_needed(2)
        half = [stats.t.ppf(0.975, n - 1) * found.deviation / n**0.5 for n in (needed - 1, needed)] if needed else []
        assert not half or half[1] < abs(found.percent - 2) <= half[0]
    for arm, seconds in zip(arms, (0.2, 0.1), strict=True):
        arm.tpots["c"] = seconds
    assert ("; spd" in fastest(arms, 2)) == (expected == "open")


def test_without_a_verdict(tmp_path):
    """One seed, an unbracketed baseline, an unfinished run: why, and no answer."""
    tune(tmp_path, "out-base", "22", [4.0, 3.0, 2.0])
    tune(tmp_path, "out-spd", "11", [4.0, 3.0, 2.01])
    arms = load(tmp_path)
    assert judge(arms[1], gap_of(arms[1], arms), arms, 2) == "one seed"
    start = "n_shard 2: no verdict, because no two arms share two seeds, so the noise is not known. So far: "
    assert verdict(arms, 2) == f"{start}the fewest syncs within 2% of the baseline: 2 (spd, +0.50%, 50.0% fewer syncs)"
    for name in ("out-base-half", "out-base-twice"):
        (tmp_path / name / "log.txt").unlink()
    arms, _ = load_runs(path.parent for path in sorted(tmp_path.glob("*/log.txt")))
    assert judge(arms[1], gap_of(arms[1], arms), arms, 2) == "not bracketed"


def test_when_nothing_can_be_said(tmp_path):
    make(tmp_path, "out-spd", "1" * 12, [4.0, 3.1, 2.01])
    assert "found no baseline of 12 layers; exactly one is needed" in verdict(load(tmp_path), 2)
    make(tmp_path, "out-base", "2" * 12, [4.0, 3.0])
    assert "the baseline out-base has not finished" in verdict(load(tmp_path), 2)
    make(tmp_path, "out-base2", "2" * 12, [4.0, 3.0, 2.0], dropout=0.1)
    assert "found 2 baselines of 12 layers; exactly one" in verdict(load(tmp_path), 2)


def test_an_arm_of_which_a_seed_diverged_has_no_verdict_but_that(tmp_path):
    """It must not be judged by the seeds that are left."""
    tune(tmp_path, "out-base", "22", [4.0, 3.0, 2.0])
    tune(tmp_path, "out-spd", "11", [4.0, 3.0, 2.01])
    for name, pattern in (("base", "22"), ("spd", "11")):
        make(tmp_path, f"out-{name}-2", pattern, [4.0, 3.0, 2.0], seed=2)
    diverge(tmp_path, "out-spd-3", "11", seed=3)
    arms = load(tmp_path)
    assert judge(arms[1], gap_of(arms[1], arms), arms, 2) == "diverged"
    assert verdict(arms, 2).endswith("no variant is known to be within 2% of the baseline (not counted: 1 diverged)")
    (tmp_path / "out-spd-3" / "log.txt").unlink()
    (tmp_path / "out-spd-3").rmdir()
    diverge(tmp_path, "out-base-3", "22", seed=3)
    arms = load(tmp_path)
    assert judge(arms[1], gap_of(arms[1], arms), arms, 2) == "baseline diverged"
    assert verdict(arms, 2).startswith("n_shard 2: no verdict, because a seed of the baseline diverged. So far: the")


def test_runs_that_are_too_short_give_no_answer(runs, tmp_path, monkeypatch):
    """Below 10 tokens a parameter the verdict and the figure say so."""
    from matplotlib.axes import Axes

    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda axes, title, *_, **__: titles.append(title))
    draw_comparison(load(runs), runs / "figure.png", 2)
    assert "too short" not in verdict(load(runs), 2) and not any("too short" in title for title in titles)
    make(runs, "out-short", "1" * 12, [4.0, 3.0, 1.0], gradient_accumulation_steps=200)
    loaded = load(runs)
    start = "n_shard 2: no verdict, because the runs are too short: at least 10 tokens per parameter are needed; "
    start += UNTUNED.removeprefix("no verdict, because ")
    assert verdict(loaded, 2.1).startswith(f"{start}the fewest syncs within 2.1% of the baseline: 6 (grouped-6")
    assert verdict(loaded, -70).startswith(f"{start}no variant is within")
    draw_comparison(loaded, runs / "figure.png", 2)
    assert titles[-1] == "Loss against syncs\ntoo short to tell: 0.84 tokens per parameter"


def test_each_family_of_blocks_is_compared_with_its_own_baseline(tmp_path):
    modern = MODERN | dict(n_kv_head=2)
    make(tmp_path, "out-base", "22", [4.0, 3.0, 2.0])
    make(tmp_path, "out-spd", "11", [4.0, 3.0, 2.02])
    make(tmp_path, "out-modern-base", "22", [4.0, 3.0, 1.9], **modern)
    make(tmp_path, "out-modern-spd", "11", [4.0, 3.0, 1.957], **modern)
    arms = load(tmp_path)
    assert {arm.names[0]: round(gap_of(arm, arms).percent, 6) for arm in arms} == {
        "out-base": 0,
        "out-spd": round(100 * math.log(1.01), 6),
        "out-modern-base": 0,
        "out-modern-spd": round(100 * math.log(1.03), 6),
    }
    assert warnings(arms) == []
    lines = verdict(arms, 2).splitlines()
    assert lines[0].startswith(f"2x64, n_shard 2: {UNTUNED}the fewest syncs within 2% of the baseline: 2 (spd, +1.00%")
    assert lines[1] == f"2x64 modern, n_shard 2: {UNTUNED}no variant is within 2% of the baseline"


def test_names_that_break_no_table(tmp_path):
    """A folder's name is what a user made it, even of bytes that are no text."""
    make(tmp_path, "out\n| base", "2" * 12, [4.0, 3.0, 2.0])
    make(tmp_path, "out,\udcff", "1" * 12, [4.0, 3.1, 2.01])
    loaded = load(tmp_path)
    assert len(table(loaded, 2).split("\n")) == 3
    write_csv(loaded, tmp_path / "table.csv", 2)
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        assert [row[0] for row in csv.reader(file)] == ["run", "out | base", "out,\\udcff"]


# --- runs that are not comparable


@pytest.mark.parametrize(
    "changes, names",
    [
        (dict(learning_rate=2e-3, min_lr=2e-4), ["learning_rate: 0.001, 0.002"]),
        (dict(min_lr=1e-5), ["min_lr / learning_rate: 0.01, 0.1"]),
        (dict(max_iters=40, lr_decay_iters=40), ["max_iters: 20, 40"]),
        (dict(gradient_accumulation_steps=2000), ["tokens a step: 256000, 512000"]),
        (
            dict(block_size=16, batch_size=8),
            ["block_size: 16, 8", "evaluation: 40 windows of 16 tokens, 80 windows of 8"],
        ),
        (dict(batch_size=8, gradient_accumulation_steps=8000, eval_iters=10), []),  # the same sequences
        (dict(out_dir="elsewhere", tp_size=2, device="cuda", compile=True, log_interval=3), []),
        (dict(bias=True), []),  # the other logs do not say it
    ],
    ids=str,
)
def test_settings_that_differ_are_named(runs, changes, names):
    make(runs, "out-g2", "000001000001", [4.0, 2.9, 2.0], **changes)
    lines = warnings(load(runs))
    assert len(lines) == len(names)
    for line, name in zip(lines, names, strict=True):
        assert line.startswith(f"warning: the runs differ in {name}")


@pytest.mark.parametrize("key, values", [("warmup_iters", (5, 7)), ("dropout", (0.0, 0.1)), ("weight_decay", (0.1, 0))])
@pytest.mark.parametrize("seed", [1, 2])
def test_another_schedule_or_regularisation_is_named_and_no_seed(tmp_path, key, values, seed):
    for name, pattern, value in (("base", "22", values[0]), ("spd", "11", values[0]), ("other", "11", values[1])):
        make(tmp_path, f"out-{name}", pattern, [4.0, 3.0, 2.0], **{key: value}, seed=seed if name == "other" else 1)
    loaded = load(tmp_path)
    assert len(loaded) == 3
    assert f"warning: the runs differ in {key}: {', '.join(map(str, sorted(values)))}" in warnings(loaded)


def test_from_scratch_and_from_pretrained_weights(runs):
    make(runs, "out-base-2", "2" * 12, [4.0, 3.0, 2.0], seed=2, init_from="scratch")
    make(runs, "out-base-3", "2" * 12, [4.0, 3.0, 1.0], seed=3, init_from="gpt2", resumed=dict(init_from="resume"))
    assert "warning: the runs differ in init_from: gpt2, scratch" in warnings(load(runs))


OTHERS = [dict(eval_iters=10), dict(eval_iters=0), dict(batch_size=8, gradient_accumulation_steps=8000)]
OTHERS += [dict(block_size=16), dict(dataset="other", data=None), dict(data="beef")]


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_other_windows_or_data_are_never_compared(tmp_path, other):
    """Not as seeds of one line, not as a gap, in no verdict; with a baseline of their own they are."""
    make(tmp_path, "out-base", "22", [4.0, 3.0, 2.0], data="cafe")
    make(tmp_path, "out-spd", "11", [4.0, 3.0, 1.0], seed=2, **dict(data="cafe") | other)
    loaded = load(tmp_path)
    assert [gap_of(arm, loaded) is None for arm in loaded] == [False, True]
    reason = "can't say: evaluated on other windows or data than the baseline"
    assert verdict(loaded, 2) == f"n_shard 2: {reason}"
    assert any(line.endswith(": no gap between them") for line in warnings(loaded))
    draw_comparison(loaded, tmp_path / "figure.png", 2)
    make(tmp_path, "out-spd-2", "11", [4.0, 3.0, 2.02], data="cafe")
    loaded = load(tmp_path)
    assert [len(arm.seed_losses) for arm in loaded] == [1, 1, 1]
    line = "the fewest syncs within 2% of the baseline: 2 (spd, +1.00%, 50.0% fewer syncs)"
    assert verdict(loaded, 2) == f"n_shard 2: {UNTUNED}{line} (not counted: 1 evaluated on other windows or data)"
    make(tmp_path, "out-base-2", "22", [4.0, 3.0, 0.99], **dict(data="cafe") | other)
    gaps = {arm.names[0]: gap_of(arm, load(tmp_path)).percent for arm in load(tmp_path)}
    assert gaps["out-spd-2"] == pytest.approx(100 * math.log(1.01))
    assert gaps["out-spd"] == pytest.approx(100 * math.log(1 / 0.99))
    draw_comparison(load(tmp_path), tmp_path / "figure.png", 2)


@pytest.mark.parametrize("data", [None, "unknown"])
def test_data_whose_content_is_not_known_is_that_of_its_name(tmp_path, data):
    make(tmp_path, "out-a", "22", [4.0, 3.0, 2.0], data=data)
    make(tmp_path, "out-b", "22", [4.0, 3.0, 2.1], seed=2, data="cafe")
    (arm,) = loaded = load(tmp_path)
    assert len(arm.seed_losses) == 2 and warnings(loaded) == []
    make(tmp_path, "out-c", "22", [4.0, 3.0, 2.1], seed=3, data="beef")  # surely not that of the first two
    make(tmp_path, "out-d", "22", [4.0, 3.0, 2.1], seed=3, data="cafe", dataset="a copy of text")
    assert [len(arm.seed_losses) for arm in load(tmp_path)] == [3, 1]


def test_a_run_that_went_on_with_other_settings(runs):
    """It is named, and no seed of those that did not; what makes no difference is not named."""
    make(runs, "out-base-2", "2" * 12, [4.0, 3.0, 2.0], seed=2, warmup_iters=2, resumed=dict(warmup_iters=1))
    make(runs, "out-base-3", "2" * 12, [4.0, 3.0, 2.0], seed=3, resumed=dict(out_dir="x", init_from="resume"))
    loaded = load(runs)
    assert sorted(len(arm.seed_losses) for arm in loaded) == [1, 1, 1, 1, 2]
    named = [line for line in warnings(loaded) if "resumed" in line]
    assert named == ["warning: out-base-2 was resumed with other settings: warmup_iters 2 -> 1"]
