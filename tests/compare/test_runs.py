"""Runs as their logs tell of them: seeds, learning rates, baselines, gaps."""

import math
import re
import statistics

import numpy as np
import pytest
from launch import ROOT
from make_runs import diverge, load, make, tune
from scipy import stats

from reduced_sync.compare.figures import draw_comparison
from reduced_sync.compare.frontier import on_frontier
from reduced_sync.compare.report import judge, table, verdict, warnings
from reduced_sync.compare.runs import baseline_of, best_rate, gap_of, load_runs, noise

# of training; drop_syncs.py's have another form
RECORDED = sorted(log for log in (ROOT / "results").glob("*/*/log.txt") if "\nstep 0: " in log.read_text())


def test_a_log_that_is_being_written(runs):
    with open(runs / "out-spd" / "log.txt", "a") as file:
        file.write("step 30: train loss 1.")
    assert load(runs)[1].losses == {0: 4.0, 10: 3.1, 20: 2.01} and load(runs)[1].deviation is None


def test_seeds_are_one_line(runs):
    """Mean, standard deviation, and the gap of the seeds that both have, with the interval of scipy's paired test."""
    base, spd = {1: 2.0, 2: 2.02, 3: 1.98}, {1: 2.01, 2: 2.05}
    for seed in (2, 3):
        make(runs, f"out-base-{seed}", "2" * 12, [4.0, 3.0, base[seed]], seed=seed)
    make(runs, "out-spd-2", "1" * 12, [4.0, 3.0, spd[2]], seed=2)
    loaded = load(runs)
    assert [len(arm.seed_losses) for arm in loaded] == [3, 2, 1, 1] and warnings(loaded) == []
    assert loaded[0].losses[20] == pytest.approx(2.0) and loaded[0].deviation == pytest.approx(0.02)
    assert loaded[1].losses[20] == pytest.approx(2.03) and loaded[1].deviation == pytest.approx(0.04 / 2**0.5)
    logs = [[100 * math.log(losses[seed]) for seed in (1, 2)] for losses in (spd, base)]
    low, high = stats.ttest_rel(*logs).confidence_interval(0.95)
    found = gap_of(loaded[1], loaded)
    assert (found.percent - found.margin, found.percent + found.margin) == pytest.approx((low, high))
    assert gap_of(loaded[2], loaded).margin == pytest.approx(2**0.5 * found.margin)  # one seed, the noise of the others
    assert gap_of(loaded[0], loaded).margin is None
    lines = table(loaded, 2).splitlines()
    make(runs, "out-base-4", "2" * 12, [4.0], seed=4)  # has just begun
    assert load(runs)[0].losses == loaded[0].losses and "3 of 4" in table(load(runs), 2)
    assert lines[1].split()[:4] == ["out-base", "and", "2", "more"]
    assert f"{found.percent:+.2f}%   {found.margin:.2f}%" in lines[2]
    draw_comparison(loaded, runs / "figure.png", 2)


def test_the_noise_is_what_a_mean_of_the_arm_and_of_the_seed_leave(tmp_path):
    """All gaps share the baseline's noise: arms that are added say less than as many independent ones would."""
    seeds = {"base": [2.0, 2.03, 1.99], "spd": [2.05, 2.02, 2.08], "one": [2.2, 2.25, 2.19]}
    for (name, losses), pattern in zip(seeds.items(), ("22", "11", "01"), strict=True):
        for seed, loss in enumerate(losses):
            make(tmp_path, f"out-{name}-{seed}", pattern, [4.0, 3.0, loss], seed=seed)
    values = 100 * np.log(list(seeds.values()))
    rest = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    pair = math.sqrt(2 * (rest**2).sum() / 4)
    assert noise(load(tmp_path)) == (pytest.approx(pair), 4)
    found = gap_of(load(tmp_path)[2], load(tmp_path))
    assert found.margin == pytest.approx(stats.t.ppf(0.975, 4) * pair / 3**0.5)
    more = [stats.t.ppf(0.975, 4 + n - 3) * pair / n**0.5 for n in range(4, 101)]  # of this arm and the baseline alone
    assert found.seeds_needed(9) == 4 + next(i for i, margin in enumerate(more) if margin < abs(found.percent - 9))
    for seed, loss in ((7, 2.3), (8, 2.0)):  # which no other arm has
        make(tmp_path, f"out-spd-{seed}", "11", [4.0, 3.0, loss], seed=seed)
    assert noise(load(tmp_path)) == (pytest.approx(pair), 4)
    assert "5 (3 paired)" in table(load(tmp_path), 2)


