"""compare.py on logs that the training code's own writer made, and on the recorded ones."""

import csv
import dataclasses
import itertools
import json
import math
import re
import statistics
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launch import ROOT, status
from scipy import stats

import compare
from reduced_sync.bench.cost_model import Forward, forward_seconds
from reduced_sync.compare.figures import draw_comparison
from reduced_sync.compare.frontier import add_measured, add_predicted, on_frontier
from reduced_sync.compare.prediction import forms, predict
from reduced_sync.compare.report import fastest, judge, table, verdict, warnings, write_csv
from reduced_sync.compare.runs import Gap, baseline_of, gap, load_runs, noise
from reduced_sync.hardware import LINKS, NAMED
from reduced_sync.train.experiment import MODERN, model_keys
from reduced_sync.train.log import RunLog, iter_line, step_line
from reduced_sync_model import GPT, GPTConfig, SyncRule

# of training; drop_syncs.py's have another form
RECORDED = sorted(log for log in (ROOT / "results").glob("*/*/log.txt") if "\nstep 0: " in log.read_text())
SIZES = {"vocab_size": 128}
UNTUNED = "no verdict, because the learning rates are not bracketed. So far: "


def make(
    folder,
    name,
    pattern,
    losses,
    n_params=609344,
    dtype="float32",
    data=None,
    resumed=None,
    sizes=SIZES,
    **changes,
):
    """A run's folder with the evaluations `losses` at steps 0, 10, 20 ..., of 20 steps of half a million tokens.

    `data` is the sha256 of its data, `resumed` the keys that are other ones from step 10 on, `sizes` those of the model
    that the header has beside its config.
    """
    config = {"sync": pattern, "n_shard": 2, "max_iters": 20, "dataset": "text"}
    config |= {"block_size": 8, "batch_size": 16, "gradient_accumulation_steps": 4000, "eval_iters": 5}
    rule = SyncRule.parse(pattern, len(pattern.partition("+")[0]))
    config |= {
        "n_layer": len(rule.pattern),
        "n_head": 4,
        "n_embd": 64,
        "learning_rate": 1e-3,
        "min_lr": 1e-4,
        "seed": 1,
    }
    config |= {"dtype": None} | changes  # the header says what that came to
    (folder / name).mkdir()
    log = RunLog(folder / name / "log.txt")
    header = {"sync": rule, "parameters": f"0.61M ({n_params})"} | sizes
    header |= {"syncs": f"{rule.syncs} of {2 * len(rule.pattern)}", "dtype": dtype}
    if data is not None:
        header |= {"train data": f"sha256 {data}", "val data": f"sha256 {data}"}
    log.header({"started": "today", **header, "config": config})
    for i, loss in enumerate(losses):
        if i == 1 and resumed is not None:
            log.header({"resumed at step 10": "today", **header, "config": config | resumed})
        log.line(step_line(10 * i, loss, loss))
    log.close()


@pytest.fixture
def runs(tmp_path):
    make(tmp_path, "out-base", "2" * 12, [4.0, 3.0, 2.0])
    make(tmp_path, "out-spd", "1" * 12, [4.0, 3.1, 2.01])
    make(tmp_path, "out-g6", "01" * 6, [4.0, 3.2, 2.04])
    make(tmp_path, "out-g3", "000100010001", [4.0, 3.3, 2.10])
    return tmp_path


def tune(folder, name, pattern, losses, **changes):
    """A run as `make` makes it, and two more at half and twice its learning rate, whose losses are higher."""
    rate = changes.pop("learning_rate", 1e-3)
    for factor, suffix, worse in ((1, "", 0), (0.5, "-half", 0.1), (2, "-twice", 0.2)):
        rates = dict(learning_rate=rate * factor, min_lr=rate * factor / 10)
        make(folder, name + suffix, pattern, [loss + worse for loss in losses], **rates, **changes)


def load(folder):
    arms, _ = load_runs(sorted(folder.glob("out*")))
    return arms


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
    assert "3 (grouped-3, +4.88%, 87.5% fewer syncs) (2 unfinished not counted)" in verdict(loaded, 6)


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
    assert [len(arm.seeds) for arm in loaded] == [3, 2, 1, 1] and warnings(loaded) == []
    assert loaded[0].losses[20] == pytest.approx(2.0) and loaded[0].deviation == pytest.approx(0.02)
    assert loaded[1].losses[20] == pytest.approx(2.03) and loaded[1].deviation == pytest.approx(0.04 / 2**0.5)
    logs = [[100 * math.log(losses[seed]) for seed in (1, 2)] for losses in (spd, base)]
    low, high = stats.ttest_rel(*logs).confidence_interval(0.95)
    found = gap(loaded[1], loaded)
    assert (found.percent - found.margin, found.percent + found.margin) == pytest.approx((low, high))
    assert gap(loaded[2], loaded).margin == pytest.approx(2**0.5 * found.margin)  # one seed, the noise of the others
    assert gap(loaded[0], loaded).margin is None
    lines = table(loaded, 2).splitlines()
    make(runs, "out-base-4", "2" * 12, [4.0], seed=4)  # has just begun
    assert load(runs)[0].losses == loaded[0].losses and "3 of 4" in table(load(runs), 2)
    assert lines[1].split()[:4] == ["out-base", "and", "2", "more"]
    assert f"{found.percent:+.2f}%  {found.margin:.2f}%" in lines[2]
    draw_comparison(loaded, runs / "figure.png", 2)


def test_the_noise_is_pooled_over_arms(tmp_path):
    seeds = {"base": [2.0, 2.03, 1.99], "spd": [2.05, 2.02, 2.08], "one": [2.2, 2.25, 2.19]}
    for (name, losses), pattern in zip(seeds.items(), ("22", "11", "01"), strict=True):
        for seed, loss in enumerate(losses):
            make(tmp_path, f"out-{name}-{seed}", pattern, [4.0, 3.0, loss], seed=seed)
    pairs = [[100 * math.log(a / b) for a, b in zip(seeds[x], seeds["base"], strict=True)] for x in ("spd", "one")]
    pooled = math.sqrt(sum(map(statistics.variance, pairs)) / 2)
    assert noise(load(tmp_path)) == (pytest.approx(pooled), 4)
    assert gap(load(tmp_path)[2], load(tmp_path)).margin == pytest.approx(stats.t.ppf(0.975, 4) * pooled / 3**0.5)


