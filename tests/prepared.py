"""The prepare scripts of data/, run as users do, and what they must have written."""

import contextlib
import hashlib
import io
import json

import numpy as np
from launch import ROOT, run_script

from reduced_sync import preparing

CHAR, PYPI, OWT, NANOGPT = (
    ROOT / "data" / name / "prepare.py" for name in ("shakespeare_char", "pypi_text", "openwebtext", "nanogpt")
)
KEYS = ["vocab_size", "tokenizer", "source", "train_tokens", "val_tokens", "train_sha256", "val_sha256"]


def prepare(script, *args, code="", env=None, **options):
    """Run a prepare script in a process of its own, after the Python statements of `code`. It finds our code itself."""
    start = f"import runpy, sys\n{code}\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    command = ["-c", start, script] if code else [script]
    return run_script([*command, *args], timeout=110, env={"PYTHONPATH": "", **(env or {})}, **options)


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
