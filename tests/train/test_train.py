"""The training script as users run it: errors, log, layouts (invariants 4 and 5), resuming (6), and that it learns."""

import hashlib
import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from launch import ROOT, TRAIN, ending, one_line_error, run_script, start, succeeded, timeless

import train_reduced_sync as script
from reduced_sync import distributed
from reduced_sync.configurator import configure
from reduced_sync.files import lock_folder
from reduced_sync.train import experiment
from reduced_sync.train.log import read_log
from train_reduced_sync import Config, prepare

pytestmark = pytest.mark.timeout(200)
CONFIGS = sorted((ROOT / "config").glob("train_*.py"))
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


# --- a. errors


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
    monkeypatch.setattr(experiment, "LOCAL_WORLD_SIZE", local_world_size or world_size)


@pytest.mark.parametrize(
    "keys, words",
    [
        (dict(batchsize=3), ["unknown key 'batchsize'", "batch_size"]),
        (dict(batch_size=2.5), ["batch_size must be int, not float"]),
        (dict(n_head=4, n_shard=3), ["n_head=4 is not divisible by n_shard=3"]),
        (dict(n_embd=33), ["n_embd=33 is not divisible by n_head=4"]),
        (dict(n_shard=4, tp_size=3), ["the world size, 1 processes, is not divisible by tp_size=3"]),
        (dict(tp_size=2), ["world size, 1", "tp_size=2"]),
        (dict(block_size=10**6), ["train.bin", "too few for block_size=1000000"]),
        (dict(sync="gpt"), ["sync='gpt'", "baseline, spd, grouped-N"]),
        (dict(sync="grouped-3"), ["grouped-3", "n_layer=4", "allowed: grouped-1, grouped-2, grouped-4"]),
        (dict(sync="111"), ["sync='111'", "3 characters", "n_layer=4"]),
        (dict(sync="1131"), ["sync='1131'", "2 1 0 a"]),
        (dict(sync="111a"), ["sync='111a'", "1 or 2"]),
        (dict(sync="baseline+parallel"), ["sync='baseline+parallel'", "1 and 0"]),
        (dict(sync="spd+later"), ["sync='spd+later'", "ladder", "delayed"]),
        (dict(sync="grouped-1+ladder"), ["sync='grouped-1+ladder'", "single sync"]),
        (dict(architecture="grouped", layers_per_group=2), ["architecture, layers_per_group", "sync='grouped-2'"]),
        (dict(overlap="ladder"), ["overlap", "sync='baseline+ladder'"]),
        (dict(sync_pattern="0101"), ["sync_pattern", "sync='0101'"]),
        (dict(dataset="no_such_data"), ["no_such_data", "prepare"]),
        (dict(dropout=1.0), ["dropout=1.0", "below 1"]),
        (dict(dropout=-0.1), ["dropout=-0.1", "at least 0"]),
        (dict(device="tpu"), ["device='tpu'", "cuda, cuda:N and cpu"]),
        (dict(device=""), ["device=''", "cuda, cuda:N and cpu"]),  # of an empty variable of the shell
        (dict(dtype="int8"), ["dtype='int8'", "float32, bfloat16, float16"]),
        (dict(backend="mpi"), ["backend='mpi'", "nccl", "gloo"]),
        (dict(backend=""), ["backend=''", "nccl", "gloo"]),
        (dict(backend="nccl"), ["backend='nccl'", "gloo"]),
        (dict(eval_interval=0), ["eval_interval=0", "at least 1"]),
        (dict(max_iters=0), ["max_iters=0", "at least 1"]),
        (dict(eval_iters=-1), ["eval_iters=-1", "at least 0"]),
        (dict(learning_rate="1e999"), ["learning_rate=inf", "below 2^63"]),
        (dict(max_iters=2**63), [f"max_iters={2**63}", "below 2^63"]),
        (dict(timeout_s=10**15), ["timeout_s=1000000000000000", "below 1000000"]),
        (dict(lr_decay_iters=-1), ["lr_decay_iters=-1", "at least 1"]),
        (dict(lr_decay_iters=0), ["lr_decay_iters=0", "at least 1"]),
        (dict(min_lr=6e-3), ["min_lr=0.006 is above learning_rate=0.005", "--min_lr=0.0005"]),
        (dict(learning_rate=1e-4), ["min_lr=0.0005 is above learning_rate=0.0001", "--min_lr=1e-05"]),
        (dict(warmup_iters=2000, max_iters=20), ["warmup_iters=2000", "past step 20", "--warmup_iters=2"]),
        (dict(lr_decay_iters=4), ["warmup_iters=5", "past step 4"]),
        (dict(warmup_iters=13, lr_decay_iters=100), ["warmup_iters=13", "past step 12"]),
        (dict(learning_rate="nan"), ["learning_rate", "float"]),
        (dict(beta2=1.0), ["beta2=1.0", "below 1"]),
        (dict(seed=-1), ["seed=-1", "at least 0"]),
        (dict(seed=10**30), ["seed"]),
        (dict(device="cpu:x"), ["device='cpu:x'"]),
        (dict(init_from="gpt3"), ["init_from='gpt3'", "scratch and resume"]),
        (dict(init_from="resume"), ["no checkpoint", "ckpt.pt"]),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused(small_dataset, tmp_path, keys, words):
    refused(tiny(small_dataset, tmp_path, **keys), *words)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("switch", [dict(decay_lr=False), dict(eval_only=True)], ids=str)
def test_a_schedule_that_is_not_used_is_not_refused(small_dataset, tmp_path, switch):
    prepare(configure(Config, tiny(small_dataset, tmp_path, warmup_iters=2000, min_lr=1.0, **switch)))


def test_a_device_that_is_not_there(small_dataset, tmp_path):
    refused(tiny(small_dataset, tmp_path, device="cuda"), "device='cuda'", "--device=cpu")


@pytest.mark.parametrize(
    "world_size, keys, words",
    [
        (3, dict(tp_size=2), ["world size, 3", "tp_size=2"]),
        (3, dict(gradient_accumulation_steps=4), ["gradient_accumulation_steps=4", "3 data-parallel replicas"]),
        (8, dict(tp_size=2, gradient_accumulation_steps=6), ["gradient_accumulation_steps=6", "4 data-parallel"]),
        (2, dict(tp_size=2, dropout=0.1), ["dropout=0.1", "needs tp_size=1, not 2"]),
    ],
    ids=str,
)
def test_layouts_that_do_not_fit(small_dataset, tmp_path, monkeypatch, world_size, keys, words):
    pretend(monkeypatch, world_size)
    refused(tiny(small_dataset, tmp_path, **keys), *words)


def test_a_tp_group_over_two_nodes(small_dataset, tmp_path, monkeypatch):
    pretend(monkeypatch, 6, local_world_size=3)
    refused(
        tiny(small_dataset, tmp_path, tp_size=2, gradient_accumulation_steps=3), "tp_size=2", "3 processes of a node"
    )


def test_an_out_dir_in_use_or_not_writable(tmp_path):
    config = Config(out_dir=str(tmp_path / "out"))
    with lock_folder(config.out_dir), pytest.raises(ValueError, match=r"out_dir='.*out' is in use by another live run"):
        lock_folder(config.out_dir)
    lock_folder(config.out_dir).close()
    refused(["--out_dir="], "out_dir is empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out_dir='.*file' cannot be written: File exists"):
        lock_folder(str(tmp_path / "file"))


GPT2 = dict(init_from="gpt2", n_layer=12, n_head=12, n_embd=768, sync="baseline")


def with_meta(dataset, folder, **keys):
    """A copy of the dataset, with other keys in its meta.json."""
    shutil.copytree(dataset, folder)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | keys))
    return folder