def test_seeds_that_no_other_run_has_are_no_pairs(runs):
    make(runs, "out-g2", "000001000001", [4.0, 3.0, 2.2], seed=7)
    loaded = load(runs)
    found = gap(loaded[-1], loaded)
    assert found.percent == pytest.approx(100 * math.log(1.1)) and found.margin is None and found.pairs == 0


# --- learning rates and verdicts


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
    assert [len(arm.rates) for arm in loaded] == [3, 3, 3] and base.losses[20] == pytest.approx(2.15)
    lines = table(loaded, 2).splitlines()
    assert "0.001 to 0.004" in lines[2] and "not bracketed" in lines[2]
    assert warnings(loaded) == ["warning: the runs differ in learning_rate: 0.001, 0.004"]
    make(tmp_path, "out-spd-last", "11", [4.0, 3.0], learning_rate=8e-3, min_lr=8e-4)
    assert not load(tmp_path)[1].bracketed  # not yet
    (tmp_path / "out-spd-last" / "log.txt").unlink()
    (tmp_path / "out-spd-last").rmdir()
    make(tmp_path, "out-spd-last", "11", [4.0], learning_rate=8e-3, min_lr=8e-4, max_bad_steps=2)
    with open(tmp_path / "out-spd-last" / "log.txt", "a") as file:
        file.writelines(iter_line(step, math.nan, 0.1, 1024, math.nan, None, step) + "\n" for step in (3, 4))
    assert load(tmp_path)[1].bracketed and load(tmp_path)[1].losses[20] == 2.02
    draw_comparison(load(tmp_path), tmp_path / "figure.png", 2)


