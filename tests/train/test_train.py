"""The training script as users run it: log, layouts (invariants 4 and 5), config files, and that it learns."""

import hashlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launch import ROOT, TRAIN, run_script, succeeded, timeless
from tiny_runs import RANKS_AGREE, assert_same_to_the_last_digit, chain, log_lines, pretend, tiny

from reduced_sync.configurator import configure
from reduced_sync.distributed import Layout
from reduced_sync.train.log import read_log
from train_reduced_sync import Config, Trainer, prepare

CONFIGS = sorted((ROOT / "config").glob("train_*.py"))


# --- the log, the layouts, clipping

CLIP = 0.1  # below every gradient norm of these runs


def factorised(data, name, **keys):
    """Arguments of a run on the global batch of 8 sequences, evaluated on the same 8 windows at any batch_size."""
    keys = dict(batch_size=2, gradient_accumulation_steps=4, grad_clip=CLIP, eval_iters=4) | keys
    return tiny(data, f"out-{name}", **keys)


@pytest.fixture(scope="module")
def layouts(small_dataset, made_once):
    """A folder with the same run at every layout: out-1x1, out-wide, out-dp2, out-tp2, out-float16 and out-dp2-tp2."""

    def train(folder):
        out = succeeded(run_script([TRAIN, *factorised(small_dataset, "1x1")], cwd=folder))
        (folder / "stdout.txt").write_text(out)
        wide = factorised(small_dataset, "wide", batch_size=4, gradient_accumulation_steps=2, eval_iters=2)
        alone = [wide, factorised(small_dataset, "bfloat16", dtype="bfloat16")]
        alone += [factorised(small_dataset, f"dropout-{i}", dropout=0.2) for i in range(2)]
        alone += [factorised(small_dataset, "ladder", sync="grouped-2+ladder")]
        succeeded(run_script([RANKS_AGREE, *chain(alone)], cwd=folder))
        two = [factorised(small_dataset, "dp2"), factorised(small_dataset, "tp2", tp_size=2)]
        two += [factorised(small_dataset, "float16", tp_size=2, dtype="float16")]
        two += [factorised(small_dataset, "ladder-tp2", sync="grouped-2+ladder", tp_size=2)]
        out = succeeded(run_script([RANKS_AGREE, *chain(two)], nproc=2, cwd=folder))
        assert out.count("2 ranks agree\n") == 4
        four = factorised(small_dataset, "dp2-tp2", tp_size=2)
        out = succeeded(run_script([RANKS_AGREE, *four], nproc=4, cwd=folder))
        assert out.count("4 ranks agree\n") == 1

    return made_once("layouts", train)


def test_the_log_describes_the_run(layouts, small_dataset):
    log = read_log(layouts / "out-1x1" / "log.txt")
    header = log.header
    assert header["sync"] == "grouped-2"
    assert header["drawn"] == "AM AM| AM AM|" and header["syncs"] == "2 of 8 (75.0% fewer)"
    assert header["layout"] == "dp 1 x tp 1, 2 shards per rank"
    assert header["sync payload"].startswith(f"float32, {2 * 32 * 32 * 4} bytes")
    assert header["torch"] == torch.__version__ and re.fullmatch(
        r"cpu \(.+, with(out)? bfloat16 instructions\), 1 threads per process", header["device"]
    )
    digest = hashlib.sha256((small_dataset / "val.bin").read_bytes()).hexdigest()
    assert header["val data"] == f"sha256 {digest}" and header["train data"].startswith("sha256 ")
    assert re.fullmatch(r"([0-9a-f]{40}( \(dirty\))?|unknown)", header["git commit"])
    n_params = 12 * 4 * 32**2 + (2 * 4 * 2 + 1) * 32 + (128 + 32) * 32  # matrices, norms of 2 shards, embeddings
    assert header["parameters"] == f"{n_params / 1e6:.2f}M ({n_params})"
    assert (header["vocab_size"], header["head_size"]) == ("128", "8")
    assert header["dtype"] == "float32" and header["tokens a step"] == str(4 * 2 * 32) and "started" in header
    config = header["config"]
    assert set(config) == {field for field in Config.__dataclass_fields__}
    assert (config["n_embd"], config["dataset"], config["grad_clip"]) == (32, str(small_dataset), CLIP)
    assert read_log(layouts / "out-tp2" / "log.txt").header["layout"] == "dp 1 x tp 2, 1 shards per rank"
    assert read_log(layouts / "out-dp2-tp2" / "log.txt").header["layout"] == "dp 2 x tp 2, 1 shards per rank"


