"""What the prepare scripts share: whole folders or none, archives that nothing runs, the GPT-2 vocabulary, help."""

import ast
import os
import signal
import subprocess
import tarfile

import pytest
from launch import one_line_error, run_script, succeeded
from prepared import CHAR, NANOGPT, OWT, decoded, prepare

from reduced_sync import preparing

# Interrupted runs

INTERRUPT = """
import os, signal
replace, calls = os.replace, []
def interrupted_replace(source, target):
    calls.append(target)
    if len(calls) == {nth}:
        os.kill(os.getpid(), signal.{name})
    replace(source, target)
os.replace = interrupted_replace
"""


@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_interrupted_run_leaves_nothing_that_counts(tmp_path, nth, name):
    (tmp_path / "old.txt").write_text("the old text")
    (tmp_path / "new.txt").write_text("what comes instead of it")
    out = tmp_path / "out"
    succeeded(prepare(CHAR, "--input", tmp_path / "old.txt", "--out_dir", out))
    command = (CHAR, "--input", tmp_path / "new.txt", "--out_dir", out)
    process = prepare(*command, code=INTERRUPT.format(nth=nth, name=name))
    is_old = nth < 3  # the first two are of the new files' own folder
    assert (out / "meta.json").exists() == is_old
    if name == "SIGINT":
        assert process.returncode == 130
        assert process.stderr.strip().startswith("interrupted") and process.stderr.strip().count("\n") == 0
        assert sorted(path.name for path in out.iterdir()) == ["meta.json"] * is_old + ["train.bin", "val.bin"]
        assert not is_old or "".join(decoded(out)) == "the old text"
    else:
        assert process.returncode == -signal.SIGKILL
    succeeded(prepare(*command))
    assert "".join(decoded(out)) == "what comes instead of it"


# Archives and the GPT-2 vocabulary


@pytest.fixture
def local_index(tmp_path, monkeypatch):
    """pip sees nothing but a folder with the archive trap-1.0, whose setup.py leaves a file behind. Returns (sha256,
    that file)."""
    trap, links = tmp_path / "executed", tmp_path / "links"
    source = tmp_path / "trap-1.0"
    source.mkdir()
    links.mkdir()
    (source / "setup.py").write_text(f"open({str(trap)!r}, 'w').close()\nfrom setuptools import setup\nsetup()\n")
    (source / "PKG-INFO").write_text("Metadata-Version: 1.0\nName: trap\nVersion: 1.0\n")
    with tarfile.open(links / "trap-1.0.tar.gz", "w:gz") as tar:
        tar.add(source, "trap-1.0")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return preparing.file_sha256(links / "trap-1.0.tar.gz"), trap


def test_archive_is_fetched_without_running_it(local_index, tmp_path, monkeypatch):
    sha256, trap = local_index
    fetched = preparing.fetch_sdist("trap", "1.0", sha256, folder=tmp_path / "cache")
    assert preparing.file_sha256(fetched) == sha256 and list((tmp_path / "cache").iterdir()) == [fetched]
    assert not trap.exists()
    assert preparing.read_members(fetched, "*/PKG-INFO")[0][1].startswith(b"Metadata-Version")
    monkeypatch.setattr(subprocess, "run", None)  # the second time it is there
    assert preparing.fetch_sdist("trap", "1.0", sha256, folder=tmp_path / "cache") == fetched


@pytest.mark.parametrize(
    ("name", "words"), [("trap", "DO NOT MATCH THE HASHES"), ("absent", "No matching distribution")]
)
def test_archive_that_pip_does_not_get(local_index, tmp_path, name, words):
    with pytest.raises(ValueError, match=words) as error:
        preparing.fetch_sdist(name, "1.0", "0" * 64, folder=tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == [] and not local_index[1].exists()


def test_unreachable_index(local_index, tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens there
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(ValueError, match="the package index cannot be reached"):
        preparing.fetch_sdist("absent", "1.0", "0" * 64, folder=tmp_path / "cache")


NO_NETWORK = """
import socket
def connect(*args):
    raise OSError("no network in this test")
socket.socket.connect = socket.getaddrinfo = connect
"""


def test_gpt2_encoding_without_network(tmp_path):
    preparing.gpt2_encoding()  # the archive is in .cache/ from here on
    code = "from reduced_sync import preparing\ne = preparing.gpt2_encoding()\n"
    code += "print(e.encode('hello world'), e.n_vocab, e.eot_token)"
    process = run_script(["-c", NO_NETWORK + code], env={"TIKTOKEN_CACHE_DIR": str(tmp_path / "tiktoken")})
    assert succeeded(process).splitlines()[-1] == "[31373, 995] 50257 50256"
    assert len(list((tmp_path / "tiktoken").iterdir())) == 2

    fail = "from reduced_sync import preparing\ndef fail(*a, **k): raise ValueError('no index')\n"
    fail += "preparing.fetch_sdist = fail\n"
    fail += "preparing.run(preparing.gpt2_encoding)"
    process = run_script(["-c", NO_NETWORK + fail], env={"TIKTOKEN_CACHE_DIR": str(tmp_path / "empty")})
    one_line_error(process, "cannot get the GPT-2 vocabulary", "no index")


@pytest.mark.parametrize("script", [CHAR, OWT, NANOGPT])
def test_help_is_the_manual(script):
    manual = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8")), clean=False)
    assert manual.rstrip() in succeeded(prepare(script, "--help"))