def test_seeds_that_no_other_run_has_are_no_pairs(runs):
    make(runs, "out-g2", "000001000001", [4.0, 3.0, 2.2], seed=7)
    loaded = load(runs)
    found = gap_of(loaded[-1], loaded)
    assert found.percent == pytest.approx(100 * math.log(1.1)) and found.margin is None and found.pairs == 0
    tune(runs, "out-base-again", "2" * 12, [4.0, 3.0, 2.0], seed=9)
    tune(runs, "out-g2-again", "000001000001", [4.0, 3.0, 2.2], seed=10)
    (g2,) = [arm for arm in load(runs) if arm.syncs == 2]
    assert judge(g2, gap_of(g2, load(runs)), load(runs), 2) == "other seeds"


def test_a_run_of_another_length_has_no_verdict(tmp_path):
    """Read at the last step that both have, its loss is that of a learning rate that has not fallen yet."""
    for seed in (1, 2):
        make_run = tune if seed == 1 else make
        make_run(tmp_path, f"out-base-{seed}", "22", [4.0, 3.0, 2.0 + seed / 100, 1.8, 1.5], max_iters=40, seed=seed)
        make_run(tmp_path, f"out-spd-{seed}", "11", [4.0, 3.0, 2.01 + seed / 100], seed=seed)
    _, spd = arms = load(tmp_path)
    found = gap_of(spd, arms)
    assert not found.final and found.step == 20 and judge(spd, found, arms, 2) == "other length"
    line = "because the baseline has a different max_iters. So far: no variant is known to be within"
    assert line in verdict(arms, 2) and "at 20*" in table(arms, 2) and "provisional" in table(arms, 2)
    for arm, seconds in zip(arms, (0.1, 0.2), strict=True):
        arm.tpots["c"] = seconds
    assert on_frontier(spd, arms, "c")


def test_a_baseline_is_of_the_own_size_and_as_deep_as_the_deepest_arm(tmp_path):
    make(tmp_path, "out-base", "22", [4.0, 3.0, 2.0])
    make(tmp_path, "out-big", "011", [4.0, 3.0, 1.9], n_params=5_000_000, n_embd=192)
    _, big = arms = load(tmp_path)
    assert gap_of(big, arms) is None
    line = "\n3x192, n_shard 2: can't say: found no baseline of 3 layers; exactly one is needed"
    assert verdict(arms, 2).endswith(line)
    make(tmp_path, "out-control", "2", [4.0, 3.0, 1.9], n_params=5_000_000, n_embd=330)
    assert [gap_of(arm, load(tmp_path)) is None for arm in load(tmp_path)] == [False, True, True]
    assert verdict(load(tmp_path), 2).endswith(line)


def test_an_arm_is_at_its_best_learning_rate(tmp_path):
    """One line an arm, bracketed where a worse rate stands on either side, at most twofold away."""
    tune(tmp_path, "out-base", "22", [4.0, 3.0, 2.0])
    make(tmp_path, "out-base-2", "22", [4.0, 3.0, 2.3], seed=2)  # more than the others with seed 1: still the best rate
    for rate, loss in ((1e-3, 2.1), (2e-3, 2.05), (4e-3, 2.02)):
        make(tmp_path, f"out-spd-{rate}", "11", [4.0, 3.0, loss], learning_rate=rate, min_lr=rate / 10)
    for rate, loss in ((1e-4, 2.1), (1e-3, 2.05), (1e-2, 2.1)):
        make(tmp_path, f"out-one-{rate}", "01", [4.0, 3.0, loss], learning_rate=rate, min_lr=rate / 10)
    base, *_ = loaded = load(tmp_path)
    assert [(arm.learning_rate, arm.bracketed) for arm in loaded] == [(1e-3, True), (4e-3, False), (1e-3, False)]
    assert [len(arm.arms_by_rate) for arm in loaded] == [3, 3, 3] and base.losses[20] == pytest.approx(2.15)
    lines = table(loaded, 2).splitlines()
    assert "0.001 to 0.004" in lines[2] and "not bracketed" in lines[2]
    assert warnings(loaded) == ["warning: the runs differ in learning_rate: 0.001, 0.004"]
    make(tmp_path, "out-spd-last", "11", [4.0, 3.0], learning_rate=8e-3, min_lr=8e-4)
    assert not load(tmp_path)[1].bracketed  # not yet
    (tmp_path / "out-spd-last" / "log.txt").unlink()
    (tmp_path / "out-spd-last").rmdir()
    diverge(tmp_path, "out-spd-last", "11", learning_rate=8e-3, min_lr=8e-4)
    assert load(tmp_path)[1].bracketed and load(tmp_path)[1].losses[20] == 2.02
    draw_comparison(load(tmp_path), tmp_path / "figure.png", 2)