def test_a_vocabulary_that_gpt2_does_not_have(small_dataset, tmp_path):
    data = with_meta(small_dataset, tmp_path / "data", vocab_size=50258)
    refused(tiny(data, tmp_path / "out", **GPT2), "dataset", "more tokens than gpt2: 50257")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["config/train_spd_12sync.py", "--batchsize=3"], ["--batchsize=3", "unknown key", "batch_size"]),
        (["config/train_grouped_2sync.py", "--n_layer=9"], ["grouped-2", "n_layer=9"]),
        (["--dataset=missing"], ["meta.json", "prepare the data first", "a folder under"]),
    ],
)
def test_the_script_ends_with_one_line(tmp_path, argv, words):
    process = run_script([TRAIN, *argv, "--device=cpu"], cwd=tmp_path)
    one_line_error(process, *words)
    assert process.stdout == "" and not os.listdir(tmp_path)


def test_an_error_under_torchrun_is_said_once(small_dataset, tmp_path):
    process = run_script([TRAIN, *tiny(small_dataset, tp_size=3, n_shard=3, n_head=3)], nproc=2, cwd=tmp_path)
    assert process.returncode != 0
    output = process.stdout + process.stderr
    lines = [line for line in output.splitlines() if line.startswith("error: ") or "rank 1:" in line]
    assert lines == ["error: the world size, 2 processes, is not divisible by tp_size=3"], output
    assert 'train_reduced_sync.py", line' not in output  # no traceback of ours