def test_the_log_has_a_line_for_each_evaluation_and_update(layouts):
    log = read_log(layouts / "out-1x1" / "log.txt")
    assert [row[0] for row in log.evaluations] == [0, 5, 10, 12]
    assert [row[0] for row in log.iterations] == list(range(12))
    text = (layouts / "out-1x1" / "log.txt").read_text()
    found = [line for line in text.splitlines() if "val loss" in line]
    assert len(found) == 4
    assert all(re.fullmatch(r"step \d+: train loss \d+\.\d{4}, val loss \d+\.\d{4}", line) for line in found)
    # on the screen there is the same
    assert timeless((layouts / "stdout.txt").read_text().splitlines()) == timeless(text.splitlines())


@pytest.mark.parametrize("name", ["wide", "dp2", "tp2", "dp2-tp2"])
def test_the_same_global_batch_at_any_layout(layouts, name):
    """Losses and gradient norms, clipped at every step, within one unit of the last digit."""
    expected = log_lines(layouts / "out-1x1")
    assert_same_to_the_last_digit(log_lines(layouts / f"out-{name}"), expected)
    norms = [row[4] for row in read_log(layouts / f"out-{name}" / "log.txt").iterations]
    assert min(norms) > 2 * CLIP


def test_overlap_trains_the_same_on_two_ranks(layouts):
    """With an all-reduce that really is in flight, and a header that says what is hidden."""
    lines = log_lines(layouts / "out-ladder")
    assert_same_to_the_last_digit(log_lines(layouts / "out-ladder-tp2"), lines)
    assert lines != log_lines(layouts / "out-1x1")
    header = read_log(layouts / "out-ladder-tp2" / "log.txt").header
    assert (header["syncs"], header["hidden syncs"]) == ("2 of 8 (75.0% fewer)", "1")
    assert read_log(layouts / "out-1x1" / "log.txt").header["hidden syncs"] == "0"


