"""Run the project's scripts the way users do, as processes of their own, with a time limit that leaves none behind."""

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "train_reduced_sync.py"


def start(args, nproc=None, cwd=None, env=None, launcher=("--standalone",), restarts=0, **options):
    """Popen of a Python script and its arguments, stdout and stderr pipes.

    With nproc it runs under torchrun, whose further options are `launcher`, with so many restarts.
    """
    torchrun = ["-m", "torch.distributed.run", *launcher, f"--nproc_per_node={nproc}", f"--max_restarts={restarts}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **(env or {})}
    if Path("/sys/class/net/lo").exists():
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the machine's name resolves to
    return subprocess.Popen(
        [sys.executable, *(torchrun if nproc else []), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment,
        start_new_session=True,
        **options,
    )


@contextlib.contextmanager
def ending(process):
    """Whatever happens inside, the process is gone afterwards, and with it the workers that it started."""
    try:
        yield process
    finally:
        if process.poll() is None:
            # torchrun's workers are in sessions of their own: it ends them itself, after 30 s by force
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr.close()


def run_script(args, nproc=None, timeout=100, **options):
    """Run to the end; returns a CompletedProcess. Raises subprocess.TimeoutExpired after `timeout` seconds."""
    with ending(start(args, nproc, **options)) as process:
        out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def succeeded(process):
    """The output of a finished process that must have succeeded."""
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    return process.stdout


def one_line_error(process, *words):
    """The process ended with status 1 and one line `error: ...` on stderr, nothing else, that has all the words."""
    assert process.returncode == 1, process.stderr
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1, process.stderr
    for word in words:
        assert word in process.stderr, (word, process.stderr)


def status(main, argv):
    """The exit status of a command whose main is called in this process."""
    try:
        return main(argv) or 0
    except SystemExit as end:
        return end.code


def timeless(lines):
    """The `step` and `iter` lines among `lines`, without the times that differ from run to run."""
    return [re.sub(r"time .*?ms, tok/s \d+, ", "", line) for line in lines if re.match(r"(step|iter) \d", line)]


def load_script(path):
    """A prepare script as a module, to call its parts in this process, which saves the imports."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_prepare", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