def test_losses_that_are_not_finite_stop_the_run(small_dataset, tmp_path):
    keys = dict(learning_rate=1e18, min_lr=1e18, max_bad_steps=3, grad_clip=0.0, warmup_iters=0, weight_decay=0.0)
    process = run_script([TRAIN, *tiny(small_dataset, max_iters=50, eval_interval=50, **keys)], cwd=tmp_path)
    assert process.returncode == 1
    errors = [line for line in process.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and "the last 3 steps were not finite; lower learning_rate" in errors[0]
    log = read_log(tmp_path / "out" / "log.txt")
    assert [not np.isfinite(row[1]) or not np.isfinite(row[4]) for row in log.iterations][-4:] == [False] + 3 * [True]


# --- b. c. d. the log, the layouts, clipping

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


def chain(runs):
    """The arguments of several runs for ranks_agree.py."""
    return [argument for run in runs for argument in ["next", *run]][1:]


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


@pytest.mark.parametrize("name, kind", [("bfloat16", "bfloat16"), ("float16", "float16")])
def test_half_precision(layouts, name, kind):
    """Finite and near the float32 run; float16 with the GradScaler on two tensor-parallel ranks, which stayed equal."""
    log, expected = (read_log(layouts / f"out-{one}" / "log.txt") for one in (name, "1x1"))
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


# --- e. the config files


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
    assert model_config.rule.drawing in text and f"{n_syncs} syncs" in text
    assert path.stem.removeprefix("train_").replace("_", "-") == config.wandb_run_name
    assert configure(Config, [str(path)]).out_dir == f"out-{config.wandb_run_name}"


def unrolled(names, body):
    """The commands of a shell loop over `names`."""
    return "\n".join(body.replace("$name", name) for name in names.split())


def test_the_commands_of_the_documents_are_accepted(small_dataset, tmp_path, monkeypatch):
    documents = [ROOT / "README.md", ROOT / "TRAINING_INSTRUCTIONS.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(path.read_text() for path in documents).replace("\\\n", " ")
    text = re.sub(r"for name in ([^;]*); do\n(.*?)\ndone", lambda loop: unrolled(*loop.groups()), text, flags=re.DOTALL)
    commands = re.findall(r"torchrun .*train_reduced_sync.py [^#|\n]*", text)
    for command in commands:
        launcher, _, argv = command.partition("train_reduced_sync.py")
        local, nodes = (re.search(rf"--{key}=(\d+)", launcher) for key in ("nproc_per_node", "nnodes"))
        pretend(monkeypatch, int(local[1]) * int(nodes[1] if nodes else 1), int(local[1]))
        argv = [argument for argument in argv.split() if argument.startswith(("config/", "--"))]
        replaced = [f"--dataset={small_dataset}", "--block_size=64", "--device=cpu", f"--out_dir={tmp_path}"]
        prepare(configure(Config, [*argv, *replaced]))
    assert len(commands) > 12 and any("out-smoke" in command for command in commands)


def assert_run_of_config(folder, path):
    log = read_log(folder / f"out-{path.stem.removeprefix('train_').replace('_', '-')}-cpu" / "log.txt")
    assert log.header["layout"] == "dp 8 x tp 1, 2 shards per rank"
    assert log.header["syncs"].startswith(f"{syncs_in_name(path)} of 24 ")
    assert [row[0] for row in log.evaluations] == [0, 2] and [row[0] for row in log.iterations] == [0]
    assert all(np.isfinite(row[1:]).all() for row in log.evaluations)


@pytest.mark.timeout(400)
def test_the_config_files_on_eight_processes(small_dataset, tmp_path):
    """Each in turn in the same eight processes."""
    small = ["config/on_cpu.py", f"--dataset={small_dataset}", "--max_iters=2", "--warmup_iters=1", "--eval_iters=1"]
    small += ["--n_embd=32"]
    runs = [[f"config/{path.name}", *small] for path in CONFIGS]
    out = succeeded(run_script([RANKS_AGREE, *chain(runs)], nproc=8, cwd=tmp_path, timeout=200))
    assert out.count("8 ranks agree\n") == len(CONFIGS) == 7
    for path in CONFIGS:
        assert_run_of_config(tmp_path, path)


# --- f. it learns


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


# --- g. resuming

LONG = dict(max_iters=160, eval_interval=40, checkpoint_minutes=0.001)


def interrupt(argv, folder, number, after):
    """Start the script, send it the signal once the log has the line of update `after`; returns code and stdout."""
    log = folder / "out" / "log.txt"
    with ending(start([TRAIN, *argv], cwd=folder)) as process:
        end = time.monotonic() + 60
        while not (log.exists() and f"iter {after}:" in log.read_text()):
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.01)
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    return process.returncode, out


@pytest.fixture(scope="module")
def resumed(small_dataset, made_once):
    """Folders: `whole` with an uninterrupted run, `halves` with one that was stopped, killed and resumed each time.

    `stopped` is `halves` as the first stop left it.
    """

    def train(root):
        for name in ("whole", "halves"):
            (root / name).mkdir()
        argv = tiny(small_dataset, **LONG)
        succeeded(run_script([TRAIN, *argv], cwd=root / "whole"))
        code, out = interrupt(argv, root / "halves", signal.SIGTERM, after=25)
        assert code == 0 and re.search(r"stopped at step \d+ and saved; go on with --init_from=resume\n$", out)
        shutil.copytree(root / "halves", root / "stopped")
        code, _ = interrupt([*argv, "--init_from=resume"], root / "halves", signal.SIGKILL, after=90)
        assert code == -signal.SIGKILL
        succeeded(run_script([TRAIN, *argv, "--init_from=resume"], cwd=root / "halves"))

    return made_once("resumed", train)


def load(folder):
    return torch.load(folder / "out" / "ckpt.pt", weights_only=True)


def test_an_interrupted_run_ends_as_the_uninterrupted_one(resumed):
    """Invariant 6: bit-equal weights, optimizer and log lines after a SIGTERM and a SIGKILL."""
    assert 25 < load(resumed / "stopped")["step"] < 160
    text = (resumed / "halves" / "out" / "log.txt").read_text()
    assert text.count("# started") == 1 and text.count("# resumed at step") == 2
    lines = log_lines(resumed / "whole" / "out")
    assert len(lines) == 160 + 5
    assert log_lines(resumed / "halves" / "out") == lines
    a, b = load(resumed / "whole"), load(resumed / "halves")
    assert (a["step"], a["evaluated"], a["best_val_loss"]) == (b["step"], b["evaluated"], b["best_val_loss"])
    assert a["step"] == 160 and a["model"].keys() == b["model"].keys()
    for name, tensor in a["model"].items():
        assert torch.equal(tensor, b["model"][name]), name
        for key, moment in a["optimizer"][name].items():
            assert torch.equal(moment, b["optimizer"][name][key]), (name, key)


def test_resuming_at_another_tp_size(resumed, small_dataset, tmp_path):
    """The same to the last digit for 30 steps after the stop; afterwards rounding may have grown into the digits."""
    shutil.copytree(resumed / "stopped", tmp_path, dirs_exist_ok=True)
    step = load(tmp_path)["step"]
    argv = tiny(small_dataset, **LONG, tp_size=2, init_from="resume")
    succeeded(run_script([TRAIN, *argv], nproc=2, cwd=tmp_path))
    header = read_log(tmp_path / "out" / "log.txt").header
    assert header["layout"] == "dp 1 x tp 2, 1 shards per rank" and f"resumed at step {step}" in header
    lines, expected = log_lines(tmp_path / "out"), log_lines(resumed / "whole" / "out")
    n = next((i for i, line in enumerate(expected) if line.startswith(f"iter {step + 30}:")), 160)
    assert len(lines) == len(expected)
    assert_same_to_the_last_digit(lines[:n], expected[:n])
    assert numbers(lines)[0][-1] == pytest.approx(numbers(expected)[0][-1], abs=0.05)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_finished_run_resumed_or_evaluated_is_unchanged(resumed, small_dataset, tmp_path):
    shutil.copytree(resumed / "whole", tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path / "out")
    argv = tiny(small_dataset, **LONG, init_from="resume")
    out = succeeded(run_script([TRAIN, *argv], cwd=tmp_path))
    assert out == "out: finished already, at step 160 of 160: nothing to do\n"
    out = succeeded(run_script([TRAIN, *argv, "--eval_only=True"], cwd=tmp_path))
    assert out == log_lines(tmp_path / "out")[-1] + "\n"
    assert contents(tmp_path / "out") == before


def test_starting_over_in_the_folder_of_a_run_is_refused(resumed, small_dataset):
    refused(tiny(small_dataset, resumed / "whole" / "out", **LONG), "holds a run already", "--init_from=resume")


@pytest.mark.parametrize(
    "keys, words",
    [
        (dict(n_shard=4), ["n_shard=2, not 4"]),
        (dict(sync="spd"), ["sync='grouped-2', not 'spd'"]),
        (dict(n_embd=64, bias=True), ["n_embd=32, not 64; bias=False, not True"]),
    ],
    ids=str,
)
def test_resuming_another_model_names_the_fields(resumed, small_dataset, keys, words):
    argv = tiny(small_dataset, resumed / "whole" / "out", init_from="resume", **LONG, **keys)
    refused(argv, "another model", "ckpt.pt", *words)


def test_resuming_with_another_dropout_or_schedule_is_allowed(resumed, small_dataset):
    keys = LONG | dict(init_from="resume", dropout=0.1, learning_rate=6e-4, max_iters=500)
    *_, saved = prepare(configure(Config, tiny(small_dataset, resumed / "whole" / "out", **keys)))
    assert saved["step"] == 160


def test_resuming_with_other_settings_says_which(resumed, small_dataset, tmp_path):
    """In the terminal and in the log; what changes nothing that is learned is not named."""
    shutil.copytree(resumed / "stopped", tmp_path, dirs_exist_ok=True)
    step = load(tmp_path)["step"]
    keys = LONG | dict(max_iters=step + 1, init_from="resume", learning_rate=1e-3, dropout=0.1, log_interval=2)
    out = succeeded(run_script([TRAIN, *tiny(small_dataset, **keys)], cwd=tmp_path))
    changed = f"dropout 0.0 -> 0.1, learning_rate 0.005 -> 0.001, max_iters 160 -> {step + 1}"
    assert f"resumed at step {step} with other settings: {changed}\n" in out
    assert f"# changed since step {step}: {changed}\n" in (tmp_path / "out" / "log.txt").read_text()
    assert "changed" not in (resumed / "halves" / "out" / "log.txt").read_text()
    assert load(tmp_path)["config"]["dtype"] == "float32"  # what it came to


def test_a_restart_by_torchrun_resumes(resumed, small_dataset, monkeypatch):
    monkeypatch.setattr(script, "RESTART_COUNT", 1)
    config = configure(Config, tiny(small_dataset, resumed / "whole" / "out", **LONG))
    *_, saved = prepare(config)
    assert saved["step"] == 160 and config.init_from == "resume"


def test_a_save_that_fails_ends_the_run_and_leaves_the_checkpoint_whole(resumed, small_dataset, tmp_path):
    shutil.copytree(resumed / "stopped", tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path / "out")

    def small_files():  # as on a full disk: writing fails in the middle of the file
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["ckpt.pt"]) // 2, resource.RLIM_INFINITY))

    argv = tiny(small_dataset, **LONG, init_from="resume")
    process = run_script([TRAIN, *argv], cwd=tmp_path, preexec_fn=small_files)
    assert process.returncode == 1
    errors = [line for line in process.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and "saving to out failed, the checkpoint before it is whole" in errors[0]
    after = contents(tmp_path / "out")
    assert before.pop("log.txt") != after.pop("log.txt") and after == before


# --- h. what else can be switched on


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


def test_gpt2_weights_without_a_network_are_one_line(small_dataset, tmp_path):
    argv = tiny(with_meta(small_dataset, tmp_path / "data", tokenizer="gpt2", vocab_size=50257), **GPT2)
    env = {"HF_HOME": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1"}
    process = run_script([TRAIN, *argv], cwd=tmp_path, env=env)
    assert process.returncode == 1 and "Traceback" not in process.stderr, process.stderr
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "init_from='gpt2'" in errors[0]


@pytest.mark.timeout(300)
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler for torch.compile")
def test_torch_compile(small_dataset, tmp_path):
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    keys = dict(sync="spd", n_layer=1)
    runs = [factorised(small_dataset, f"compile-{on}", compile=on, **keys) for on in (True, False)]
    succeeded(run_script([RANKS_AGREE, *chain(runs)], cwd=tmp_path, env=env, timeout=280))
    assert_same_to_the_last_digit(log_lines(tmp_path / "out-compile-True"), log_lines(tmp_path / "out-compile-False"))
