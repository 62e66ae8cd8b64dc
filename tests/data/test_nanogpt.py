"""nanoGPT's own files, made usable here without unpickling anything."""

import os
import pickle
import re
import shutil
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from launch import load_script
from prepared import KEYS, NANOGPT, decoded, last_line, mtimes, read_folder

from reduced_sync.data import Corpus

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
