"""What cannot be trained is refused with one line, before anything is written."""

import json
import os
import shutil

import numpy as np
import pytest
from launch import TRAIN, one_line_error, run_script
from tiny_runs import pretend, refused, tiny

from reduced_sync.configurator import configure
from reduced_sync.files import lock_folder
from reduced_sync.train.log import read_log
from train_reduced_sync import Config, prepare


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
        (dict(n_shard=1, sync="spd"), ["sync='spd'", "the baseline with n_shard=1", "--n_shard=2"]),
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


def test_gpt2_weights_without_a_network_are_one_line(small_dataset, tmp_path):
    argv = tiny(with_meta(small_dataset, tmp_path / "data", tokenizer="gpt2", vocab_size=50257), **GPT2)
    env = {"HF_HOME": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1"}
    process = run_script([TRAIN, *argv], cwd=tmp_path, env=env)
    assert process.returncode == 1 and "Traceback" not in process.stderr, process.stderr
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "init_from='gpt2'" in errors[0]
