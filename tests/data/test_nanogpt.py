"""nanoGPT's own files, made usable here."""

import sys

import numpy as np
import pytest
from launch import load_script
from prepared import CHAR, KEYS, NANOGPT, last_line, mtimes, prepare, read_folder

nanogpt = load_script(NANOGPT)


def nanogpts_folder(folder, train, val):
    folder.mkdir()
    for split, ids in (("train", train), ("val", val)):
        np.array(ids, dtype=np.uint16).tofile(folder / f"{split}.bin")
    return folder


@pytest.fixture
def nanogpt_here(monkeypatch):
    """Calls its main() in this process; returns the error line or None."""

    def run(folder):
        monkeypatch.setattr(sys, "argv", ["prepare.py", "--folder", str(folder)])
        return last_line(nanogpt.main)

    return run


def test_nanogpts_gpt2_tokens(nanogpt_here, tmp_path, capsys):
    folder = nanogpts_folder(tmp_path / "theirs", [50256, 0, 464], [50256])
    before = mtimes(folder)
    assert nanogpt_here(folder) is None and f"--dataset={folder}" in capsys.readouterr().out
    assert mtimes(folder).items() >= before.items()
    meta, train, val = read_folder(folder, KEYS)
    assert (meta["tokenizer"], meta["vocab_size"], list(train), list(val)) == ("gpt2", 50257, [50256, 0, 464], [50256])
    # the same again is already there; what says other than its neighbors is left to its owner
    assert nanogpt_here(folder) is None and "already there" in capsys.readouterr().out
    np.array([1], dtype=np.uint16).tofile(folder / "val.bin")
    before = mtimes(folder)
    assert "remove it first" in nanogpt_here(folder) and mtimes(folder) == before


def test_characters_are_not_taken_for_gpt2s_tokens(nanogpt_here, tmp_path):
    folder = nanogpts_folder(tmp_path / "characters", [0, 64, 255], [3])
    assert "no token id above 255: these are characters or bytes" in nanogpt_here(folder)
    assert not (folder / "meta.json").exists()


def test_nanogpts_characters(nanogpt_here, tmp_path):
    """Its prepare.py sorts the characters of input.txt, and holds out the last tenth."""
    text = "".join(map(chr, range(14, 1100))) + "and \U0001d11e on\n" * 20
    stoi = {char: i for i, char in enumerate(sorted(set(text)))}
    ids, n = [stoi[char] for char in text], int(0.9 * len(text))
    folder = nanogpts_folder(tmp_path / "theirs", ids[:n], ids[n:])
    (folder / "meta.pkl").touch()
    (folder / "input.txt").write_text(text)
    error = nanogpt_here(folder)
    assert error.endswith(f"python data/shakespeare_char/prepare.py --input {folder / 'input.txt'}")
    process = prepare(CHAR, "--input", folder / "input.txt", "--out_dir", tmp_path / "ours")
    assert process.returncode == 0, process.stderr
    for name in ("train.bin", "val.bin"):
        assert (tmp_path / "ours" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("val.bin", None, ["val.bin", "No such file"]),
        ("val.bin", b"", ["val.bin has 0 bytes"]),
        ("train.bin", b"odd", ["train.bin has 3 bytes"]),
        ("val.bin", b"\x51\xc4", ["val.bin holds token id 50257", "GPT-2", "50257 tokens"]),
        ("val.bin", b"\x51\x00\x00\x00" * 300, ["val.bin holds numbers of 32 bits"]),
    ],
)
def test_bins_that_are_not_nanogpts(nanogpt_here, tmp_path, name, content, words):
    folder = nanogpts_folder(tmp_path / "theirs", [1000], [2000])
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    error = nanogpt_here(folder)
    assert error and all(word in error for word in words), error
    assert not (folder / "meta.json").exists()