@pytest.mark.parametrize(
    ("losses", "expected", "line"),
    [
        ([2.01, 2.011], "within", "n_shard 2: the fewest syncs within 2% of the baseline: 2 (spd, +0.52%, 50.0% fewer"),
        ([2.2, 2.203], "outside", "n_shard 2: no variant is within 2% of the baseline"),
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
    found = gap(arms[1], arms)
    assert judge(arms[1], found, arms, 2) == expected and line in verdict(arms, 2)
    if expected == "open":
        needed = found.seeds_needed(2)
        half = [stats.t.ppf(0.975, n - 1) * found.deviation / n**0.5 for n in (needed - 1, needed)] if needed else []
        assert not half or half[1] < abs(found.percent - 2) <= half[0]


def test_without_a_verdict(tmp_path):
    """One seed, an unbracketed baseline, an unfinished run: why, and no answer."""
    tune(tmp_path, "out-base", "22", [4.0, 3.0, 2.0])
    tune(tmp_path, "out-spd", "11", [4.0, 3.0, 2.01])
    arms = load(tmp_path)
    assert judge(arms[1], gap(arms[1], arms), arms, 2) == "one seed"
    start = "n_shard 2: no verdict, because with one seed each, the noise is not known. So far: "
    assert verdict(arms, 2) == f"{start}the fewest syncs within 2% of the baseline: 2 (spd, +0.50%, 50.0% fewer syncs)"
    for name in ("out-base-half", "out-base-twice"):
        (tmp_path / name / "log.txt").unlink()
    arms, _ = load_runs(path.parent for path in sorted(tmp_path.glob("*/log.txt")))
    assert judge(arms[1], gap(arms[1], arms), arms, 2) == "not bracketed"


def test_a_point_is_dominated_beyond_noise_alone(tmp_path):
    for seed, shift in ((1, 0.0), (2, 0.02)):
        make(tmp_path, f"out-base-{seed}", "22", [4.0, 3.0, 2.0], seed=seed)
        make(tmp_path, f"out-spd-{seed}", "11", [4.0, 3.0, 2.0 + shift], seed=seed)
        make(tmp_path, f"out-one-{seed}", "01", [4.0, 3.0, 2.5 + shift], seed=seed)
    arms = load(tmp_path)
    for arm, seconds in zip(arms, (0.1, 0.2, 0.3), strict=True):
        arm.tpots["c"] = seconds
    places = [on_frontier(arm, arms, "c") for arm in arms]
    assert places == [True, True, False]  # is the baseline better than SPD? the seeds do not say


def test_a_prediction_for_another_size(tmp_path, capsys):
    """Two forms over ln N: a gap that is linear in it is found by the line, and by leaving the largest size out."""
    sizes = [(2, 64), (3, 96), (4, 128)]
    for n_layer, n_embd in sizes:
        grows = 1 + 0.5 * math.log(n_layer * n_embd**2 / (2 * 64**2))  # percent
        keys = dict(n_params=n_layer * n_embd**2 * 12, n_embd=n_embd, gradient_accumulation_steps=40000)
        for seed, shift in ((1, 0.01), (2, -0.01)):
            for name, pattern, loss in (("base", "2", 2.0), ("one", "0", 2.0 * math.exp((grows + shift) / 100))):
                pattern = pattern * (n_layer - 1) + ("2" if pattern == "2" else "1")
                name = f"out-{name}-{n_layer}-{seed}"
                (tune if seed == 1 else make)(tmp_path, name, pattern, [4.0, 3.0, loss], seed=seed, **keys)
    arms = load(tmp_path)
    lines = predict(arms, "12x768").splitlines()
    factor = 12 * 768**2 / (4 * 128**2)
    target = 1 + 0.5 * math.log(12 * 768**2 / (2 * 64**2))
    last = [1 + 0.5 * math.log(n * C**2 / (2 * 64**2)) for n, C in sizes]
    assert lines[0].startswith("EXTRAPOLATED to 12x768")
    assert lines[1].startswith(f"grouped-1 n_shard 2 float32, 3 sizes, {factor:.3g} times the largest N: constant ")
    assert f"constant {statistics.fmean(last[1:]):+.2f}" in lines[1] and f"line {target:+.2f} +- " in lines[1]
    assert f"line {last[2]:+.2f} +- " in lines[2] and lines[2].endswith(f"measured {last[2]:+.2f}")
    difference = {math.log(n): Gap(0.0, 20, True, 0.3, 2, 0.2) for n in (1, 2, 4)}
    found = forms(difference, math.log(8))
    assert found["constant"] == (0.0, pytest.approx(0.3 / 2**0.5))
    at = np.array([1, math.log(8)])
    # the interval of a least-squares line by numpy's own covariance
    covariance = np.linalg.inv(sum(np.outer(v, v) for v in ([1, math.log(n)] for n in (1, 2, 4))))
    assert found["line"][1] == pytest.approx(0.3 * math.sqrt(at @ covariance @ at))
    argv = [*map(str, tmp_path.glob("out*")), "--predict=12x768", f"--png={tmp_path}/figure.png"]
    assert status(compare.main, argv) == 0 and lines[1] in capsys.readouterr().out
    for size in ("12", "0x768", "12x768x2"):
        with pytest.raises(ValueError, match="a size is LAYERSxWIDTH"):
            predict(arms, size)
    with pytest.raises(ValueError, match="needs one way to sync at two sizes or more"):
        predict([arm for arm in arms if arm.n_layer == 2], "12x768")


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
    gaps = {name: gap(arm, loaded) for name, arm in by_name.items()}
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


def test_when_nothing_can_be_said(tmp_path):
    make(tmp_path, "out-spd", "1" * 12, [4.0, 3.1, 2.01])
    assert "found no baseline; exactly one is needed" in verdict(load(tmp_path), 2)
    make(tmp_path, "out-base", "2" * 12, [4.0, 3.0])
    assert "the baseline out-base has not finished" in verdict(load(tmp_path), 2)
    make(tmp_path, "out-base2", "2" * 12, [4.0, 3.0, 2.0], dropout=0.1)
    assert "found 2 baselines; exactly one" in verdict(load(tmp_path), 2)


def test_each_n_shard_has_its_own_baseline(runs):
    make(runs, "out-base4", "2" * 12, [4.0, 3.0, 1.9], n_shard=4)
    make(runs, "out-spd4", "1" * 12, [4.0, 3.0, 2.01], n_shard=4)
    loaded = load(runs)
    gaps = {run.names[0]: gap(run, loaded).percent for run in loaded}
    assert gaps["out-spd"] == pytest.approx(100 * math.log(1.005))
    assert gaps["out-spd4"] == pytest.approx(100 * math.log(2.01 / 1.9))
    assert len(verdict(loaded, 2).splitlines()) == 2
    make(runs, "out-control", "2" * 8, [4.0, 3.0, 1.95], n_params=615000, n_embd=80, n_shard=1)
    loaded = load(runs)
    assert gap(loaded[0], loaded).percent == pytest.approx(100 * math.log(1.95 / 1.9))  # it has none: to the best one


def test_each_float_type_has_its_own_baseline(runs):
    for seed, loss in ((1, 1.9), (2, 1.94)):
        make(runs, f"out-half-base{seed}", "2" * 12, [4.0, 3.0, loss], dtype="bfloat16", seed=seed)
    make(runs, "out-half-spd", "1" * 12, [4.0, 3.0, 2.01], dtype="bfloat16")
    loaded = load(runs)
    gaps = {run.names[0]: gap(run, loaded).percent for run in loaded}
    assert gaps["out-spd"] == pytest.approx(100 * math.log(1.005))
    assert gaps["out-half-spd"] == pytest.approx(100 * math.log(2.01 / 1.9))  # of the seed that both have
    assert "dtype" in table(loaded, 2).split("\n")[0].split()
    assert "warning: the runs differ in dtype: bfloat16, float32" in warnings(loaded)


def test_a_seed_that_diverged(runs):
    """Fault 18: a loss of nan in one of several seeds was a traceback. It has no deviation, and is no noise."""
    make(runs, "out-base-2", "2" * 12, [4.0, 3.0, 2.02], seed=2)
    make(runs, "out-spd-2", "1" * 12, [4.0, 3.0, float("nan")], seed=2)
    make(runs, "out-g6-2", "01" * 6, [4.0, 3.0, float("inf")], seed=2)
    make(runs, "out-g3-2", "000100010001", [4.0, 3.0, 2.14], seed=2)
    _, spd, g6, _ = loaded = load(runs)
    assert spd.deviation is None and g6.deviation is None
    pairs = [100 * math.log(2.1 / 2.0), 100 * math.log(2.14 / 2.02)]
    assert noise(loaded) == (pytest.approx(statistics.stdev(pairs)), 1)
    assert "nan" in table(loaded, 2) and "inf" in table(loaded, 2) and "3 (grouped-3" in verdict(loaded, 50)
    draw_comparison(loaded, runs / "figure.png", 2)


@pytest.mark.parametrize("name", ["out-0", "out-z"])
def test_a_learning_rate_that_diverged_is_not_the_best(runs, name):
    """Fault 18: where it came first, its nan was the baseline."""
    make(runs, name, "2" * 12, [4.0, 3.0, float("nan")], learning_rate=1.0)
    loaded = load(runs)
    assert {baseline_of(arm, loaded).names[0] for arm in loaded} == {"out-base"}


def test_an_arm_of_which_a_seed_diverged_has_no_verdict_but_that(tmp_path):
    """It must not be judged by the seeds that are left."""
    tune(tmp_path, "out-base", "22", [4.0, 3.0, 2.0])
    tune(tmp_path, "out-spd", "11", [4.0, 3.0, 2.01])
    for name, pattern in (("base", "22"), ("spd", "11")):
        make(tmp_path, f"out-{name}-2", pattern, [4.0, 3.0, 2.0], seed=2)
    make(tmp_path, "out-spd-3", "11", [4.0], seed=3, max_bad_steps=2)
    with open(tmp_path / "out-spd-3" / "log.txt", "a") as file:
        file.writelines(iter_line(step, math.nan, 0.1, 1024, math.nan, None, step) + "\n" for step in (3, 4))
    arms = load(tmp_path)
    assert judge(arms[1], gap(arms[1], arms), arms, 2) == "diverged"
    assert verdict(arms, 2).startswith("n_shard 2: no variant is within 2%")


def test_nan_is_never_within_the_tolerance(runs):
    make(runs, "out-nan", "000000000001", [4.0, float("nan"), float("nan")])
    loaded = load(runs)
    assert "3 (grouped-3" in verdict(loaded, 50) and "nan" in table(loaded, 2)
    draw_comparison(loaded, runs / "figure.png", 2)


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
    assert [gap(arm, loaded) is None for arm in loaded] == [False, True]
    reason = "can't say: evaluated on other windows or data than the baseline"
    assert verdict(loaded, 2) == f"n_shard 2: {reason}"
    assert any(line.endswith(": no gap between them") for line in warnings(loaded))
    draw_comparison(loaded, tmp_path / "figure.png", 2)
    make(tmp_path, "out-spd-2", "11", [4.0, 3.0, 2.02], data="cafe")
    loaded = load(tmp_path)
    assert [len(arm.seeds) for arm in loaded] == [1, 1, 1]
    line = "the fewest syncs within 2% of the baseline: 2 (spd, +1.00%, 50.0% fewer syncs)"
    assert verdict(loaded, 2) == f"n_shard 2: {UNTUNED}{line} (1 evaluated on other windows or data not counted)"
    make(tmp_path, "out-base-2", "22", [4.0, 3.0, 0.99], **dict(data="cafe") | other)
    gaps = {arm.names[0]: gap(arm, load(tmp_path)).percent for arm in load(tmp_path)}
    assert gaps["out-spd-2"] == pytest.approx(100 * math.log(1.01))
    assert gaps["out-spd"] == pytest.approx(100 * math.log(1 / 0.99))
    draw_comparison(load(tmp_path), tmp_path / "figure.png", 2)


@pytest.mark.parametrize("data", [None, "unknown"])
def test_data_whose_content_is_not_known_is_that_of_its_name(tmp_path, data):
    make(tmp_path, "out-a", "22", [4.0, 3.0, 2.0], data=data)
    make(tmp_path, "out-b", "22", [4.0, 3.0, 2.1], seed=2, data="cafe")
    (arm,) = loaded = load(tmp_path)
    assert len(arm.seeds) == 2 and warnings(loaded) == []
    make(tmp_path, "out-c", "22", [4.0, 3.0, 2.1], seed=3, data="beef")  # surely not that of the first two
    make(tmp_path, "out-d", "22", [4.0, 3.0, 2.1], seed=3, data="cafe", dataset="a copy of text")
    assert [len(arm.seeds) for arm in load(tmp_path)] == [3, 1]


def test_a_run_that_went_on_with_other_settings(runs):
    """It is named, and no seed of those that did not; what makes no difference is not named."""
    make(runs, "out-base-2", "2" * 12, [4.0, 3.0, 2.0], seed=2, warmup_iters=2, resumed=dict(warmup_iters=1))
    make(runs, "out-base-3", "2" * 12, [4.0, 3.0, 2.0], seed=3, resumed=dict(out_dir="x", init_from="resume"))
    loaded = load(runs)
    assert sorted(len(arm.seeds) for arm in loaded) == [1, 1, 1, 1, 2]
    named = [line for line in warnings(loaded) if "resumed" in line]
    assert named == ["warning: out-base-2 was resumed with other settings: warmup_iters 2 -> 1"]


# --- runs that cannot tell


def test_runs_that_are_too_short_give_no_answer(runs, tmp_path, monkeypatch):
    """Below 10 tokens a parameter the verdict and the figure say so."""
    from matplotlib.axes import Axes

    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda axes, title, *_, **__: titles.append(title))
    draw_comparison(load(runs), runs / "figure.png", 2)
    assert "too short" not in verdict(load(runs), 2) and not any("too short" in title for title in titles)
    make(runs, "out-short", "1" * 12, [4.0, 3.0, 1.0], gradient_accumulation_steps=200)
    loaded = load(runs)
    start = "n_shard 2: no verdict, because too short to tell: 0.84 tokens per parameter, at least 10 are needed; "
    start += UNTUNED.removeprefix("no verdict, because ")
    assert verdict(loaded, 2.1).startswith(f"{start}the fewest syncs within 2.1% of the baseline: 6 (grouped-6")
    assert verdict(loaded, -70).startswith(f"{start}no variant is within")
    draw_comparison(loaded, runs / "figure.png", 2)
    assert titles[-1] == "Loss against syncs\ntoo short to tell: 0.84 tokens per parameter"


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


def test_each_family_of_blocks_is_compared_with_its_own_baseline(tmp_path):
    modern = MODERN | dict(n_kv_head=2)
    make(tmp_path, "out-base", "22", [4.0, 3.0, 2.0])
    make(tmp_path, "out-spd", "11", [4.0, 3.0, 2.02])
    make(tmp_path, "out-modern-base", "22", [4.0, 3.0, 1.9], **modern)
    make(tmp_path, "out-modern-spd", "11", [4.0, 3.0, 1.957], **modern)
    arms = load(tmp_path)
    assert {arm.names[0]: round(gap(arm, arms).percent, 6) for arm in arms} == {
        "out-base": 0,
        "out-spd": round(100 * math.log(1.01), 6),
        "out-modern-base": 0,
        "out-modern-spd": round(100 * math.log(1.03), 6),
    }
    assert warnings(arms) == []
    lines = verdict(arms, 2).splitlines()
    assert lines[0].startswith(f"2x64, n_shard 2: {UNTUNED}the fewest syncs within 2% of the baseline: 2 (spd, +1.00%")
    assert lines[1] == f"2x64 modern, n_shard 2: {UNTUNED}no variant is within 2% of the baseline"


# --- loss against time


def row(seconds, pattern, **changes):
    """A row of what bench.py decode writes: the time per token of a model as `make` makes them."""
    n_layer = len(pattern.partition("+")[0])
    model = {"n_layer": n_layer, "n_embd": 64, "n_head": 4, "n_shard": 2, "sync": pattern}
    model |= {"norm": "layernorm", "position": "learned", "mlp": "gelu", "n_kv_head": 4, "vocab_size": 128} | changes
    worked_out = {"n_hidden": 4 * model["n_embd"], "head_size": model["n_embd"] // model["n_head"]}
    return {"tpot_s": seconds, "model": worked_out | model}


def write_latency(folder, *rows, **others):
    """A file of bench.py decode's with one case more."""
    path = folder / "decode.json"
    cases = json.loads(path.read_text())["results"] if path.exists() else []
    cases.append({"tp_size": 2, "batch_size": 1, "prompt": 128, "patterns": rows} | others)
    path.write_text(json.dumps({"results": cases}))
    return path


@pytest.fixture
def timed(runs):
    """Runs, a control and a rival, all with times. The control beats SPD, the rival and spd both beat grouped-6."""
    make(runs, "out-control", "2" * 8, [4.0, 3.0, 2.005], n_params=615000, n_embd=80, n_shard=1)
    make(runs, "out-ladder", "2" * 12 + "+ladder", [4.0, 3.0, 2.03])
    rows = [row(0.010, "2" * 12), row(0.008, "1" * 12), row(0.009, "01" * 6), row(0.005, "000100010001")]
    write_latency(runs, *rows, row(0.007, "2" * 8, n_embd=80), row(0.006, "2" * 12 + "+ladder"))
    return runs


def test_the_frontier_and_the_fastest_within_the_tolerance(timed):
    arms = load(timed)
    add_measured(arms, timed / "decode.json", None, None)
    (setting,) = arms[0].tpots
    assert setting == "tp_size 2, batch 1, prompt 128" and warnings(arms) == []
    found = {arm.names[0]: (arm.tpots[setting], on_frontier(arm, arms, setting)) for arm in arms}
    best = {"out-base": (0.010, True), "out-control": (0.007, True), "out-ladder": (0.006, True)}
    assert found == best | {"out-spd": (0.008, False), "out-g6": (0.009, False), "out-g3": (0.005, True)}
    lines = [line.split() for line in table(arms, 2).splitlines()]
    assert lines[0][-2:] == ["ms/token", "frontier"]
    assert {line[0]: line[-2:] for line in lines[1:-1]} == {
        name: [f"{1000 * seconds:.3f}", "yes" if best else "dominated"] for name, (seconds, best) in found.items()
    }
    start = f"{setting}: {UNTUNED}the fastest within"
    rest = "of the baseline: 7.000 ms/token, 1.43x as fast as the baseline (control 8x80, +0.25%, out-control)"
    assert fastest(arms, 0.6) == f"{start} 0.6% {rest}"
    rest = "of the baseline: 6.000 ms/token, 1.67x as fast as the baseline (baseline+ladder, n_shard 2, +1.49%, "
    assert fastest(arms, 2) == f"{start} 2% {rest}out-ladder)"
    rest = "of the baseline: 10.000 ms/token, the baseline itself (baseline, n_shard 2, +0.00%, out-base)"
    assert fastest(arms, 0.1) == f"{start} 0.1% {rest}"
    assert fastest(arms, -1) == f"{setting}: {UNTUNED}no run with a time per token is within -1% of the baseline"


def test_equal_arms_are_both_on_the_frontier_and_unfinished_ones_on_none(runs):
    make(runs, "out-twin", "1" * 12 + "+parallel", [4.0, 3.1, 2.01])
    make(runs, "out-new", "000000000001", [4.0, 1.0])
    path = write_latency(runs, *(row(0.01, p) for p in ("1" * 12, "01" * 6)), row(0.01, "1" * 12 + "+parallel"))
    write_latency(runs, row(0.001, "000000000001"))  # the same case again: another launch
    arms = load(runs)
    add_measured(arms, path, None, None)
    found = {arm.names[0]: on_frontier(arm, arms, "tp_size 2, batch 1, prompt 128") for arm in arms}
    expected = {"out-spd": True, "out-twin": True, "out-g6": False, "out-new": None, "out-base": None, "out-g3": None}
    assert found == expected
    assert "10.000 ms/token, its baseline has no time (spd, n_shard 2, +0.50%, out-spd)" in fastest(arms, 2)
    assert warnings(arms) == ["warning: no time per token of out-base, out-g3"]


def test_a_row_is_that_of_the_same_model_alone(runs):
    """Another n_shard, width or block is another model; for a dense one n_shard and heads make no difference."""
    others = [dict(n_shard=4), dict(n_embd=128), dict(n_head=8), dict(mlp="swiglu"), dict(n_kv_head=2)]
    rows = [row(1.0, "1" * 12, **other) for other in [*others, dict(norm="rmsnorm")]]
    rows += [row(1.0, "1" * 12 + rival) for rival in ("+parallel", "+desync", "+delayed")]
    path = write_latency(runs, *rows)
    with pytest.raises(ValueError, match="none of the runs' models was measured at tp_size 2, batch 1"):
        add_measured(load(runs), path, None, None)
    dense = [row(0.6, "2" * 12, n_kv_head=2), row(0.7, "2" * 12, n_shard=4, n_head=8, n_kv_head=8)]
    write_latency(runs, *rows, row(0.5, "1" * 12), *dense)
    arms = load(runs)
    add_measured(arms, path, None, None)
    assert [list(arm.tpots.values()) for arm in arms] == [[0.7], [0.5], [], []]


def test_which_of_several_cases(runs):
    """The largest tp_size and the smallest batch unless they are given; a column for each prompt and added delay."""
    sizes = [(1, 1, 0.1), (4, 8, 0.2), (4, 2, 0.3), (2, 1, 0.4)]
    for tp_size, batch_size, seconds in sizes:
        path = write_latency(runs, row(seconds, "1" * 12), tp_size=tp_size, batch_size=batch_size)
    for choice, expected in {(None, None): 0.3, (4, 8): 0.2, (None, 1): 0.4, (1, None): 0.1}.items():
        arms = load(runs)
        add_measured(arms, path, *choice)
        assert list(arms[1].tpots.values()) == [expected]
    write_latency(runs, row(0.9, "1" * 12), tp_size=4, batch_size=2, added_delay_s=3e-5)
    arms = load(runs)
    add_measured(arms, path, None, None)
    common = "tp_size 4, batch 2, prompt 128"
    assert arms[1].tpots == {common: 0.3, f"{common}, 30 us added": 0.9}
    assert "ms/token  frontier  ms/token, 30 us added  frontier, 30 us added" in table(arms, 2)
    assert [line.partition(": ")[0] for line in fastest(arms, 2).splitlines()] == [common, f"{common}, 30 us added"]
    with pytest.raises(ValueError, match="there are tp_size 1 with 1, 2 with 1, 4 with 2, 4 with 8"):
        add_measured(load(runs), path, 2, 2)


def test_a_row_of_another_vocabulary_is_another_model(runs):
    """Fault 16: times measured with GPT-2's 50304 tokens were those of runs with 128."""
    make(runs, "out-other", "0" * 11 + "1", [4.0, 3.0, 2.0], sizes=dict(vocab_size=192))
    path = write_latency(runs, row(0.3, "1" * 12, vocab_size=50304), row(0.4, "2" * 12, vocab_size=64))
    line = "decode.json: none of the runs' models was measured at tp_size 2, batch 1, but 12x64 with vocab_size 50304, "
    line += "12x64 with vocab_size 64; the runs have 12x64 with vocab_size 128, 12x64 with vocab_size 192"
    with pytest.raises(ValueError, match=re.escape(line)):
        add_measured(load(runs), path, None, None)
    patterns = ("1" * 12, "2" * 12, "01" * 6, "000100010001", "0" * 11 + "1")
    write_latency(runs, *(row(0.1, pattern) for pattern in patterns))
    arms = load(runs)
    add_measured(arms, path, None, None)
    assert [list(arm.tpots.values()) for arm in arms] == [[0.1]] * 4 + [[]]
    assert "warning: no time per token of out-other" in warnings(arms)


def test_the_vocabulary_of_older_files_and_logs(runs):
    """Fault 16: a file may have it in its settings alone, a log in its number of parameters."""
    older = row(0.1, "1" * 12)
    del older["model"]["vocab_size"], older["model"]["head_size"]
    path = write_latency(runs, older)
    cases = json.loads(path.read_text())
    for settings, tpots in (({"vocab_size": 128}, [0.1]), ({"vocab_size": 64}, None), ({}, None)):
        path.write_text(json.dumps(cases | {"settings": settings}))
        arms = load(runs)
        if tpots:
            add_measured(arms, path, None, None)
            assert list(arms[1].tpots.values()) == tpots
        else:
            line = "but 12x64 with vocab_size 64" if settings else "'vocab_size' is missing; measure again"
            with pytest.raises(ValueError, match=line):
                add_measured(arms, path, None, None)
    n_params = GPT(GPTConfig(8, 192, 12, 4, 64, n_shard=2)).get_num_params(non_embedding=False)
    make(runs, "out-old", "1" * 12, [4.0, 3.0, 2.0], n_params, sizes={}, bias=True)
    path.write_text(json.dumps(cases | {"settings": {"vocab_size": 192}}))
    arms = load(runs)
    add_measured(arms, path, None, None)
    assert {arm.names[0] for arm in arms if arm.tpots} == {"out-old"}


@pytest.mark.parametrize(("runs", "file"), [("pilot/3x192", "pilot/decode"), ("pypi/6x384", "pypi/decode-6x384")])
def test_recorded_times(runs, file):
    arms, _ = load_runs(sorted(path.parent for path in (ROOT / "results").glob(f"{runs}-*/log.txt")))
    add_measured(arms, ROOT / f"results/{file}.json", None, None)
    assert sum(bool(arm.tpots) for arm in arms) >= 4


IMPOSSIBLE = [0, 0.0, -0.1, float("nan"), float("inf"), 10**400, True, "0.1", None, [0.1], {}]


@pytest.mark.parametrize("value", IMPOSSIBLE, ids=lambda value: str(value)[:9])
def test_an_impossible_time_is_refused(runs, value):
    """Fault 18: it was compared, or a traceback. Also in a row or case that is none of the runs'."""
    good = row(0.1, "1" * 12)
    path = write_latency(runs, good)
    write_latency(runs, good, row(value, "1" * 12, n_embd=128), tp_size=1)
    line = f"{path}: results[1].patterns[1].tpot_s is {value!r}, it must be a positive number"
    with pytest.raises(ValueError) as error:
        add_measured(load(runs), path, None, None)
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (dict(tp_size="2"), "results[0].tp_size is '2', it must be a positive integer"),
        (dict(batch_size=0), "results[0].batch_size is 0, it must be a positive integer"),
        (dict(prompt=1.5), "results[0].prompt is 1.5, it must be a positive integer"),
        (dict(added_delay_s=float("nan")), "results[0].added_delay_s is nan, it must be a number of at least 0"),
        (dict(rival_ttft_s="1"), "results[0].rival_ttft_s is '1', it must be a positive number"),
        (dict(patterns=[{}]), "results[0].patterns[0].tpot_s is missing, it must be a positive number"),
        (dict(patterns=[[]]), "results[0] is not what bench.py writes"),
        (
            dict(patterns=[{"tpot_s": 0.1, "model": 3}]),
            "not what bench.py decode writes: 'int' object",
        ),
        (dict(patterns={}), "results[0] is not what bench.py writes"),
    ],
    ids=str,
)
def test_an_impossible_case_is_refused(runs, changes, line):
    """Fault 18."""
    path = write_latency(runs, **{"patterns": []} | changes)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {line}")):
        add_measured(load(runs), path, None, None)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[]", "not what bench.py writes: an object with a list of results"),
        ('{"results": {}}', "not what bench.py writes: an object with a list of results"),
        ('{"results": [3]}', "results[0] is not what bench.py writes"),
        ('{"results": [], "settings": 3}', "not what bench.py writes: an object with a list of results"),
        ('{"results": [' + "9" * 5000 + "]}", "not what bench.py writes: Exceeds the limit"),
        ('{"results": [{"tpot_s": 0.1}', "not what bench.py writes: Expecting"),
        ('{"results": [], "settings": {"command": "predict"}}', "written by bench.py predict, not by bench.py decode"),
        ('{"results": []}', "no case of this tp_size and batch; there are tp_size none"),
    ],
    ids=lambda text: text[:40],
)
def test_what_is_no_file_of_times_is_refused(runs, text, line):
    """Fault 18."""
    (runs / "decode.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{runs}/decode.json: {line}")):
        add_measured(load(runs), runs / "decode.json", None, None)