@pytest.mark.parametrize("name", ["dp2", "tp2", "dp2-tp2"])
def test_checkpoints_do_not_depend_on_the_layout(layouts, name):
    a, b = (torch.load(layouts / f"out-{one}" / "ckpt.pt", weights_only=True) for one in ("1x1", name))
    assert a["model"].keys() == b["model"].keys()
    for key, tensor in a["model"].items():
        torch.testing.assert_close(b["model"][key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_half_precision(layouts, kind):
    """Finite and near the float32 run; float16 with the GradScaler on two tensor-parallel ranks, which stayed equal."""
    log, expected = (read_log(layouts / f"out-{one}" / "log.txt") for one in (kind, "1x1"))
    assert log.header["dtype"] == kind
    losses, wanted = ([row[2] for row in one.evaluations] for one in (log, expected))
    assert np.isfinite([row[1] for row in log.iterations]).all()
    assert losses == pytest.approx(wanted, abs=0.1) and losses != wanted
    assert losses[-1] < losses[0] - 0.5
    if kind == "float16":
        saved = torch.load(layouts / "out-float16" / "ckpt.pt", weights_only=True)
        assert saved["scaler"]["scale"] == 2.0 ** (16 - saved["skipped"])  # halved where a gradient overflowed


def test_dropout_is_reproducible(layouts):
    first, second = (log_lines(layouts / f"out-dropout-{i}") for i in range(2))
    assert first == second
    assert first[2:] != log_lines(layouts / "out-1x1")[2:]


# --- the config files


def syncs_in_name(path):
    return int(re.search(r"_(\d+)sync", path.stem)[1])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_config_files_on_eight_processes_in_theory(path, small_dataset, tmp_path, monkeypatch):
    """As they are, except for data and device: what can be checked without a process group."""
    pretend(monkeypatch, 8)
    config = configure(Config, [str(path), f"--dataset={small_dataset}", "--device=cpu", f"--out_dir={tmp_path}"])
    *_, model_config, _ = prepare(config)
    n_syncs = syncs_in_name(path)
    assert model_config.rule.syncs == n_syncs
    assert (model_config.n_layer, model_config.n_embd, model_config.n_shard, config.tp_size) == (12, 768, 2, 1)
    assert config.gradient_accumulation_steps * config.batch_size * config.block_size == 491_520
    text = path.read_text()
    assert model_config.rule.diagram in text and f"{n_syncs} syncs" in text
    assert configure(Config, [str(path)]).out_dir == f"out-{path.stem.removeprefix('train_').replace('_', '-')}"


def test_the_commands_of_the_documents_are_accepted(small_dataset, tmp_path, monkeypatch):
    documents = [ROOT / "README.md", ROOT / "TRAINING_INSTRUCTIONS.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(path.read_text() for path in documents).replace("\\\n", " ")
    for names, body in re.findall(r"for name in ([^;]*); do\n(.*?)\ndone", text, flags=re.DOTALL):
        text = text.replace(body, "\n".join(body.replace("$name", name) for name in names.split()))
    commands = re.findall(r"torchrun .*train_reduced_sync.py [^#|\n]*", text)
    for command in commands:
        launcher, _, argv = command.partition("train_reduced_sync.py")
        local, nodes = (re.search(rf"--{key}=(\d+)", launcher) for key in ("nproc_per_node", "nnodes"))
        pretend(monkeypatch, int(local[1]) * int(nodes[1] if nodes else 1), int(local[1]))
        argv = [argument for argument in argv.split() if argument.startswith(("config/", "--"))]
        replaced = [f"--dataset={small_dataset}", "--block_size=64", "--device=cpu", f"--out_dir={tmp_path}"]
        prepare(configure(Config, [*argv, *replaced]))
    assert len(commands) > 12 and any("out-smoke" in command for command in commands)


@pytest.mark.timeout(400)
def test_the_config_files_on_eight_processes(small_dataset, tmp_path):
    """Each in turn in the same eight processes."""
    small = ["config/on_cpu.py", f"--dataset={small_dataset}", "--max_iters=2", "--warmup_iters=1", "--eval_iters=1"]
    small += ["--n_embd=32"]
    runs = [[f"config/{path.name}", *small] for path in CONFIGS]
    out = succeeded(run_script([RANKS_AGREE, *chain(runs)], nproc=8, cwd=tmp_path, timeout=200))
    assert out.count("8 ranks agree\n") == len(CONFIGS) == 7
    for path in CONFIGS:
        log = read_log(tmp_path / f"out-{path.stem.removeprefix('train_').replace('_', '-')}-cpu" / "log.txt")
        assert log.header["layout"] == "dp 8 x tp 1, 2 shards per rank"
        assert log.header["syncs"].startswith(f"{syncs_in_name(path)} of 24 ")
        assert [row[0] for row in log.evaluations] == [0, 2] and [row[0] for row in log.iterations] == [0]
        assert all(np.isfinite(row[1:]).all() for row in log.evaluations)


# --- it learns


def cross_entropies(folder):
    """Nats per character of val.bin under the unigram and bigram statistics of train.bin, smoothed by one half."""
    train, val = (np.fromfile(folder / f"{split}.bin", dtype="<u2").astype(np.int64) for split in ("train", "val"))
    size = json.loads((folder / "meta.json").read_text())["vocab_size"]
    unigram = np.bincount(train, minlength=size) + 0.5
    bigram = np.bincount(train[:-1] * size + train[1:], minlength=size**2).reshape(size, size) + 0.01
    unigram, bigram = np.log(unigram / unigram.sum()), np.log(bigram / bigram.sum(1, keepdims=True))
    return -unigram[val].mean(), -bigram[val[:-1], val[1:]].mean()


@pytest.mark.timeout(240)
def test_it_learns(text_dataset, tmp_path):
    """Below the unigram entropy a model knows which character stands before; below the bigram's it attends further."""
    unigram, bigram = cross_entropies(text_dataset)
    keys = dict(n_layer=2, n_embd=64, block_size=64, batch_size=16, gradient_accumulation_steps=1)
    keys |= dict(learning_rate=1e-2, min_lr=1e-3, warmup_iters=30, max_iters=400)
    keys |= dict(eval_interval=200, eval_iters=0, log_interval=50)
    succeeded(run_script([TRAIN, *tiny(text_dataset, **keys)], cwd=tmp_path, timeout=200))
    (_, _, first), _, (_, train_loss, val_loss) = read_log(tmp_path / "out" / "log.txt").evaluations
    print(f"unigram {unigram:.3f}, bigram {bigram:.3f}, untrained {first:.3f}, trained {val_loss:.3f}")
    assert first == pytest.approx(np.log(128), abs=0.3)  # nearly uniform at first
    assert val_loss < bigram < unigram - 0.5
    assert abs(val_loss - train_loss) < 0.3


# --- what else can be switched on


def test_wandb_failing_does_not_stop_the_run(small_dataset, tmp_path):
    """A wandb that cannot start, then one that starts and cannot log."""
    (tmp_path / "wandb.py").write_text(
        """
import os

class Run:
    def log(self, *_, **__):
        raise ConnectionError("no network when logging")

def init(**_):
    if not os.path.exists("started"):
        os.mkdir("started")
        raise PermissionError("cannot write when starting")
    return Run()
"""
    )
    runs = [tiny(small_dataset, name, wandb_log=True, max_iters=2, warmup_iters=1) for name in ("out-1", "out-2")]
    env = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    process = run_script([RANKS_AGREE, *chain(runs)], cwd=tmp_path, env=env)
    succeeded(process)
    said = [line for line in process.stderr.splitlines() if "wandb" in line]
    assert said == [
        "wandb failed, going on without it: cannot write when starting",
        "wandb failed, going on without it: no network when logging",
    ]
    assert log_lines(tmp_path / "out-1") == log_lines(tmp_path / "out-2")
    assert [row[0] for row in read_log(tmp_path / "out-2" / "log.txt").evaluations] == [0, 2]


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wandb_without_a_login_asks_nothing(tmp_path, mode):
    """On a terminal, where it would: offline it logs, online the run goes on without it."""
    code = "from reduced_sync.train.recorder import WandB\nfrom reduced_sync.train.experiment import Config\n"
    code += "print(WandB(Config(wandb_log=True)).run is not None)"
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    env |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_MODE": mode, "PYTHONPATH": str(ROOT)}
    ours, terminal = pty.openpty()
    keys = dict(stdin=terminal, stdout=subprocess.PIPE, stderr=terminal, text=True, cwd=tmp_path, timeout=60)
    process = subprocess.run([sys.executable, "-c", code], env=env, **keys)
    said = os.read(ours, 10_000).decode()
    os.close(ours)
    os.close(terminal)
    assert process.returncode == 0 and process.stdout.startswith(f"{mode == 'offline'}\n"), said
    if mode == "online":
        assert said.startswith("wandb failed, going on without it: No API key") and said.count("\n") == 1


@pytest.mark.timeout(300)
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler for torch.compile")
def test_torch_compile(small_dataset, tmp_path):
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    keys = dict(sync="spd", n_layer=1)
    runs = [factorised(small_dataset, f"compile-{on}", compile=on, **keys) for on in (True, False)]
    succeeded(run_script([RANKS_AGREE, *chain(runs)], cwd=tmp_path, env=env, timeout=280))
    assert_same_to_the_last_digit(log_lines(tmp_path / "out-compile-True"), log_lines(tmp_path / "out-compile-False"))


def trainer(*args, **keys):
    """A Trainer of a tiny run on one rank."""
    config = configure(Config, tiny(*args, **keys))
    return Trainer(config, Layout(torch.device("cpu"), torch.float32), prepare(config))


def test_no_dropout_in_evaluation(small_dataset, tmp_path):
    stop = SimpleNamespace(asked=None, agreed=False)
    without, with_it = (trainer(small_dataset, tmp_path, dropout=dropout).evaluate(stop) for dropout in (0.0, 0.2))
    assert without == with_it


def test_the_seed_makes_the_initial_weights(small_dataset, tmp_path):
    one, other, again = (trainer(small_dataset, tmp_path, seed=seed).model.lm_head.weight for seed in (1, 2, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
