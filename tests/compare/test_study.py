"""study.py: the study files, runs that are missing, interrupted, held by others, or impossible."""

import csv
import fcntl
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from launch import ROOT, ending, one_line_error, run_script, start, status, succeeded

import study
import train_reduced_sync as script
from reduced_sync import distributed
from reduced_sync.configurator import configure
from reduced_sync.train.log import read_log

pytestmark = pytest.mark.timeout(200)
STUDY = ROOT / "study.py"
TINY = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=2, gradient_accumulation_steps=1)
TINY |= dict(max_iters=10, eval_interval=5, eval_iters=2, log_interval=1, warmup_iters=2, device="cpu")


def write(folder, data, arms, **keys):
    """A study file of tiny runs, untuned unless asked otherwise; returns its path."""
    common = TINY | {"dataset": str(data), "learning_rate": 1e-3}
    keys = {"out_dir": str(folder / "out"), "common": common, "sizes": {"a": {}}, "arms": arms, "tune": False} | keys
    (folder / "study.py").write_text("\n".join(f"{key} = {value!r}" for key, value in keys.items()))
    return folder / "study.py"


def make_run(folder, **keys):
    """A Run in `folder`, called a."""
    return study.Run(study.Study(out_dir=str(folder)), "a", TINY | keys)


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("study_*.py")), ids=lambda path: path.stem)
def test_the_study_files(path, small_dataset):
    """Every run can be built, and the dense controls have the parameters of a deep model within 3 %."""
    listed = configure(study.Study, [str(path)])
    for sweep in study.sweeps_of(listed):
        (run,) = sweep.runs.values()
        arguments = [one for one in run.arguments if not one.startswith("--dataset=")]
        arguments += [f"--dataset={small_dataset}", "--device=cpu", "--block_size=64"]
        *_, c, _ = script.prepare(configure(script.Config, arguments))
        if "control" in sweep.name:
            size = listed.sizes[sweep.name.split("-")[0]]
            vocabulary = 50304 if path.stem == "study_124m" else 128
            sizes = (c.n_layer, c.n_embd), (size["n_layer"], size["n_embd"])
            wide, deep = (12 * n * C**2 + vocabulary * C for n, C in sizes)
            assert c.sync == "baseline" and abs(wide / deep - 1) < 0.03, sweep.name


def test_the_arithmetic_of_the_full_study():
    """GPU-hours by the tokens per second that one H100 was measured at."""
    listed = configure(study.Study, [str(ROOT / "config/study_124m.py")])
    runs = len(listed.arms) * (3 + listed.seeds - 1)
    hours = [5000 * 491_520 / speed / 3600 for speed in (366_000, 292_000)]
    text = (ROOT / "config/study_124m.py").read_text()
    assert f"{hours[0]:.1f} to {hours[1]:.1f} GPU-hours" in text and f"{runs} runs" in text
    assert hours[0] * runs < 48 < hours[1] * runs


def test_a_study_is_resumed_and_never_runs_twice(small_dataset, tmp_path):
    arms = dict(base={}, spd=dict(sync="spd"))
    path = write(tmp_path, small_dataset, arms, seeds=2)
    out = succeeded(run_script([STUDY, path], cwd=tmp_path))
    assert "a-base-lr0.001-seed1: " in out and "(4 of at least 4)" in out
    # 10 steps of 2 x 16 tokens; 3 evaluations on 2 batches of 2 x 16 tokens of each split
    assert f"to train on {4 * 10 * 32:,} tokens, to evaluate on {4 * 3 * 2 * 2 * 32:,}\n" in out
    assert "a-base-lr0.001-seed1 and 1 more" in out and (tmp_path / "out/comparison.png").exists()
    names = [f"a-{arm}-lr0.001-seed{seed}" for arm in ("base", "spd") for seed in (1, 2)]
    last = {name: read_log(tmp_path / f"out/{name}/log.txt").evaluations[-1][2] for name in names}
    with open(tmp_path / "out/table.csv", newline="") as file:
        rows = [(row["run"], row["syncs"], row["seeds"], float(row["val_loss"])) for row in csv.DictReader(file)]
    means = [pytest.approx((last[a] + last[b]) / 2) for a, b in (names[:2], names[2:])]
    assert rows == [(names[0], "4", "2", means[0]), (names[2], "2", "2", means[1])]
    before = (tmp_path / f"out/{names[2]}/log.txt").read_bytes()
    write(tmp_path, small_dataset, arms | dict(one=dict(sync="grouped-1")), seeds=2)
    out = succeeded(run_script([STUDY, path], cwd=tmp_path))
    assert f"to train on {2 * 10 * 32} tokens, to evaluate on {2 * 3 * 2 * 2 * 32}\n" in out
    assert (
        "at least 6 runs, 4 finished already" in out
        and "a-one-lr0.001-seed1: " in out
        and "spd-lr0.001-seed1: " not in out
    )
    assert (tmp_path / f"out/{names[2]}/log.txt").read_bytes() == before


