"""Golden losses: 20 steps whose every printed digit is recorded in tests/golden, and must not move when code does.

After a change that is meant to change them: PYTHONPATH=.:tests python tests/train/test_golden.py records them anew.
"""

import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from launch import ROOT, run_script, succeeded, timeless

from reduced_sync import preparing

GOLDEN = ROOT / "tests" / "golden"
VARIANTS = {
    "baseline": dict(sync="baseline"),
    "spd": dict(sync="spd"),
    "grouped": dict(sync="grouped-2"),
    "ladder": dict(sync="spd+ladder"),
    "modern": dict(sync="spd", norm="rmsnorm", position="rope", mlp="swiglu", n_kv_head=2, n_hidden=96),
}
SHAPE = dict(n_layer=4, n_head=4, n_embd=32, block_size=32, batch_size=4, gradient_accumulation_steps=2, bias=True)
SHAPE |= dict(max_iters=20, eval_interval=10, eval_iters=4, log_interval=1, warmup_iters=5, learning_rate=1e-2)


def tokens(n, seed):
    """A stream that can be learned: each token lies near thrice the one before it."""
    steps = np.random.default_rng(seed).integers(4, size=n)
    stream = np.zeros(n, "<u2")
    for i in range(1, n):
        stream[i] = (3 * stream[i - 1] + steps[i]) % 64
    return stream


def train(folder, tp_size):
    """{name of a variant: the `step` and `iter` lines of its log} of runs on `tp_size` processes."""
    splits = {split: (20_000, [tokens(20_000, seed)]) for seed, split in enumerate(("train", "val"))}
    chars = "".join(map(chr, range(32, 96)))
    preparing.write_dataset(folder / "data", splits, vocab_size=64, tokenizer="char", chars=chars, source="thrice")
    argv = []
    for name, keys in VARIANTS.items():
        keys = SHAPE | keys | dict(tp_size=tp_size, device="cpu", dataset=folder / "data", out_dir=folder / name)
        argv += ["next", *(f"--{key}={value}" for key, value in keys.items())]
    nproc = tp_size if tp_size > 1 else None
    succeeded(run_script([ROOT / "tests" / "ranks_agree.py", *argv[1:]], nproc=nproc, timeout=200))
    return {name: timeless((folder / name / "log.txt").read_text().splitlines()) for name in VARIANTS}


@pytest.mark.parametrize("tp_size", [1, 2])
def test_losses_are_those_on_record(tmp_path, tp_size):
    """To the last printed digit, give or take one: other processors round otherwise."""
    for name, lines in train(tmp_path, tp_size).items():
        recorded = (GOLDEN / f"{name}-tp{tp_size}.txt").read_text().splitlines()
        assert len(lines) == len(recorded) == 3 + 20
        for line, other in zip(lines, recorded, strict=True):
            (form, a), (other_form, b) = (
                (re.sub(r"\d+\.\d+", "x", t), re.findall(r"\d+\.\d+", t)) for t in (line, other)
            )
            assert form == other_form
            assert [*map(float, a)] == pytest.approx([*map(float, b)], rel=0, abs=1.01e-4), (name, line, other)


if __name__ == "__main__":
    for tp_size in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            for name, lines in train(Path(folder), tp_size).items():
                (GOLDEN / f"{name}-tp{tp_size}.txt").write_text("\n".join(lines) + "\n")
    sys.exit()