def test_sizes_controls_and_learning_rates(runs):
    """A gap is to the deep baseline of the own size at its best learning rate; a control is no baseline."""
    make(runs, "out-base-lr", "2" * 12, [4.0, 3.0, 1.95], learning_rate=2e-3, min_lr=2e-4)
    make(runs, "out-control", "22", [4.0, 3.0, 1.9], n_params=615000, n_embd=160)
    make(runs, "out-big", "2" * 12, [4.0, 3.0, 1.5], n_params=5_000_000, n_embd=192, max_iters=40)
    make(runs, "out-big-spd", "1" * 12, [4.0, 3.0, 1.53], n_params=5_010_000, n_embd=192, max_iters=40)
    make(runs, "out-ladder", "2" * 12 + "+ladder", [4.0, 3.0, 2.0])
    loaded = load(runs)
    by_name = {arm.names[0]: arm for arm in loaded}
    assert by_name["out-ladder"].sync == "baseline+ladder"
    gaps = {name: gap_of(arm, loaded) for name, arm in by_name.items()}
    assert gaps["out-spd"].percent == pytest.approx(100 * math.log(2.01 / 1.95))
    assert gaps["out-control"].percent == pytest.approx(100 * math.log(1.9 / 1.95))
    assert gaps["out-big-spd"].percent == pytest.approx(100 * math.log(1.02)) and not gaps["out-big-spd"].final
    text = verdict(loaded, 50)
    assert "the fewest syncs within 50% of the baseline: 1 and 23 hidden (baseline+ladder" in text.splitlines()[0]
    assert "12x192, n_shard 2: can't say yet: the baseline out-big has not finished" in text
    lines = table(loaded, 2).splitlines()
    assert {"hidden", "lr", "size"} < set(lines[0].split())
    assert warnings(loaded) == ["warning: the runs differ in learning_rate: 0.001, 0.002"]
    draw_comparison(loaded, runs / "figure.png", 2)


def test_each_n_shard_has_its_own_baseline(runs):
    make(runs, "out-base4", "2" * 12, [4.0, 3.0, 1.9], n_shard=4)
    make(runs, "out-spd4", "1" * 12, [4.0, 3.0, 2.01], n_shard=4)
    loaded = load(runs)
    gaps = {run.names[0]: gap_of(run, loaded).percent for run in loaded}
    assert gaps["out-spd"] == pytest.approx(100 * math.log(1.005))
    assert gaps["out-spd4"] == pytest.approx(100 * math.log(2.01 / 1.9))
    assert len(verdict(loaded, 2).splitlines()) == 2
    make(runs, "out-control", "2" * 8, [4.0, 3.0, 1.95], n_params=615000, n_embd=80, n_shard=1)
    loaded = load(runs)
    assert gap_of(loaded[0], loaded).percent == pytest.approx(100 * math.log(1.95 / 1.9))  # none: to the best one


def test_each_float_type_has_its_own_baseline(runs):
    for seed, loss in ((1, 1.9), (2, 1.94)):
        make(runs, f"out-half-base{seed}", "2" * 12, [4.0, 3.0, loss], dtype="bfloat16", seed=seed)
    make(runs, "out-half-spd", "1" * 12, [4.0, 3.0, 2.01], dtype="bfloat16")
    loaded = load(runs)
    gaps = {run.names[0]: gap_of(run, loaded).percent for run in loaded}
    assert gaps["out-spd"] == pytest.approx(100 * math.log(1.005))
    assert gaps["out-half-spd"] == pytest.approx(100 * math.log(2.01 / 1.9))  # of the seed that both have
    assert "dtype" in table(loaded, 2).split("\n")[0].split()
    assert "warning: the runs differ in dtype: bfloat16, float32" in warnings(loaded)