def train_by(loss_at):
    """A Run's start, look and end without a process: its loss is `loss_at` of its learning rate and seed."""

    def start(run, slot, gpus):
        run.slot = slot
        loss = loss_at(run.keys["learning_rate"], run.keys["seed"])
        run.step, run.finished, run.diverged = run.keys["max_iters"], math.isfinite(loss), not math.isfinite(loss)
        run.loss, run.failure = loss, None if math.isfinite(loss) else "exit status 1"

    return start


@pytest.mark.parametrize("optimum", [1e-3, 1.4e-2, 1e-5, 2e-3 * 2**0.5])
def test_the_best_learning_rate_is_found(small_dataset, tmp_path, monkeypatch, optimum):
    """A quadratic in ln(rate), whose optimum may be far outside the first rates, or between two equal ones."""

    def loss_at(rate, seed):
        return math.inf if rate > 0.1 else 2 + round(0.1 * math.log(rate / optimum) ** 2, 4) + 0.001 * seed

    monkeypatch.setattr(study.Run, "start", train_by(loss_at))
    monkeypatch.setattr(study.Run, "read_progress", lambda run: None)
    monkeypatch.setattr(study.Run, "ended", lambda run: True)
    monkeypatch.setattr(study.time, "sleep", lambda seconds: None)
    listed = configure(study.Study, [str(write(tmp_path, small_dataset, dict(base={}), tune=True, seeds=3))])
    sweeps = study.sweeps_of(listed)
    assert sweeps[0].plan().more == 2  # seeds to follow
    assert not study.run_missing(sweeps, [["0"], ["1"]], False)
    runs, more = sweeps[0].plan()
    rates = sorted({run.keys["learning_rate"] for run in runs})
    best = min(rates, key=lambda rate: loss_at(rate, 1))
    assert more == 0 and rates[0] < best < rates[-1] and abs(math.log2(best / optimum)) < 0.501
    assert all(b == 2 * a for a, b in itertools.pairwise(rates))
    assert sorted(run.keys["seed"] for run in runs if run.keys["learning_rate"] == best) == [1, 2, 3]
    assert len(runs) == len(rates) + 2 and len({run.name for run in runs}) == len(runs)
    assert all(run.keys["min_lr"] == run.keys["learning_rate"] / 10 for run in runs)


