"""study.py: the study files, runs that are missing, interrupted, held by others, or impossible."""

import csv
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from launch import ROOT, ending, one_line_error, run_script, start, status, succeeded

import study
import train_reduced_sync as script
from reduced_sync import distributed
from reduced_sync.configurator import configure
from reduced_sync.train.log import read_log

pytestmark = pytest.mark.timeout(200)
STUDY = ROOT / "study.py"
FILES = sorted((ROOT / "config").glob("study_*.py"))
TINY = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=2, gradient_accumulation_steps=1)
TINY |= dict(max_iters=10, eval_interval=5, eval_iters=2, log_interval=1, warmup_iters=2, device="cpu")


def write(folder, data, *runs, **keys):
    """A study file of tiny runs; returns its path."""
    runs = [TINY | {"dataset": str(data)} | run for run in runs]
    lines = [f"{key} = {value!r}" for key, value in ({"out_dir": str(folder / "out"), "runs": runs} | keys).items()]
    (folder / "study.py").write_text("\n".join(lines))
    return folder / "study.py"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_study_files(path, small_dataset, tmp_path):
    """Every run can be built, and the dense controls have the parameters of a deep model within 2 %."""
    listed = configure(study.Study, [str(path)])
    study.check_study(listed)
    sizes = {}
    for keys in listed.runs:
        arguments = [f"--{key}={value}" for key, value in keys.items() if key not in ("name", "dataset")]
        arguments += [f"--dataset={small_dataset}", f"--out_dir={tmp_path / keys['name']}", "--device=cpu"]
        *_, model_config, _ = script.prepare(configure(script.Config, [*arguments, "--block_size=64"]))
        c = model_config
        n_params = 12 * c.n_layer * c.n_embd**2 + (50304 if path.stem == "study_124m" else 128) * c.n_embd
        sizes[keys["name"]] = (n_params, c)
    deep = [n for n, c in sizes.values() if c.n_embd / c.n_layer == 64]
    controls = {name: (n, c) for name, (n, c) in sizes.items() if c.n_embd / c.n_layer > 64}
    assert len(controls) >= 2 or path.stem == "study_demo"
    for name, (n, c) in controls.items():
        assert c.sync == "baseline" and min(abs(n / one - 1) for one in deep) < 0.02, name
    if path.stem == "study_124m":  # the arithmetic of its GPU-hours
        full = sum(keys["max_iters"] == 20000 for keys in listed.runs)
        assert f"The {full} full runs and the {len(listed.runs) - full} of a quarter" in path.read_text()
        assert f"evaluated {-(-20000 // script.Config.eval_interval) + 1} times" in path.read_text()


def test_a_study_is_resumed_and_never_runs_twice(small_dataset, tmp_path):
    runs = [dict(name="base-1", seed=1), dict(name="base-2", seed=2), dict(name="spd", sync="spd", seed=1)]
    path = write(tmp_path, small_dataset, *runs)
    out = succeeded(run_script([STUDY, path], cwd=tmp_path))
    assert "base-1: finished" in out and "(3 of 3)" in out
    # 10 steps of 2 x 16 tokens; 3 evaluations on 2 batches of 2 x 16 tokens of each split
    assert f"to train on {3 * 10 * 32:,} tokens, to evaluate on {3 * 3 * 2 * 2 * 32:,}\n" in out
    assert "base-1 and 1 more" in out and (tmp_path / "out/comparison.png").exists()
    last = {name: read_log(tmp_path / f"out/{name}/log.txt").evaluations[-1][2] for name in ("base-1", "base-2", "spd")}
    with open(tmp_path / "out/table.csv", newline="") as file:
        rows = [(row["run"], row["syncs"], row["seeds"], float(row["val_loss"])) for row in csv.DictReader(file)]
    mean = pytest.approx((last["base-1"] + last["base-2"]) / 2)
    assert rows == [("base-1", "4", "2", mean), ("spd", "2", "1", last["spd"])]
    before = (tmp_path / "out/spd/log.txt").read_bytes()
    write(tmp_path, small_dataset, *runs, dict(name="one", sync="grouped-1", seed=1))
    out = succeeded(run_script([STUDY, path], cwd=tmp_path))
    assert f"to train on {10 * 32} tokens, to evaluate on {3 * 2 * 2 * 32}\n" in out
    assert "4 runs, 3 finished already" in out and "one: finished (4 of 4)" in out and "spd: finished" not in out
    assert (tmp_path / "out/spd/log.txt").read_bytes() == before