def test_a_seed_that_diverged(runs):
    """Its arm has no deviation, is no noise, and never within a tolerance."""
    make(runs, "out-base-2", "2" * 12, [4.0, 3.0, 2.02], seed=2)
    make(runs, "out-spd-2", "1" * 12, [4.0, 3.0, float("nan")], seed=2)
    make(runs, "out-g6-2", "01" * 6, [4.0, 3.0, float("inf")], seed=2)
    make(runs, "out-g3-2", "000100010001", [4.0, 3.0, 2.14], seed=2)
    make(runs, "out-nan", "000000000001", [4.0, float("nan"), float("nan")])
    _, spd, g6, *_ = loaded = load(runs)
    assert spd.deviation is None and g6.deviation is None
    pairs = [100 * math.log(2.1 / 2.0), 100 * math.log(2.14 / 2.02)]
    assert noise(loaded) == (pytest.approx(statistics.stdev(pairs)), 1)
    assert "nan" in table(loaded, 2) and "inf" in table(loaded, 2) and "3 (grouped-3" in verdict(loaded, 50)
    draw_comparison(loaded, runs / "figure.png", 2)


@pytest.mark.parametrize("name", ["out-0", "out-z"])
def test_a_learning_rate_that_diverged_is_not_the_best(runs, name):
    """Where it came first, its nan was the baseline."""
    make(runs, name, "2" * 12, [4.0, 3.0, float("nan")], learning_rate=1.0)
    loaded = load(runs)
    assert {baseline_of(arm, loaded).names[0] for arm in loaded} == {"out-base"}


@pytest.mark.parametrize("folder", sorted({path.parents[1] for path in RECORDED}), ids=lambda p: p.name)
def test_recorded_logs(folder, tmp_path):
    """The logs that the documents cite: complete and comparable."""
    loaded, _ = load_runs(sorted(path.parent for path in folder.glob("*/log.txt")))
    assert len(loaded) >= 4 and all(run.finished for run in loaded)
    # tuned, where they differ in the one, and with a baseline of each in the other
    assert all("learning_rate" in line or "dtype" in line for line in warnings(loaded))
    assert all(baseline_of(run, loaded).dtype == run.dtype for run in loaded)
    draw_comparison(loaded, tmp_path / "figure.png", 2)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (dict(n_params=0), "parameters 0"),
        (dict(n_layer=True), "n_layer=True must be a positive integer"),
        (dict(n_embd=0), "n_embd=0 must be a positive integer"),
        (dict(batch_size="16"), "batch_size='16' must be a positive integer"),
        (dict(max_iters=0), "max_iters=0 must be a positive integer"),
        (dict(n_layer=10**9), "n_layer=1000000000 must be a positive integer"),
        (dict(learning_rate=math.nan), "learning_rate=nan must be a number of at least 0"),
        (dict(min_lr=None), "min_lr=None must be a number of at least 0"),
        (dict(norm=None), "norm=None must be str"),
        (dict(n_hidden="many"), "n_hidden='many' must be int"),
        (dict(sizes=dict(vocab_size="many")), "invalid literal for int() with base 10: 'many'"),
    ],
    ids=str,
)
def test_a_run_of_an_impossible_size_is_skipped(tmp_path, keys, line):
    make(tmp_path, "out-none", "2", [4.0], **keys)
    with pytest.raises(ValueError, match=f"out-none/log.txt: its header is not that of a run: {re.escape(line)}"):
        load(tmp_path)


@pytest.mark.parametrize(
    "rates, inside", [((0.5, 1, 2), True), ((0.5, 1, 4), False), ((0.25, 1, 2), False), ((1, 2), False)]
)
def test_a_best_rate_is_bracketed_by_rates_at_most_twofold_away(rates, inside):
    assert best_rate({rate: {1: 2.0 + (rate != 1)} for rate in rates}) == (1, inside)