def test_rates_that_all_diverge_are_halved(small_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(study.Run, "read_progress", lambda run: None)
    listed = configure(study.Study, [str(write(tmp_path, small_dataset, dict(base={}), tune=True))])
    (sweep,) = study.sweeps_of(listed)
    start = train_by(lambda rate, seed: math.inf if rate > 2e-4 else 2 + rate)
    for _ in range(3):
        for run in sweep.plan().runs:
            start(run, [], False)
    assert sorted(run.keys["learning_rate"] for run in sweep.plan().runs)[:2] == [6.25e-5, 1.25e-4]


@pytest.mark.parametrize("loss_at", [lambda rate, seed: 3 + rate, lambda rate, seed: math.inf])
def test_a_best_rate_that_is_always_at_the_edge_ends_the_search(small_dataset, tmp_path, monkeypatch, loss_at):
    monkeypatch.setattr(study.Run, "read_progress", lambda run: None)
    listed = configure(study.Study, [str(write(tmp_path, small_dataset, dict(base={}), tune=True, seeds=3))])
    (sweep,) = study.sweeps_of(listed)
    while study.missing([sweep]):
        for run in study.missing([sweep]):
            train_by(loss_at)(run, [], False)
            run.failure = None
    assert len(sweep.plan().runs) == 12 and sweep.plan().more == 0


def test_a_tuned_study_of_real_runs(small_dataset, tmp_path):
    arms = dict(base=dict(learning_rate=0.16), spd=dict(sync="spd", learning_rate=0.16))  # about the best for ten steps
    path = write(tmp_path, small_dataset, arms, tune=True, seeds=2)
    out = succeeded(run_script([STUDY, path], cwd=tmp_path, timeout=190))
    with open(tmp_path / "out/table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["bracketed"] for row in rows] == ["True", "True"] and [row["seeds"] for row in rows] == ["2", "2"]
    assert rows[1]["verdict"] == "too short" and "no verdict, because the runs are too short" in out
    again = succeeded(run_script([STUDY, path], cwd=tmp_path))
    assert "to train on 0 tokens" in again and again.splitlines()[-5:] == out.splitlines()[-5:]


@pytest.mark.parametrize(
    ("finished", "signals", "error", "failure"),
    [(True, 0, "", None), (True, 0, "no space", "no space"), (False, 1, "", None), (False, 1, "no space", "no space")],
)
def test_a_last_save_that_failed_is_said(tmp_path, monkeypatch, finished, signals, error, failure):
    """Of a run whose last loss is logged, and of one that was stopped."""
    monkeypatch.setattr(study.Run, "read_progress", lambda run: None)
    run = make_run(tmp_path)
    run.process = SimpleNamespace(poll=lambda: 1, returncode=1)
    run.finished, run.signals_sent = finished, signals
    run.out_dir.mkdir()
    if error:
        (run.out_dir / "error.txt").write_text(error)
    assert run.ended() and (run.failure or "").startswith(failure or "") and bool(run.failure) == bool(failure)


LONG = dict(long=dict(max_iters=1000, eval_interval=500, checkpoint_minutes=0.001))
FIRST = "a-long-lr0.001-seed1"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_an_interrupted_study_goes_on(small_dataset, tmp_path, number):
    """Stopped as asked its run saves; killed, it leaves a run that another study.py waits for instead of failing."""
    path = write(tmp_path, small_dataset, LONG)
    log = tmp_path / "out" / FIRST / "log.txt"
    with ending(start([STUDY, path], cwd=tmp_path)) as process:
        end = time.monotonic() + 60
        while not (log.exists() and "iter 150:" in log.read_text()):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert study.Run(study.Study(out_dir=str(tmp_path / "out")), FIRST, TINY).is_held()
    else:
        assert process.returncode == 130 and "run the same command to continue" in err and err.count("\n") == 1, err
    out = succeeded(run_script([STUDY, path], cwd=tmp_path))
    assert "baseline" in out
    assert [row[0] for row in read_log(log).evaluations] == [0, 500, 1000]
    assert [row[0] for row in read_log(log).iterations] == list(range(1000))
    assert log.read_text().count("# syncs") == (1 if number == signal.SIGKILL else 2)


def test_a_run_that_fails_is_said_and_the_others_go_on(small_dataset, tmp_path):
    """With tuning on its arm is given up, not its rate."""
    arms = dict(bad=dict(init_from="nowhere/at-all"), good=dict(learning_rate=0.16))
    path = write(tmp_path, small_dataset, arms, tune=True)
    process = run_script([STUDY, path], cwd=tmp_path, timeout=190)
    name = "a-bad-lr0.001-seed1"
    assert process.returncode == 1 and process.stderr.count("\n") == 3 and "Traceback" not in process.stderr
    for part in (f"{name}: ", "nowhere/at-all", f"more in {tmp_path / 'out' / name}/output.txt"):
        assert part in process.stderr
    assert "a-good-lr0.16-seed1: " in process.stdout


def test_an_error_of_its_own_stops_the_runs(small_dataset, tmp_path):
    """They went on unseen. Now they save as at a Ctrl-C, and the error is one line."""
    path = write(tmp_path, small_dataset, dict(long=dict(max_iters=20_000, eval_interval=20_000)))
    log = tmp_path / "out" / FIRST / "log.txt"
    with ending(start([STUDY, path], cwd=tmp_path)) as process:
        while not (log.exists() and "iter 20:" in log.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        log.rename(tmp_path / "log.txt")  # where the run writes on
        log.mkdir()
        out, err = process.communicate(timeout=60)
    one_line_error(subprocess.CompletedProcess([], process.returncode, out, err), f"{log}: Is a directory")
    assert not study.Run(study.Study(out_dir=str(tmp_path / "out")), FIRST, TINY).is_held()
    assert "stopped at step" in (log.parent / "output.txt").read_text()


def test_under_torchrun(small_dataset, tmp_path):
    path = write(tmp_path, small_dataset, dict(two=dict(gradient_accumulation_steps=2, tp_size=2)), processes=2)
    succeeded(run_script([STUDY, path], cwd=tmp_path))
    assert read_log(tmp_path / "out/a-two-lr0.001-seed1/log.txt").header["layout"].startswith("dp 1 x tp 2")


@pytest.mark.parametrize(
    "keys, words",
    [
        (dict(arms={}), ["arms is empty"]),
        (dict(sizes={}), ["sizes is empty"]),
        (dict(arms=[]), ["arms must be dict or None, not list"]),
        (dict(arms={"../b": {}}), ["arm '../b'", "letters, digits"]),
        (dict(arms={"b": 3}), ["arm 'b'", "names a dict"]),
        (dict(arms={"b": dict(sizes=["c"])}), ["arm 'b'", "sizes=['c'] must be a list of names among a"]),
        (dict(arms={"b": dict(sizes=3)}), ["arm 'b'", "sizes=3 must be a list"]),
        (dict(arms={"b": dict(n_shard=3)}), ["a-b-lr0.001-seed1", "n_head=2 is not divisible by n_shard=3"]),
        (dict(arms={"b": dict(warmup_iters=20)}), ["a-b-lr0.001-seed1", "warmup_iters=20 is past step 10"]),
        (dict(arms={"b": dict(max_iters=0)}), ["a-b: max_iters=0"]),
        (dict(arms={"b": dict(out_dir="c")}), ["a-b: out_dir is the study's own"]),
        (dict(arms={"b": dict(seed=1)}), ["a-b: seed is the study's own"]),
        (dict(arms={"b": dict(eval_interval=0)}), ["a-b: eval_interval=0"]),
        (dict(arms={"b": dict(learning_rate=0)}), ["a-b: learning_rate=0 must be a positive number"]),
        (dict(arms={"b": dict(learning_rate=float("nan"))}), ["a-b: learning_rate=nan must be a positive number"]),
        (dict(arms={"b": dict(batchsize=3)}), ["a-b-lr0.001-seed1", "unknown key 'batchsize'"]),
        (dict(arms={"b": {}, "c": dict(sync="22")}), ["a-b and a-c train the same: leave one out"]),
        (
            dict(sizes={"a": {}, "a-b": dict(n_layer=3)}, arms={"b-c": {}, "c": dict(sync="spd")}),
            ["two pairs of a size and an arm make the name a-b-c: rename one"],
        ),
        (dict(arms={"b": dict(sync="spdx")}), ["a-b-lr0.001-seed1", "sync='spdx'", "allowed are"]),
        (dict(arms={"b": dict(dataset="/nowhere")}), ["/nowhere/meta.json", "prepare the data first"]),
        (
            dict(arms={"b": {}, "c": dict(sync="spd", device="cuda")}),
            ["device='cuda': torch can use no GPU", "try --device=cpu"],
        ),
    ],
    ids=str,
)
def test_mistakes_end_with_one_line(small_dataset, tmp_path, capsys, keys, words):
    keys = {"arms": {"b": {}}} | keys
    path = write(tmp_path, small_dataset, keys.pop("arms"), **keys)
    path.write_text(path.read_text().replace("nan", "float('nan')"))
    assert status(study.main, [str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step, evaluated", [(0, 0), (7, 2)])
def test_what_is_left_to_train_and_evaluate(small_dataset, tmp_path, step, evaluated):
    """eval_iters=0 is the whole of val and as many windows of train, at steps 0, 4, 8 and 10."""
    run = make_run(tmp_path, dataset=str(small_dataset), eval_interval=4, eval_iters=0)
    run.step, run.evaluated = step, evaluated
    targets = (small_dataset / "val.bin").stat().st_size // 2 - 1
    whole = 2 * 16 * -(-targets // 16)
    assert run.tokens_left() == ((10 - step) * 32, (4 - evaluated) * whole)
    assert run.tokens_left(whole=True) == (10 * 32, 4 * whole)


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
        with pytest.raises((SystemExit, type(one))), distributed.report_errors():
            raise one
    assert study.reason(tmp_path, 1).startswith(line)


def test_a_folder_that_holds_another_run(small_dataset, tmp_path, capsys):
    path = write(tmp_path, small_dataset, dict(b={}))
    succeeded(run_script([STUDY, path], cwd=tmp_path))
    assert status(study.main, [str(write(tmp_path, small_dataset, dict(b=dict(weight_decay=0.5))))]) == 1
    assert "holds another run (weight_decay 0.1 -> 0.5)" in capsys.readouterr().err
    assert status(study.main, [str(write(tmp_path, small_dataset, dict(b=dict(init_from="some/llama"))))]) == 1
    assert "holds another run (init_from scratch -> some/llama)" in capsys.readouterr().err
    for mistake in ("processes=0", "tolerance=-1", "tolerance=1e999", "out_dir=", "seeds=0", "runs_per_gpu=0"):
        assert status(study.main, [str(path), f"--{mistake}"]) == 1
        assert capsys.readouterr().err.startswith(f"error: {mistake.split('=')[0]}")


def test_runs_share_a_gpu(monkeypatch):
    monkeypatch.setattr(study.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert study.slots(1, 2, False) == ([["0"], ["1"], ["0"], ["1"]], True)
    assert study.slots(2, 1, False) == ([["0", "1"]], True)
    assert study.slots(1, 2, True)[1] is False


def test_a_study_has_its_runs_device_changed(tmp_path):
    run = study.Run(study.Study(out_dir=str(tmp_path), device="cpu"), "a", dict(TINY, device="cuda"))
    assert run.config.device == "cpu"


def test_a_run_held_elsewhere_is_left_alone(tmp_path):
    run = make_run(tmp_path)
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
    path = write(tmp_path, small_dataset, dict(b=dict(weight_decay="1e-3")))
    for _ in range(2):
        succeeded(run_script([STUDY, str(path)], cwd=tmp_path))