LONG = dict(name="long", max_iters=1000, eval_interval=500, checkpoint_minutes=0.001)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_an_interrupted_study_goes_on(small_dataset, tmp_path, number):
    """Stopped as asked its run saves; killed, it leaves a run that another study.py waits for instead of failing."""
    path = write(tmp_path, small_dataset, LONG)
    log = tmp_path / "out/long/log.txt"
    with ending(start([STUDY, path], cwd=tmp_path)) as process:
        end = time.monotonic() + 60
        while not (log.exists() and "iter 150:" in log.read_text()):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert study.Run(study.Study(out_dir=str(tmp_path / "out")), dict(TINY, name="long")).is_held()
    else:
        assert process.returncode == 130 and "the same command goes on" in err and err.count("\n") == 1, err
    out = succeeded(run_script([STUDY, path], cwd=tmp_path))
    assert "baseline" in out
    assert [row[0] for row in read_log(log).evaluations] == [0, 500, 1000]
    assert [row[0] for row in read_log(log).iterations] == list(range(1000))
    assert log.read_text().count("# syncs") == (1 if number == signal.SIGKILL else 2)


def test_a_run_that_fails_is_said_and_the_others_go_on(small_dataset, tmp_path):
    path = write(tmp_path, small_dataset, dict(name="bad", n_shard=3), dict(name="good"))
    process = run_script([STUDY, path], cwd=tmp_path)
    one_line_error(
        process, "bad:", "n_head=2 is not divisible by n_shard=3", f"more in {tmp_path / 'out/bad/output.txt'}"
    )
    assert "good: finished (1 of 2)" in process.stdout


def test_an_error_of_its_own_stops_the_runs(small_dataset, tmp_path):
    """Fault 20b: they went on unseen. Now they save as at a Ctrl-C, and the error is one line."""
    path = write(tmp_path, small_dataset, dict(name="long", max_iters=20_000, eval_interval=20_000))
    log = tmp_path / "out/long/log.txt"
    with ending(start([STUDY, path], cwd=tmp_path)) as process:
        while not (log.exists() and "iter 20:" in log.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        log.rename(tmp_path / "log.txt")  # where the run writes on
        log.mkdir()
        out, err = process.communicate(timeout=60)
    one_line_error(subprocess.CompletedProcess([], process.returncode, out, err), f"{log}: Is a directory")
    assert not study.Run(study.Study(out_dir=str(tmp_path / "out")), dict(TINY, name="long")).is_held()
    assert "stopped at step" in (tmp_path / "out/long/output.txt").read_text()


def test_under_torchrun(small_dataset, tmp_path):
    path = write(tmp_path, small_dataset, dict(name="two", gradient_accumulation_steps=2, tp_size=2), processes=2)
    succeeded(run_script([STUDY, path], cwd=tmp_path))
    assert read_log(tmp_path / "out/two/log.txt").header["layout"].startswith("dp 1 x tp 2")


@pytest.mark.parametrize(
    "runs, words",
    [
        ([], ["runs is empty"]),
        ([dict(name="a"), dict(name="a")], ["several runs are named a"]),
        ([dict(name="../a")], ["'../a'", "without a /"]),
        ([dict(name="..")], ["'..'", "without a /"]),
        ([dict()], ["a dict with a name"]),
        ([dict(name="a", max_iters=0)], ["'a'", "max_iters=0"]),
        ([dict(name="a", out_dir="b")], ["out_dir"]),
        ([dict(name="a", eval_interval=0)], ["'a'", "eval_interval=0"]),
        ([dict(name="a", batchsize=3)], ["'a'", "unknown key 'batchsize'"]),
        ([dict(name="a", sync="spdx")], ["'a'", "sync='spdx'", "allowed are"]),
        ([dict(name="a", dataset="/nowhere")], ["/nowhere/meta.json", "prepare the data first"]),
        ([dict(name="a"), dict(name="b", device="cuda")], ["device='cuda': torch can use no GPU", "try --device=cpu"]),
    ],
)
def test_mistakes_end_with_one_line(small_dataset, tmp_path, capsys, runs, words):
    assert status(study.main, [str(write(tmp_path, small_dataset, *runs))]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step, evaluated", [(0, 0), (7, 2)])
def test_what_is_left_to_train_and_evaluate(small_dataset, tmp_path, step, evaluated):
    """eval_iters=0 is the whole of val and as many windows of train, at steps 0, 4, 8 and 10."""
    keys = TINY | dict(name="a", dataset=str(small_dataset), eval_interval=4, eval_iters=0)
    run = study.Run(study.Study(out_dir=str(tmp_path)), keys)
    run.step, run.evaluated = step, evaluated
    targets = (small_dataset / "val.bin").stat().st_size // 2 - 1
    whole = 2 * 16 * -(-targets // 16)
    assert run.tokens_left() == ((10 - step) * 32, (4 - evaluated) * whole)


TORCHRUN = """Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
  traceback : Signal 9 (SIGKILL) received by PID 7
=======================================
"""


@pytest.mark.parametrize(
    "output, status, expected",
    [
        (TORCHRUN, 1, "exit status 1, after the line: traceback : Signal 9 (SIGKILL) received by PID 7"),
        ("iter 3: loss 1.0\n", -9, "ended by SIGKILL, after the line: iter 3: loss 1.0"),
        ("", 3, "exit status 3"),
    ],
)
def test_why_a_run_ended_that_wrote_nothing_down(tmp_path, output, status, expected):
    (tmp_path / "output.txt").write_text(output)
    assert study.reason(tmp_path, status) == expected


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("no space\nat all"), "no space"),
        (OSError(28, "No space left on device", "log.txt"), "log.txt: No space left on device"),
        (KeyError("x"), "KeyError: 'x'"),
        (RuntimeError("shapes do not fit"), "RuntimeError: shapes do not fit"),
        (RuntimeError("InvalidCxxCompiler: none"), "torch.compile finds no compiler that works: install one, or use "),
    ],
    ids=str,
)
def test_the_first_error_is_written_down(tmp_path, monkeypatch, error, line):
    """Also a mistake of ours, whose traceback goes on; what other ranks say afterwards changes nothing."""
    monkeypatch.setenv(distributed.ERROR_FILE, str(tmp_path / "error.txt"))
    for one in (error, ValueError("lost contact with another rank")):
        with pytest.raises((SystemExit, type(one))), distributed.clear_errors():
            raise one
    assert study.reason(tmp_path, 1).startswith(line)


