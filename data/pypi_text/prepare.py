"""The code and documentation of large Python projects, by characters: train.bin, val.bin and meta.json.

    python data/pypi_text/prepare.py                   about a minute with the download
    python data/pypi_text/prepare.py --out_dir DIR     write there (default: beside this script)

A dataset for models too large for Shakespeare's 4.6 million characters. The text comes from a fixed list of PyPI source
archives, pinned by version and hash, which pip downloads; they are unpacked, never installed or run. Taken are the .py,
.rst, .md and .txt files that are plain ASCII (so a character is a byte) and at most 1 MB, each content once, in the
order of their names. A file in a hundred, chosen by the hash of its content, is held out for validation.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from reduced_sync.cli import set_up

if __name__ == "__main__":  # before the imports that take seconds: Ctrl-C ends them in silence
    set_up()

import argparse
import hashlib

import numpy as np

from reduced_sync import preparing

ARCHIVES = [  # name, version, sha256
    ("django", "5.1.4", "de450c09e91879fa5a307f696e57c851955c910a438a35e6b4c895e86bedc82a"),
    ("homeassistant", "2024.12.5", "3df79d8a02561cbbf606a1ce81579d0f2271c714a67477b60af3cd6025a2e9a0"),
    ("salt", "3007.1", "b933ac4cb3e4b1118b46dada55c9cc6bdc6f0f94b4c92877aec44b25c6a28c9a"),
    ("sqlalchemy", "2.0.36", "7f2767680b6d2398aea7082e45a774b2b0767b5c8d8ffb9c8b683088ea9b29c5"),
    ("sympy", "1.13.3", "b27fd2c6530e0ab39e275fc9b683895367e51d5da91baa8d3d64db2565fec4d9"),
    ("transformers", "4.47.1", "6c29c05a5f595e278481166539202bf8641281536df1c42357ee58a45d0a564a"),
]
SUFFIXES = (".py", ".rst", ".md", ".txt")
MAX_BYTES = 1_000_000


def texts(archives):
    """Yield (whether it is for validation, bytes) of every file taken."""
    seen = set()
    for archive in archives:
        for name, content in preparing.read_members(archive, "*"):
            if name.endswith(SUFFIXES) and 0 < len(content) <= MAX_BYTES and content.isascii():
                digest = hashlib.sha256(content).digest()
                if digest not in seen:
                    seen.add(digest)
                    yield int.from_bytes(digest[:4], "big") % 100 == 0, content


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, default=Path(__file__).resolve().parent, help="default: %(default)s")
    args = parser.parse_args()
    pins = hashlib.sha256(repr(ARCHIVES).encode()).hexdigest()
    source = f"{', '.join(f'{name}=={version}' for name, version, *_ in ARCHIVES)} (sha256 of the pins: {pins})"
    if preparing.is_complete(args.out_dir / "meta.json", tokenizer="char", source=source):
        print(f"{args.out_dir}: already there, {source}")
        return
    parts = {"train": [], "val": []}
    for held_out, content in texts([preparing.fetch_sdist(*archive) for archive in ARCHIVES]):
        parts["val" if held_out else "train"].append(content)
    streams = {split: np.frombuffer(b"\n".join(contents), np.uint8) for split, contents in parts.items()}
    codes = np.union1d(*map(np.unique, streams.values()))
    ids = np.zeros(128, "<u2")
    ids[codes] = np.arange(len(codes))
    meta = dict(vocab_size=len(codes), tokenizer="char", chars="".join(map(chr, codes)), source=source)
    splits = {split: (len(stream), [ids[stream]]) for split, stream in streams.items()}
    print(preparing.write_dataset(args.out_dir, splits, **meta))


if __name__ == "__main__":
    preparing.run(main)
