"""Runs of the training script that take milliseconds, and what they printed."""

import re

import pytest
from launch import ROOT, timeless

from reduced_sync import distributed
from reduced_sync.configurator import configure
from reduced_sync.train import experiment
from train_reduced_sync import Config, prepare

RANKS_AGREE = ROOT / "tests" / "ranks_agree.py"


def tiny(data, out_dir="out", **keys):
    """Arguments for a model that trains in milliseconds; grouped, 2 layers a group."""
    defaults = dict(
        sync="grouped-2", n_layer=4, n_head=4, n_embd=32, block_size=32, batch_size=2, gradient_accumulation_steps=4
    )
    defaults |= dict(learning_rate=5e-3, min_lr=5e-4, warmup_iters=5, max_iters=12, eval_interval=5, eval_iters=4)
    keys = defaults | dict(log_interval=1, device="cpu", dataset=data, out_dir=out_dir) | keys
    return [f"--{key}={value}" for key, value in keys.items()]


def log_lines(out_dir):
    return timeless((out_dir / "log.txt").read_text().splitlines())


def numbers(lines):
    """The numbers in the lines of a log, a row each, and the lines without them."""
    number = r"-?\d+(?:\.\d+)?"
    return [[float(n) for n in re.findall(number, line)] for line in lines], [re.sub(number, "#", x) for x in lines]


def assert_same_to_the_last_digit(lines, expected):
    """The same lines, numbers within one unit of the fourth decimal."""
    (a, forms), (b, other_forms) = numbers(lines), numbers(expected)
    assert forms == other_forms and len(lines) > 5
    for row, other, line in zip(a, b, lines, strict=True):
        assert row == pytest.approx(other, rel=0, abs=1.5e-4), (line, other)


def refused(argv, *words):
    with pytest.raises(ValueError) as error:
        prepare(configure(Config, argv))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), (word, str(error.value))


def pretend(monkeypatch, world_size, local_world_size=None):
    """Make this process believe that it is one of several."""
    monkeypatch.setattr(distributed, "WORLD_SIZE", world_size)
    monkeypatch.setattr(experiment, "WORLD_SIZE", world_size)
    monkeypatch.setattr(distributed, "LOCAL_WORLD_SIZE", local_world_size or world_size)


def chain(runs):
    """The arguments of several runs for ranks_agree.py."""
    return [argument for run in runs for argument in ["next", *run]][1:]
