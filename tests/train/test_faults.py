"""Faults injected into real training runs: every one ends or recovers as docs/faults.md says.

The run is small, on two processes (two replicas, or two tensor-parallel ranks), with a checkpoint after every update
and an evaluation after every fifth. Whatever happens to it, it must end with the losses and, bit for bit, the weights
of `whole`.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from launch import ROOT, TRAIN, ending, run_script, start, succeeded, timeless

from reduced_sync.train.log import read_log

pytestmark = pytest.mark.timeout(150)
INJECT = ROOT / "tests" / "inject.py"
BOUND = 60  # seconds within which all processes of a run must have ended after a fault; see docs/faults.md


def arguments(data, tp_size=1, out_dir="out", **keys):
    shape = dict(sync="spd", n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=2, dataset=data)
    steps = dict(gradient_accumulation_steps=2, max_iters=13, eval_interval=5, eval_iters=4, checkpoint_minutes=1e-9)
    rest = dict(log_interval=1, warmup_iters=2, learning_rate=5e-3, device="cpu", tp_size=tp_size, out_dir=out_dir)
    return [f"--{key}={value}" for key, value in (shape | steps | rest | keys).items()]


def losses(folder):
    return timeless((folder / "out" / "log.txt").read_text().splitlines())


def weights(folder, name="ckpt.pt"):
    checkpoint = torch.load(folder / "out" / name, weights_only=True)
    moments = {f"{key}/{kind}": t for key, state in checkpoint["optimizer"].items() for kind, t in state.items()}
    return checkpoint["model"] | moments


def assert_ended_as(whole, folder):
    """Bit for bit the same losses and weights, and nothing half-written left."""
    assert losses(folder) == losses(whole)
    a, b = weights(whole), weights(folder)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert not list((folder / "out").glob("*.tmp"))


def errors(process):
    """The lines on stderr that are ours, said by any rank."""
    return [line for line in process.stderr.splitlines() if re.match(r"error: |rank \d+: ", line)]


def assert_nothing_lives(folder):
    """No process works in `folder`."""
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            assert not (entry.isdigit() and os.readlink(f"/proc/{entry}/cwd") == str(folder)), entry


def children(process):
    """The ids of the processes that `process` has started, torchrun's workers."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return list(map(int, found.stdout.split()))


@pytest.fixture(scope="module")
def whole(small_dataset, made_once):
    """{tp_size: folder of an uninterrupted run on two processes}."""

    def train(folder, tp_size):
        succeeded(run_script([TRAIN, *arguments(small_dataset, tp_size)], nproc=2, cwd=folder))
        assert len(losses(folder)) == 13 + 4

    return {n: made_once(f"whole-tp{n}", partial(train, tp_size=n)) for n in (1, 2)}


# --- SIGKILL, with and without restarts

# each list is one job, restarted after each kill; rank 0 saves after each update: fsync of log, file and folder, link
# and two replaces a save, and one fsync and replace where it resumes
KILLED = [
    (1, ["0:update:5", "1:evaluation:4", "0:gather:2"]),
    (2, ["1:update:5", "0:evaluation:8", "1:gather:2"]),
    (1, ["1:start:1", "0:write:1", "0:fsync:5", "0:link:2"]),
    (2, ["0:write:3", "0:replace:5"]),
]


@pytest.mark.parametrize("tp_size, moments", KILLED)
def test_a_killed_rank_is_restarted(whole, small_dataset, tmp_path, tp_size, moments):
    """SIGKILL at moments of the run, under torchrun --max-restarts."""
    faults = ",".join(f"{moment}:kill" for moment in moments)
    argv = [INJECT, faults, *arguments(small_dataset, tp_size)]
    succeeded(run_script(argv, nproc=2, cwd=tmp_path, restarts=len(moments)))
    assert len(list(tmp_path.glob("struck-*"))) == len(moments)
    assert_ended_as(whole[tp_size], tmp_path)


@pytest.mark.parametrize("fault", ["0:update:8:kill", "1:evaluation:20:kill", "1:gather:3:crash"])
def test_a_dead_rank_ends_the_others_and_the_run_can_be_resumed(whole, small_dataset, tmp_path, fault):
    argv = arguments(small_dataset, tp_size=2)
    begin = time.monotonic()
    process = run_script([INJECT, fault, *argv], nproc=2, cwd=tmp_path)
    assert process.returncode != 0 and time.monotonic() - begin < BOUND
    assert_nothing_lives(tmp_path)
    # one traceback where a mistake of ours is to be found, no word of the ranks that only lost a partner
    assert errors(process) == [] and ("a mistake somewhere" in process.stderr) == fault.endswith("crash")
    succeeded(run_script([TRAIN, *argv, "--init_from=resume"], nproc=2, cwd=tmp_path))
    assert_ended_as(whole[2], tmp_path)


