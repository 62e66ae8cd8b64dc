"""A run that was stopped or killed goes on as if it had not been (invariant 6), or says why it cannot."""

import re
import resource
import shutil
import signal
import time

import pytest
import torch
from launch import TRAIN, ending, run_script, start, succeeded
from tiny_runs import assert_same_to_the_last_digit, log_lines, numbers, refused, tiny

import train_reduced_sync as script
from reduced_sync import checkpoint as ckpt
from reduced_sync.configurator import configure
from reduced_sync.train.log import read_log
from train_reduced_sync import Config, prepare

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


def test_starting_over_in_the_folder_of_a_run_is_refused(resumed, small_dataset, tmp_path):
    refused(tiny(small_dataset, resumed / "whole" / "out", **LONG), "holds a run already", "--init_from=resume")
    for name in ("ckpt_best.pt", "progress.pt"):  # all that is left, or drop_syncs.py's
        (tmp_path / name).touch()
        refused(tiny(small_dataset, tmp_path, **LONG), f"holds a run already: {name}; choose another out_dir")
        (tmp_path / name).unlink()


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


@pytest.mark.parametrize("config, fields", [({}, {}), ({"init_from": "some/model"}, {"n_gates": 3})], ids=str)
def test_a_foreign_checkpoint(resumed, small_dataset, tmp_path, config, fields):
    """One whose config does not say where it began began from scratch; a model of another version is one line."""
    shutil.copytree(resumed / "stopped", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "out" / "ckpt.pt"
    saved = ckpt.load(path)
    saved["config"] = {k: v for k, v in saved["config"].items() if k != "init_from"} | config
    saved["model_args"] |= fields
    path.unlink()  # what was loaded is mapped from it
    torch.save(saved, path)
    keys = configure(Config, tiny(small_dataset, tmp_path / "out", **LONG, init_from="resume"))
    if fields:
        with pytest.raises(ValueError, match=f"checkpoint {path} cannot be used: .*'n_gates'"):
            prepare(keys)
    else:
        assert prepare(keys).saved["step"] == saved["step"]


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