def test_predictions_are_the_cost_models_and_labelled(timed, capsys, monkeypatch):
    """Of the arm's own shape, with its hidden syncs; in table, panel and verdict."""
    from matplotlib.axes import Axes

    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda axes, title, *_, **__: titles.append(title))
    make(timed, "out-spd4", "1" * 12, [4.0, 3.1, 2.01], n_shard=4)
    make(timed, "out-ladder4", "2" * 12 + "+ladder", [4.0, 3.1, 2.01], n_shard=4)
    arms = load(timed)
    add_predicted(arms, "nvlink", "h100", 4, 3)
    times = {arm.names[0]: one for arm in arms for one in arm.tpots.values()}
    assert times.keys() == {"out-spd4", "out-ladder4", "out-base", "out-control"}  # those that 4 ranks can hold
    for name, sync in (("out-spd4", "spd"), ("out-ladder4", "baseline+ladder"), ("out-base", "baseline")):
        model = GPTConfig(8, 128, 12, 4, 64, n_shard=4, sync=sync)
        assert times[name] == forward_seconds(model, NAMED["h100"], LINKS["nvlink"], Forward(4, 3, 1, 8, itemsize=2))
    argv = [*map(str, timed.glob("out*")), "--link=nvlink", "--tp_size=4", f"--png={timed}/figure.png"]
    assert status(compare.main, argv) == 0
    out = capsys.readouterr().out
    assert "ms/token, PREDICTED  frontier, PREDICTED" in out.splitlines()[0]
    assert "\nms/token, PREDICTED: link nvlink, h100, tp_size 4, batch 1\n" in out
    assert "\nPREDICTED, link nvlink, h100, tp_size 4, batch 1: " + UNTUNED + "the fastest within 2% of the" in out
    assert titles[-1].endswith("\nPREDICTED, link nvlink, h100, tp_size 4, batch 1")
    assert "warning: no time per token of out-ladder, out-spd, out-g6, out-g3\n" in out
    with pytest.raises(ValueError, match="tp_size=8 divides the n_shard of none of the runs"):
        add_predicted(load(timed), "nvlink", "h100", 8, 1)