def test_a_hung_rank_ends_the_run_after_timeout_s(whole, small_dataset, tmp_path):
    argv = arguments(small_dataset, tp_size=2, timeout_s=8)
    process = run_script([INJECT, "1:update:8:hang", *argv], nproc=2, cwd=tmp_path)
    # the other rank waits 20 s for one at fault to say its line, and torchrun kills the hung one 30 s after that
    since = time.time() - (tmp_path / "struck-0-8").stat().st_mtime
    assert process.returncode != 0 and since < 8 + BOUND, since
    (line,) = errors(process)
    assert line.startswith("rank 0: lost contact with another rank: ") and "8000ms" in line, line
    assert_nothing_lives(tmp_path)
    succeeded(run_script([TRAIN, *argv, "--init_from=resume"], nproc=2, cwd=tmp_path))
    assert_ended_as(whole[2], tmp_path)


# --- starting


def test_a_rank_that_never_comes(small_dataset, tmp_path):
    """Alone with the environment of rank 0 of 2: a clear line after timeout_s."""
    environment = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    environment |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    begin = time.monotonic()
    argv = [TRAIN, *arguments(small_dataset, timeout_s=5)]
    process = run_script(argv, cwd=tmp_path, env=environment)
    assert process.returncode == 1 and time.monotonic() - begin < 5 + BOUND
    (line,) = errors(process)
    assert "lost contact with another rank" in line and "1/2 clients joined" in line
    assert "Traceback" not in process.stderr


def test_a_rank_that_hangs_at_the_start(small_dataset, tmp_path):
    begin = time.monotonic()
    argv = [INJECT, "1:start:1:hang", *arguments(small_dataset, timeout_s=5)]
    process = run_script(argv, nproc=2, cwd=tmp_path)
    assert process.returncode != 0 and time.monotonic() - begin < 5 + BOUND
    (line,) = errors(process)
    assert line.startswith("error: lost contact with another rank: ")
    assert_nothing_lives(tmp_path)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_a_dead_rendezvous(small_dataset, tmp_path):
    """torchrun itself gives up on an endpoint where nobody answers; nothing of ours has started."""
    options = ["--nnodes=2", "--rdzv_backend=c10d", "--rdzv_conf=is_host=0,timeout=4,read_timeout=4"]
    options += [f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    process = run_script([TRAIN, *arguments(small_dataset)], nproc=1, cwd=tmp_path, launcher=options)
    assert process.returncode != 0 and "RendezvousConnectionError" in process.stderr
    assert not os.listdir(tmp_path)


# --- signals


def torchrun_at(argv, folder, update, nproc=2, **options):
    """A context with the running torchrun, once its log has the line of `update`."""

    @contextlib.contextmanager
    def running():
        log = folder / "out" / "log.txt"
        with ending(start([TRAIN, *argv], nproc=nproc, cwd=folder, **options)) as process:
            end = time.monotonic() + 60
            while not (log.exists() and f"iter {update}:" in log.read_text()):
                assert process.poll() is None and time.monotonic() < end, process.communicate()
                time.sleep(0.005)
            yield process

    return running()


def test_a_run_that_a_scheduler_stops_goes_on(small_dataset, tmp_path):
    """SIGTERM to torchrun saves on every rank; resumed, the run comes to the end of an uninterrupted one."""
    argv = arguments(small_dataset, max_iters=300, eval_interval=100, checkpoint_minutes=0.0)
    with torchrun_at(argv, tmp_path, update=20) as process:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=BOUND)
    (step,) = re.findall(r"^stopped at step (\d+) and saved; go on with --init_from=resume$", out, re.MULTILINE)
    assert not re.search(r"^(error: |rank \d)", err, re.MULTILINE), err
    assert err.count("stopping after this step; signal again to stop immediately\n") == 1
    assert_nothing_lives(tmp_path)
    assert torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"] == int(step) < 300
    assert losses(tmp_path)[-1].startswith(f"iter {int(step) - 1}:")
    argv = arguments(small_dataset, max_iters=int(step) + 5, eval_interval=100, lr_decay_iters=300)
    succeeded(run_script([TRAIN, *argv, "--init_from=resume"], nproc=2, cwd=tmp_path))
    whole = tmp_path / "whole"
    whole.mkdir()
    succeeded(run_script([TRAIN, *argv], nproc=2, cwd=whole))
    assert_ended_as(whole, tmp_path)


