"""OpenWebText's script on small real text, without a hub."""

import collections
import gzip
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from launch import ending, load_script, start, succeeded
from prepared import KEYS, OWT, last_line, mtimes, prepare, read_folder

from reduced_sync import preparing

EOT = 50256


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


def write_parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.fixture(scope="session")
def tokenized(documents, tmp_path_factory):
    """Folders made of the documents: from one jsonl file on one process, and on two from two parquet files."""
    base = tmp_path_factory.mktemp("owt")
    jsonl = write_jsonl(base / "docs.jsonl", [{"text": text, "url": "x"} for text in documents])
    parquet = [base / "one.parquet", base / "two.parquet"]
    for path, part in zip(parquet, (documents[:1000], documents[1000:]), strict=True):
        write_parquet(path, text=part)
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
    *texts, rest = np.split(ids, np.flatnonzero(ids == EOT) + 1)
    assert len(rest) == 0
    return [preparing.gpt2_encoding().decode(text[:-1].tolist()) for text in texts]


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


def test_a_file_that_changed_behind_its_time_is_read_anew(run_here, tmp_path):
    """As cp -p makes it: datasets knows a file by its name and time."""
    for word in ("old", "new"):
        docs = write_jsonl(tmp_path / "docs.jsonl", [{"text": f"{word} {i}"} for i in range(3)])
        os.utime(docs, (1e9, 1e9))
        assert run_here("--data_files", docs) is None
        texts = split_documents(np.concatenate(read_folder(tmp_path / "out", KEYS)[1:]))
        assert sorted(texts) == [f"{word} {i}" for i in range(3)]


def test_a_worker_that_was_killed_is_one_line(run_here, tmp_path, monkeypatch):
    import datasets

    def killed(*args, **options):
        raise RuntimeError("One of the subprocesses has abruptly died during map operation.")

    monkeypatch.setattr(datasets.Dataset, "map", killed)
    error = run_here("--data_files", write_jsonl(tmp_path / "docs.jsonl", TWO))
    assert error.startswith("error: tokenizing failed") and error.endswith("abruptly died during map operation.")


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


TWO = [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("rows", "args", "words"),
    [
        ([{"words": "a"}, {"words": "b"}], [], ["docs.jsonl", "no column `text`", "words"]),
        ([{"text": 1}, {"text": 2}], [], ["docs.jsonl", "must hold strings", "int64"]),
        ([{"text": "a"}, {"text": None}], [], ["docs.jsonl", "null in 1 documents"]),
        ([{"text": "a" + " " * 10**6 + "b"}, *TWO], [], ["900,000 spaces in a row", "remove it: 'a  "]),
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
    documents = run_here.module.load_documents([Path(f"{name}.jsonl"), folder / f"{name}.jsonl"], "", None, 1)
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
    documents = run_here.module.load_documents(files, "", None, 1)
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
    (tmp_path / "cache" / "Skylion007___openwebtext" / "default.incomplete").mkdir(parents=True)  # it began
    (tmp_path / "cache" / "Skylion007___openwebtext" / "default.incomplete" / "0.arrow").touch()
    total, fewer = (sum(size for _, size in run_here.module.disk_needs(None, n, tmp_path)) for n in (None, 1000))
    assert total == pytest.approx(1006e8, rel=1e-2)
    assert total - fewer == pytest.approx(4 * 9.04e9, rel=1e-2)  # the tokens, twice, of 2 bytes


def test_no_hub(tmp_path):
    code = "import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**13, 0, 10**13)"
    process = prepare(OWT, "--out_dir", tmp_path / "out", code=code, env={"HF_HOME": str(tmp_path / "hf")})
    assert process.returncode == 1 and "Traceback" not in process.stderr, process.stderr
    assert process.stderr.splitlines()[-1].startswith("error: cannot load Skylion007/openwebtext: ")


def test_ctrl_c_while_tokenizing(plays, tmp_path):
    docs = write_jsonl(tmp_path / "docs.jsonl", [{"text": play} for play in plays] * 15)  # some 30 s of work
    argv = [OWT, "--data_files", docs, "--num_proc", "2", "--out_dir", tmp_path / "out"]
    with ending(start(argv, env={"HF_HOME": str(tmp_path / "hf")})) as process:
        seen = ""
        while "tokenizing train" not in seen:
            block = os.read(process.stderr.fileno(), 4096)
            assert block, seen
            seen += block.decode(errors="replace")
        os.killpg(process.pid, signal.SIGINT)  # what a terminal sends: to the workers too
        seen += process.communicate(timeout=30)[1]
    assert process.returncode == 130, seen
    assert "Traceback" not in seen and seen.splitlines()[-1].startswith("interrupted")
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