LLAMA = MODERN | dict(n_kv_head=2)
SHAPES = [{}, dict(bias=True), dict(tie_embeddings=False), dict(n_hidden=96), dict(n_kv_head=2), dict(block_size=512)]
SHAPES += [LLAMA, LLAMA | dict(tie_embeddings=False, n_hidden=160), dict(vocab_size=1024), dict(head_size=64)]


OLD = [(shape, old) for shape in SHAPES for old in (False, True) if not (old and "head_size" in shape)]


@pytest.mark.parametrize("pattern", ["22", "11"])
@pytest.mark.parametrize(("shape", "old"), OLD, ids=str)
def test_a_prediction_is_of_the_models_own_shape(tmp_path, shape, pattern, old):
    """Fault 15: it was of GPT-2's block, tied, with all that this leaves of the parameters as vocabulary.

    An older log does not say the vocabulary, only how many parameters there are.
    """
    small = dict(block_size=8, vocab_size=192, n_layer=2, n_head=4, n_embd=64, bias=False)
    config = GPTConfig(**model_keys(small | shape), n_shard=2)
    n_params = GPT(config).get_num_params(non_embedding=False)
    keys = dict(bias=False, n_hidden=0, n_kv_head=0, tie_embeddings=True) | shape
    sizes = {"vocab_size": keys.pop("vocab_size", 192), "head_size": keys.pop("head_size", 16)}
    make(tmp_path, "out-one", pattern, [4.0, 3.0, 2.0], n_params, sizes={} if old else sizes, **keys)
    for tp_size in (2, 4) if pattern == "22" else (2,):  # a dense model can be cut anew: each rank needs a KV head
        arms = load(tmp_path)
        add_predicted(arms, "nvlink", "h100", tp_size, 3)
        cut = dataclasses.replace(config, n_shard=tp_size, sync=pattern)
        token = Forward(tp_size, 3, 1, cut.block_size, itemsize=2)
        expected = forward_seconds(cut, NAMED["h100"], LINKS["nvlink"], token)
        assert list(arms[0].tpots.values()) == [expected]


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (dict(n_params=609345), "out-one: its log does not say the model's whole shape: add the lines '# vocab_size"),
        (dict(n_params=1000), "out-one: its log does not say the model's whole shape: add the lines '# vocab_size"),
        (dict(init_from="llama"), "out-one: its log does not say the model's whole shape: add the lines '# vocab_size"),
        (dict(n_hidden="many"), "out-one: its config is not that of a model: "),
        (dict(n_head=3), "out-one: its config is not that of a model: n_embd=64 is not divisible by n_head=3"),
    ],
    ids=str,
)
def test_a_model_whose_shape_is_not_known_has_no_prediction(tmp_path, keys, line):
    make(tmp_path, "out-one", "2" * 12, [4.0, 3.0, 2.0], sizes={}, **keys)
    with pytest.raises(ValueError, match=re.escape(line)):
        add_predicted(load(tmp_path), "nvlink", "h100", 2, 1)


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
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    draw_comparison(arms, tmp_path / "figure.png", 2)
    figures[0].draw_without_rendering()
    curves, _, times = figures[0].axes
    assert len(curves.get_legend().get_texts()) == 4 + 2  # 1 to 4 syncs, two n_shard
    assert len(times.texts) == 30
    boxes = [Text.get_window_extent(text) for text in times.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    points = times.transData.transform([(1000 * arm.tpots[s], arm.losses[20]) for arm in arms for s in arm.tpots])
    assert not any(box.contains(*point) for box in boxes for point in points)
    assert all(times.bbox.x0 - 1 < box.x0 and box.x1 < times.bbox.x1 + 1 for box in boxes)


# --- the command


def test_the_command_starts_without_what_it_may_not_need():
    """matplotlib takes seconds to import, and scipy one."""
    code = "import sys, compare; print({'scipy', 'matplotlib'} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (process.stdout, process.stderr) == ("set()\n", "")


def test_command_writes_figure_and_csv(runs, monkeypatch, capsys):
    make(runs, "out-g2", "000001000001", [4.0, 3.3])  # unfinished
    monkeypatch.chdir(runs)
    assert status(compare.main, ["--csv=table.csv", "--tolerance=2.1"]) == 0
    assert "fewest syncs within 2.1%" in capsys.readouterr().out
    png = (runs / "comparison.png").read_bytes()
    assert png.startswith(b"\x89PNG") and struct.unpack(">2I", png[16:24]) == (12 * 130, 4.8 * 130)
    with open(runs / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["out-base", "out-spd", "out-g6", "out-g3", "out-g2"]
    assert float(rows[4].pop("gap_percent")) == pytest.approx(100 * math.log(1.1))
    expected = "run=out-g2 sync=grouped-2 n_layer=12 n_embd=64 n_shard=2 syncs=2 "
    expected += f"hidden_syncs=0 reduction_percent={100 * (1 - 2 / 24)} parameters=609344 tokens=10240000 "
    expected += "learning_rate=0.001 bracketed=False dtype=float32 seeds=1 step=10 max_iters=20 "
    expected += "val_loss=3.3 val_loss_sd= gap_margin= gap_step=10 verdict=unfinished"
    assert rows[4] == dict(pair.split("=") for pair in expected.split())


def test_what_is_no_run_is_skipped_with_a_note(runs, monkeypatch, capsys):
    """A folder without a log, a study's own, a run that has just started, logs that lack something."""
    monkeypatch.chdir(runs)
    for name in ("out-empty", "out-study/a", "out-started"):
        Path(name).mkdir(parents=True)
    Path("out-study/a/log.txt").write_bytes(Path("out-spd/log.txt").read_bytes())
    Path("out-study/table.csv").write_text("run,variant\n")
    Path("out-started/log.txt").write_text("")
    whole = Path("out-spd/log.txt").read_text()
    lacking = {
        "syncs": "# syncs:",
        "parameters": "# parameters:",
        "dtype": "# dtype:",
    }
    lacking |= {"config": "# config:", '"learning_rate": 0.001, ': "learning_rate", '"eval_iters": 5, ': "eval_iters"}
    for i, text in enumerate(lacking):
        Path(f"out-x{i}").mkdir()
        lines = whole.replace(text, "") if text.endswith(", ") else whole.replace(f"# {text}:", "# other:")
        Path(f"out-x{i}/log.txt").write_text(lines)
    Path("out-x9").mkdir()
    Path("out-x9/log.txt").write_text(whole.replace("(609344)", "(many)"))
    assert status(compare.main, sorted(map(str, Path().glob("out*")))) == 0
    out, err = capsys.readouterr()
    assert "fewest syncs" in out and len(out.split("\n")) == 8  # heading, four runs, verdict, figure
    notes = err.splitlines()
    assert len(notes) == 4 + len(lacking) and all(note.startswith("skipped: out-") for note in notes)
    assert "skipped: out-study: its runs are in folders of their own: compare.py out-study/*/" in notes
    assert "skipped: out-started/log.txt: its header is not that of a run: there is none, yet" in notes
    assert any("out-empty/log.txt: No such file or directory" in note for note in notes)
    for i, word in enumerate(lacking.values()):
        assert any(f"out-x{i}/log.txt: its header" in note and word in note for note in notes), (word, err)
    assert status(compare.main, ["out-study/a", "out-study/a/log.txt", "out-study/../out-study/a"]) == 0
    assert capsys.readouterr().out.count("\na ") == 1  # one run, named thrice
    assert status(compare.main, ["out-study/a", "out-study/table.csv"]) == 0
    assert "skipped: out-study/table.csv:1: not a line of a log" in capsys.readouterr().err
    assert status(compare.main, ["out-started", "out-empty"]) == 1
    assert capsys.readouterr().err.endswith("there is none, yet (and 1 more that are no runs)\n")


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["nowhere"], "nowhere: No such file or directory; name folders that hold a log.txt"),
        ([], "no out*/log.txt here; name the runs' folders"),
        (["text"], "text:1: not a line of a log: 'not a log'"),
        (["out-base", "--png=no/such/folder.png"], "no/such/folder.png: No such file or directory"),
        (["out-base", "--tolerance=nan"], "--tolerance=nan: tolerance must be float, not str"),
        (["out-base", "--tolerance=1e999"], "tolerance=inf must be at least 0, and below 2^63"),
        (["out-base", "--tolerance=-1"], "tolerance=-1.0 must be at least 0, and below 2^63"),
        (["out-base", "--latency=no.json"], "no.json: No such file or directory"),
        (
            ["out-base", "--latency=text"],
            "text: not what bench.py writes: Expecting value: line 1 column 1 (char 0)",
        ),
        (
            ["out-base", "--latency=old.json"],
            "old.json: not what bench.py decode writes now: 'model' is missing; measure again",
        ),
        (["out-base", "--accelerator=h200"], "--accelerator goes with --link"),
        (["out-base", "--csv=x.png", "--png=./x.png"], "--csv and --png are one file: x.png"),
        (["out-base", "--latency=a", "--link=nvlink"], "times are either measured, --latency, or predicted, --link"),
        (["out-base", "--batch=2"], "--batch goes with --latency or --link"),
        (["out-base", "--tp_size=2"], "--tp_size goes with --latency or --link"),
        (["out-base", "--link=nvlink"], "--link goes with --tp_size"),
    ],
    ids=str,
)
def test_mistakes_end_with_one_line(tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("not a log\n")
    old = {"tp_size": 2, "batch_size": 1, "prompt": 128, "patterns": [{"variant": "baseline", "tpot_s": 0.1}]}
    (tmp_path / "old.json").write_text(json.dumps({"results": [old]}))
    if arguments[:1] == ["out-base"]:
        make(tmp_path, "out-base", "2" * 12, [4.0])
    assert status(compare.main, arguments) == 1
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize("folder", sorted({path.parents[1] for path in RECORDED}), ids=lambda p: p.name)
def test_recorded_logs(folder, tmp_path):
    """The logs that the documents cite: complete and comparable."""
    loaded, _ = load_runs(sorted(path.parent for path in folder.glob("*/log.txt")))
    assert len(loaded) >= 4 and all(run.finished for run in loaded)
    # tuned, where they differ in the one, and with a baseline of each in the other
    assert all("learning_rate" in line or "dtype" in line for line in warnings(loaded))
    assert all(baseline_of(run, loaded).dtype == run.dtype for run in loaded)
    draw_comparison(loaded, tmp_path / "figure.png", 2)


def test_a_text_that_was_memorised(tmp_path):
    """Losses of 0.0000 have a gap of nothing, or one without end, and a figure."""
    make(tmp_path, "out-base", "22", [4.0, 1.0, 0.0])
    make(tmp_path, "out-spd", "11", [4.0, 1.0, 0.0])
    make(tmp_path, "out-late", "01", [4.0, 1.0, 0.5])
    loaded = load(tmp_path)
    assert [gap(run, loaded).percent for run in loaded] == [0.0, 0.0, float("inf")]
    draw_comparison(loaded, tmp_path / "figure.png", 2.0)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (dict(n_params=0), "parameters 0"),
        (dict(n_layer=True), "n_layer=True must be a positive integer"),
        (dict(n_embd=0), "n_embd=0 must be a positive integer"),
        (dict(batch_size="16"), "batch_size='16' must be a positive integer"),
        (dict(max_iters=0), "max_iters=0 must be a positive integer"),
        (dict(sizes=dict(vocab_size="many")), "invalid literal for int() with base 10: 'many'"),
    ],
    ids=str,
)
def test_a_run_of_an_impossible_size_is_skipped(tmp_path, keys, line):
    make(tmp_path, "out-none", "2", [4.0], **keys)
    with pytest.raises(ValueError, match=f"out-none/log.txt: its header is not that of a run: {re.escape(line)}"):
        load(tmp_path)


@pytest.mark.filterwarnings("error")
def test_a_run_that_has_not_evaluated_is_drawn_without_a_warning(tmp_path):
    make(tmp_path, "out-base", "22", [])
    draw_comparison(load(tmp_path), tmp_path / "figure.png", 2.0)


def test_names_that_break_no_table(tmp_path):
    """Fault 13: a folder's name is what a user made it, even of bytes that are no text."""
    make(tmp_path, "out\n| base", "2" * 12, [4.0, 3.0, 2.0])
    make(tmp_path, "out,\udcff", "1" * 12, [4.0, 3.1, 2.01])
    loaded = load(tmp_path)
    assert len(table(loaded, 2).split("\n")) == 3
    write_csv(loaded, tmp_path / "table.csv", 2)
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        assert [row[0] for row in csv.reader(file)] == ["run", "out | base", "out,\\udcff"]