@pytest.mark.parametrize("tp_size, moment, step", [(1, "0:evaluation:11", 5), (2, "1:evaluation:4", 0)])
def test_a_stop_during_an_evaluation(whole, small_dataset, tmp_path, tp_size, moment, step):
    """It was heard after the evaluation. Told to one rank, all leave it at once, to be made anew."""
    argv = arguments(small_dataset, tp_size)
    out = succeeded(run_script([INJECT, f"{moment}:stop", *argv], nproc=2, cwd=tmp_path))
    assert f"stopped at step {step} and saved; go on with --init_from=resume\n" in out
    assert f"step {step}:" not in (tmp_path / "out" / "log.txt").read_text()
    succeeded(run_script([TRAIN, *argv, "--init_from=resume"], nproc=2, cwd=tmp_path))
    assert_ended_as(whole[tp_size], tmp_path)


SENT = [(signal.SIGINT, False), (signal.SIGHUP, False), (signal.SIGUSR1, False), (signal.SIGUSR1, True)]


@pytest.mark.parametrize("number, to_worker", SENT)
def test_a_signal_saves_on_every_rank(small_dataset, tmp_path, number, to_worker):
    """Ctrl-C, a closed terminal, a scheduler's warning.

    SIGHUP comes when nobody reads what is printed any more; torchrun has to be told to pass SIGUSR1 on.
    """
    argv = arguments(small_dataset, tp_size=2, max_iters=10_000, eval_interval=10_000, checkpoint_minutes=0.0)
    launcher = ["--standalone", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    with torchrun_at(argv, tmp_path, update=20, launcher=launcher) as process:
        if number == signal.SIGHUP:
            process.stdout.close()
            process.stderr.close()
        os.kill(children(process)[1] if to_worker else process.pid, number)
        process.wait(BOUND)
    assert_nothing_lives(tmp_path)
    step = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"]
    assert 20 < step < 10_000 and losses(tmp_path)[-1].startswith(f"iter {step - 1}:")


def test_a_second_ctrl_c_ends_at_once(small_dataset, tmp_path):
    """While a save hangs, as on a dead file system; the checkpoint before it stays whole."""
    argv = arguments(small_dataset, max_iters=10_000, eval_interval=10_000)
    with ending(start([INJECT, "0:gather:3:hang", *argv], cwd=tmp_path)) as process:
        while not (tmp_path / "struck-0-3").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        time.sleep(1.5)
        assert process.poll() is None
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait(10)
    assert process.returncode == 128 + signal.SIGINT and time.monotonic() - begin < 2
    assert torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"] == 2


def test_ctrl_c_twice_under_torchrun(small_dataset, tmp_path):
    """The second ends torchrun and all that it started, in the middle of a save that hangs."""
    argv = arguments(small_dataset, max_iters=10_000, eval_interval=10_000)
    with ending(start([INJECT, "0:gather:3:hang", *argv], nproc=2, cwd=tmp_path)) as process:
        while not (tmp_path / "struck-0-3").exists():
            assert process.poll() is None
            time.sleep(0.05)
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=BOUND)
    assert process.returncode != 0 and time.monotonic() - begin < BOUND
    assert_nothing_lives(tmp_path)
    assert torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"] == 2


# --- bad numbers


@pytest.mark.parametrize("tp_size", [1, 2])
def test_updates_that_are_not_finite_are_skipped_and_counted(small_dataset, tmp_path, tp_size):
    """A nan on one rank only, in 2 updates; then the run goes on and learns."""
    argv = arguments(small_dataset, tp_size, max_iters=30, log_interval=10)
    succeeded(run_script([INJECT, "1:update:5-6:nan", *argv], nproc=2, cwd=tmp_path))
    text = (tmp_path / "out" / "log.txt").read_text()
    assert re.findall(r"^iter (\d+): .* grad norm nan, skipped (\d+)$", text, re.MULTILINE) == [("4", "1"), ("5", "2")]
    log = read_log(tmp_path / "out" / "log.txt")
    assert [row[0] for row in log.iterations] == [0, 4, 5, 10, 20]
    assert log.evaluations[-1][2] < log.evaluations[0][2] - 1
    checkpoint = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert (checkpoint["skipped"], checkpoint["bad_steps"]) == (2, 0)


