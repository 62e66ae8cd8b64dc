"""What every command does with errors, signals, terminals and pipes of any kind."""

import os
import pty
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch._inductor.config
from launch import ROOT, ending, start, status

import bench
import compare
from reduced_sync import distributed
from reduced_sync.cli import Output, check_figure, one_line, one_line_errors, stop_signals

pytestmark = pytest.mark.timeout(60)
SCRIPTS = {path for pattern in ("*.py", "data/*/*.py", "models/*/*.py") for path in ROOT.glob(pattern)}
SCRIPTS = sorted(SCRIPTS - {ROOT / "reduced_sync_model.py"})
IMPORTED = """import time
open("importing", "w").close()
while True:
    try:
        time.sleep(60)
    except BaseException:  # as of some modules of numpy and torch
        pass
"""


def test_one_line_is_one_and_short():
    assert one_line(ValueError("what\nhow")) == "what" and one_line(ValueError()) == "ValueError"
    assert one_line(ValueError("a" * 2000)) == "a" * 2000
    line = one_line(ValueError("n_layr" + "x" * 65_535 + ": unknown key; known are n_layer"))
    assert len(line) < 2000 and line.startswith("n_layr") and line.endswith("known are n_layer")


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("what\nhow"), 1, "error: what\n"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), 1, "error: a/b: No such file or directory\n"),
        (ChildProcessError("it ended"), 1, "error: it ended\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
)
def test_errors_that_are_expected_are_one_line(capsys, error, code, line):
    with pytest.raises(SystemExit) as ended, one_line_errors("stopped"):
        raise error
    assert ended.value.code == code and capsys.readouterr().err == line
    with pytest.raises(RuntimeError), one_line_errors():  # a mistake of ours keeps its traceback
        raise RuntimeError("a mistake")


def said(capsys, action):
    """The line on stderr with which report_errors ends what `action` does."""
    with pytest.raises(SystemExit) as ended, distributed.report_errors():
        action()
    line = capsys.readouterr().err
    assert ended.value.code == 1 and line.startswith("error: ") and line.count("\n") == 1, line
    return line


@pytest.mark.parametrize(
    "action",
    [
        lambda: torch.empty(4_000_000, 16_000_000),  # as --n_embd=4000000 asks for
        lambda: torch.empty(2**40, 2**40),
        lambda: np.zeros((4_000_000, 16_000_000)),
        lambda: [0] * 10**15,
    ],
)
def test_memory_that_there_is_not(capsys, action):
    assert said(capsys, action).startswith("error: not enough memory: ")


@pytest.mark.parametrize("compiler", ["no-such-compiler", "/bin/false"])
def test_no_compiler_for_torch_compile(capsys, compiler):
    with torch._inductor.config.patch({"cpp.cxx": (None, compiler), "force_disable_caches": True}):
        line = said(capsys, lambda: torch.compile(lambda x: x.sin() + 1)(torch.ones(99)))
    assert "finds no compiler that works" in line and "--compile=False" in line and compiler in line


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a mistake"), distributed.report_errors():
        raise RuntimeError("a mistake")


def test_a_figures_format_is_that_of_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = str(ROOT / "results/pilot/2x128-baseline-lr0.004-seed1")
    assert status(compare.main, [run, "--png=~/c.pdf", "--csv=~/c.csv"]) == 0
    assert (tmp_path / "c.pdf").read_bytes().startswith(b"%PDF") and (tmp_path / "c.csv").exists()
    for name in ("a.b/c.png", "c.svg"):
        check_figure(name)


@pytest.mark.parametrize("path", ["c", "c.", "c.jpeg2", "png", ".png", "c.png.gz"])
def test_names_that_no_figure_has(path, capsys):
    line = f"error: {path!r}: a figure's file name must end in .png, .pdf or .svg\n"
    assert status(compare.main, [f"--png={path}"]) == 1 and capsys.readouterr().err == line
    assert status(bench.main, ["decode", f"--png={path}"]) == 1 and capsys.readouterr().err == line


def test_a_hangup_asks_for_a_stop_unless_it_is_ignored():
    """As nohup does it."""
    assert {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1} == set(stop_signals())
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1} == set(stop_signals())
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_ctrl_c_during_the_imports(tmp_path, path):
    """It ends every command at once and in silence, whatever an import makes of a KeyboardInterrupt."""
    for name in ("argparse", "dataclasses"):  # each command imports one of them at first
        (tmp_path / f"{name}.py").write_text(IMPORTED)
    with ending(start([path], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})) as process:
        while not (tmp_path / "importing").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (-signal.SIGINT, "", "")  # to a shell that is 130


@pytest.mark.parametrize("encoding, text", [("ascii", b"? ? | caf?\n"), ("latin-1", b"? ? | caf\xe9\n")])
def test_characters_that_the_terminal_does_not_have(encoding, text):
    code = "from reduced_sync.cli import set_up; set_up(); print('✓ █ | café')"
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=30)
    assert (process.returncode, process.stdout, process.stderr) == (0, text, b"")


@pytest.mark.parametrize("keeps_running, status, done", [(False, 141, False), (True, 0, True)])
def test_a_reader_that_has_gone(tmp_path, keeps_running, status, done):
    """A command ends with no output, a run goes on to its end."""
    code = f"import os\nfrom reduced_sync.cli import set_up\nset_up({keeps_running})\n"
    code += "for i in range(9): print('x', flush=True)\n"
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", code + "os.mkdir('done')"]
    keys = dict(stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    process = subprocess.run(command, timeout=30, **keys)
    os.close(writer)
    assert (process.returncode, process.stderr, (tmp_path / "done").exists()) == (status, b"", done)


def test_a_terminal_that_has_closed():
    ours, terminal = pty.openpty()
    os.close(ours)
    assert Output(terminal, keeps_running=True).write(b"xy") == 2
    os.close(terminal)


def test_a_full_disk_behind_the_output_is_an_error():
    with open("/dev/full", "wb") as full, pytest.raises(OSError, match="No space left"):
        Output(full.fileno(), keeps_running=True).write(b"x")


@pytest.mark.parametrize("keeps_running", [False, True])
def test_a_full_disk_behind_the_output_is_one_line(keeps_running):
    code = f"from reduced_sync.cli import one_line_errors, set_up\nset_up({keeps_running})\n"
    code += "with one_line_errors(): print('x')"
    with open("/dev/full", "wb") as full:
        keys = dict(stdout=full, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
        process = subprocess.run([sys.executable, "-c", code], timeout=30, **keys)
    assert (process.returncode, process.stderr) == (1, b"error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("model", ["", "MODEL=none", "MODEL=out"])
def test_serve_asks_for_a_model_before_it_installs(tmp_path, model):
    """Without a model, with one that is not there, with an out_dir."""
    (tmp_path / "out").mkdir()
    make = ["make", "-C", tmp_path, "-f", ROOT / "Makefile", "serve", *model.split()]
    process = subprocess.run(make, capture_output=True, text=True, timeout=30)
    assert process.returncode == 2 and [path.name for path in tmp_path.iterdir()] == ["out"]
    line = process.stderr.splitlines()[0]
    assert line.startswith(f"error: {model or 'MODEL='} has no config.json: ")
    assert line.endswith(": make serve MODEL=FOLDER")