def test_a_folder_that_holds_another_run(small_dataset, tmp_path, capsys):
    path = write(tmp_path, small_dataset, dict(name="a"))
    succeeded(run_script([STUDY, path], cwd=tmp_path))
    assert status(study.main, [str(write(tmp_path, small_dataset, dict(name="a", learning_rate=0.5)))]) == 1
    assert "learning_rate=0.0006, not 0.5" in capsys.readouterr().err
    for mistake in ("processes=0", "tolerance=-1", "tolerance=1e999", "out_dir="):
        assert status(study.main, [str(path), f"--{mistake}"]) == 1
        assert capsys.readouterr().err.startswith(f"error: {mistake.split('=')[0]}")


def test_a_study_has_its_runs_device_changed(tmp_path):
    run = study.Run(study.Study(out_dir=str(tmp_path), device="cpu"), dict(TINY, name="a", device="cuda"))
    assert run.config.device == "cpu"


def test_a_run_held_elsewhere_is_left_alone(tmp_path):
    run = study.Run(study.Study(out_dir=str(tmp_path)), dict(TINY, name="a"))
    assert not run.is_held()
    os.makedirs(tmp_path / "a")
    with open(tmp_path / "a" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run.is_held()
    assert not run.is_held()


def test_make_refuses_an_older_python(tmp_path):
    """Before anything is installed: process_group, which ends a run with all its ranks, came with Python 3.11."""
    python = tmp_path / "python3"
    code = "import sys; sys.version_info = (3, 10, 0); exec(sys.argv[2])"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    python.chmod(0o755)
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    process = subprocess.run(["make", "data", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True)
    first, _ = process.stderr.splitlines()  # the second is make's own
    assert process.returncode and first.startswith(f"error: {python} is Python 3.") and "3.11 or newer" in first
    assert not (tmp_path / ".venv").exists()


def test_a_number_written_as_text_is_the_same_run(small_dataset, tmp_path):
    path = write(tmp_path, small_dataset, dict(name="a", learning_rate="1e-3"))
    for _ in range(2):
        succeeded(run_script([STUDY, str(path)], cwd=tmp_path))