def test_too_many_of_them_stop_the_run(small_dataset, tmp_path):
    argv = arguments(small_dataset, tp_size=2, max_bad_steps=3)
    process = run_script([INJECT, "1:update:5-9:nan", *argv], nproc=2, cwd=tmp_path)
    (line,) = errors(process)
    assert line.startswith("error: step 6: ") and "the last 3 steps were not finite; lower learning_rate" in line
    checkpoint = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert checkpoint["step"] == 6 and all(t.isfinite().all() for t in checkpoint["model"].values())


# --- bad places


def full_disk(folder, size="400k"):
    """Mount a small file system at `folder`, or skip where this user may not."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system is not allowed here")


def test_a_disk_that_fills_up(whole, small_dataset, tmp_path):
    """A checkpoint fits the small disk, the next does not: one line, the first is whole; with more space it goes on."""
    out = tmp_path / "out"
    full_disk(out, size="700k")
    try:
        process = run_script([TRAIN, *arguments(small_dataset, tp_size=2)], nproc=2, cwd=tmp_path)
        (line,) = errors(process)
        assert "saving to out failed, the checkpoint before it is whole" in line
        assert "No space left on device" in line
        assert not list(out.glob("*.tmp"))
        step = torch.load(out / "ckpt.pt", weights_only=True)["step"]
        subprocess.run(["mount", "-o", "remount,size=8m", str(out)], check=True)
        argv = arguments(small_dataset, tp_size=2, init_from="resume")
        succeeded(run_script([TRAIN, *argv], nproc=2, cwd=tmp_path))
        assert step in (1, 2) and f"# resumed at step {step}:" in (out / "log.txt").read_text()
        assert_ended_as(whole[2], tmp_path)
    finally:
        subprocess.run(["umount", str(out)], check=True)


def test_a_log_that_cannot_be_written(whole, small_dataset, tmp_path):
    process = run_script([INJECT, "0:log:25:full", *arguments(small_dataset, 2)], nproc=2, cwd=tmp_path)
    assert process.returncode != 0
    (line,) = errors(process)
    assert "No space left on device" in line
    succeeded(run_script([TRAIN, *arguments(small_dataset, 2, init_from="resume")], nproc=2, cwd=tmp_path))
    assert_ended_as(whole[2], tmp_path)


def test_a_log_that_is_cut_in_a_line(whole, small_dataset, tmp_path):
    """As a full disk or a dead machine leaves it."""
    # saved after evaluations alone, so that the line belongs to an update that is made again
    argv = arguments(small_dataset, 2, checkpoint_minutes=0.0)
    process = run_script([INJECT, "0:update:12:kill", *argv], nproc=2, cwd=tmp_path)
    assert process.returncode != 0
    log = tmp_path / "out" / "log.txt"
    log.write_bytes(log.read_bytes()[:-9])
    succeeded(run_script([TRAIN, *arguments(small_dataset, 2, init_from="resume")], nproc=2, cwd=tmp_path))
    assert_ended_as(whole[2], tmp_path)


def test_an_out_dir_of_a_live_run_and_of_a_dead_one(whole, small_dataset, tmp_path):
    argv = arguments(small_dataset)
    with ending(start([INJECT, "0:update:8:hang", *argv], cwd=tmp_path)) as process:
        while not (tmp_path / "struck-0-8").exists():
            assert process.poll() is None
            time.sleep(0.05)
        second = run_script([TRAIN, *argv, "--init_from=resume"], cwd=tmp_path)
        assert second.returncode == 1 and errors(second) == ["error: out_dir='out' is in use by another live run"]
        process.kill()
    # its lock is stale: the folder can be used, by any layout
    succeeded(run_script([TRAIN, *arguments(small_dataset, init_from="resume")], nproc=2, cwd=tmp_path))
    ended, expected = ([line.split(":")[0] for line in losses(folder)] for folder in (tmp_path, whole[1]))
    assert ended == expected


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 255
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "hostile", "empty", "text"])
def test_a_damaged_checkpoint_offers_the_one_before(whole, small_dataset, tmp_path, damage):
    shutil.copytree(whole[2] / "out", tmp_path / "out")
    path = tmp_path / "out" / "ckpt.pt"
    data = path.read_bytes()
    if damage == "flipped":
        path.unlink()  # another name of it may be ckpt_best.pt
        path.write_bytes(data)
        flip(path, len(data) // 2)
    elif damage == "hostile":

        class Payload:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "executed"),)

        path.unlink()
        torch.save({"model": Payload()}, path)
    else:
        path.unlink()
        path.write_bytes({"truncated": data[: len(data) // 3], "empty": b"", "text": b"not a checkpoint\n"}[damage])
    process = run_script([TRAIN, *arguments(small_dataset, init_from="resume")], cwd=tmp_path)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    (line,) = errors(process)
    assert "ckpt.pt cannot be used" in line and "mv out/ckpt_previous.pt out/ckpt.pt" in line
    assert not (tmp_path / "executed").exists()
    if damage == "flipped":
        os.replace(tmp_path / "out" / "ckpt_previous.pt", path)
        argv = arguments(small_dataset, tp_size=2, init_from="resume")
        succeeded(run_script([TRAIN, *argv], nproc=2, cwd=tmp_path))
        assert_ended_as(whole[2], tmp_path)


def test_data_that_changed_since_the_checkpoint(whole, small_dataset, tmp_path):
    shutil.copytree(whole[1] / "out", tmp_path / "out")
    shutil.copytree(small_dataset, tmp_path / "data")
    meta = tmp_path / "data" / "meta.json"
    meta.write_text(meta.read_text().replace('"train_sha256": "', '"train_sha256": "0'))
    argv = arguments(tmp_path / "data", init_from="resume", max_iters=20)
    process = run_script([TRAIN, *argv], cwd=tmp_path)
    (line,) = errors(process)
    assert "was trained on other data: meta.json differs in 'train_sha256'" in line


@pytest.mark.parametrize("nproc", [1, 2])
def test_token_ids_above_the_vocabulary_in_the_middle_of_a_run(small_dataset, tmp_path, nproc):
    shutil.copytree(small_dataset, tmp_path / "data")
    with open(tmp_path / "data" / "train.bin", "r+b") as file:
        file.seek(2 * 1000)
        file.write(b"\xff\xff" * 50_000)
    process = run_script([TRAIN, *arguments(tmp_path / "data")], nproc=nproc if nproc > 1 else None, cwd=tmp_path)
    assert process.returncode != 0
    said = errors(process)
    assert said and all("train.bin holds token id 65535, at or above the vocabulary size" in line for line in said)


# --- several nodes


def two_agents(argv, folder, env=None, **options):
    """Two torchrun agents of one process each, as on two nodes; returns both as CompletedProcesses."""
    launcher = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=1"]
    keys = dict(nproc=1, cwd=folder, env=env, launcher=[*launcher, "--local_addr=127.0.0.1"], **options)
    with ending(start(argv, **keys)) as first, ending(start(argv, **keys)) as second:
        ended = [(*process.communicate(timeout=120), process.returncode) for process in (first, second)]
    return [subprocess.CompletedProcess(argv, code, out, err) for out, err, code in ended]


def test_two_agents_are_one_run(whole, small_dataset, tmp_path):
    for process in two_agents([TRAIN, *arguments(small_dataset)], tmp_path):
        succeeded(process)
    assert_ended_as(whole[1], tmp_path)


def test_a_killed_rank_restarts_two_agents(whole, small_dataset, tmp_path):
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    argv = [INJECT, "1:update:8:kill", *arguments(small_dataset)]
    for process in two_agents(argv, tmp_path, env, restarts=2):
        succeeded(process)
    assert (tmp_path / "struck-0-8").exists()
    assert_ended_as(whole[1], tmp_path)


def test_a_tp_group_over_two_agents_is_refused(small_dataset, tmp_path):
    refused = two_agents([TRAIN, *arguments(small_dataset, tp_size=2)], tmp_path)
    said = {line for process in refused for line in errors(process)}
    assert all(process.returncode != 0 for process in refused)
    assert said == {"error: tp_size=2 does not divide the 1 processes of a node: a TP group would span nodes"}


# --- an hour of kills


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_soak_random_kills(whole, small_dataset, tmp_path):
    """A random worker is killed at a random time, over and over, until the run has come to its end."""
    import random

    argv = arguments(small_dataset, tp_size=2, max_iters=2000, eval_interval=100)
    expected = tmp_path / "whole"
    expected.mkdir()
    succeeded(run_script([TRAIN, *argv], nproc=2, cwd=expected, timeout=600))
    kills = 0
    with ending(start([TRAIN, *argv], nproc=2, cwd=tmp_path, restarts=1000)) as process:
        while process.poll() is None:
            time.sleep(random.uniform(0.5, 15))
            if workers := children(process):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(random.choice(workers), signal.SIGKILL)
                    kills += 1
    print(f"{kills} kills survived", file=sys.stderr)
    assert kills > 10
    assert_ended_as(expected, tmp_path)
