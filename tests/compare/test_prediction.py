"""The gaps of another size, extrapolated from those of several."""

import math
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
from launch import status
from make_runs import diverge, load, make, tune

import compare
from reduced_sync.compare.prediction import forms, predict


def test_a_prediction_for_another_size(tmp_path, capsys):
    """Two forms over ln N: a gap that is linear in it is found by the line, and by leaving the largest size out."""
    sizes = [(2, 64), (3, 96), (4, 128)]
    for n_layer, n_embd in sizes:
        grows = 1 + 0.5 * math.log(n_layer * n_embd**2 / (2 * 64**2))  # percent
        keys = dict(dropout=0.0, n_params=n_layer * n_embd**2 * 12, n_embd=n_embd, gradient_accumulation_steps=40000)
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
    assert lines[1].endswith(f", {target - statistics.fmean(last[1:]):.2f} apart")
    assert f"line {last[2]:+.2f} +- " in lines[2] and lines[2].endswith(f"measured {last[2]:+.2f}")
    gaps = {math.log(n): SimpleNamespace(percent=0.0, margin=0.3) for n in (1, 2, 4)}
    found = forms(gaps, math.log(8))
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
    with pytest.raises(ValueError, match="needs one way to sync with verdicts at two sizes or more"):
        predict([arm for arm in arms if arm.n_layer == 2], "12x768")
    keys |= dict(dropout=0.1)
    for seed in (1, 2):
        (tune if seed == 1 else make)(tmp_path, f"out-x{seed}", "0001", [4, 3, 2.5], seed=seed, **keys)
    with pytest.raises(ValueError, match="there are several arms of grouped-1 at 4x128: name the runs of one"):
        predict(load(tmp_path), "12x768")
    diverge(tmp_path, "out-x3", "0001", seed=3, **keys)  # so it has no verdict
    assert predict(load(tmp_path), "12x768").splitlines() == lines
