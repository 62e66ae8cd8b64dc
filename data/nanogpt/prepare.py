"""nanoGPT's own train.bin and val.bin of GPT-2 tokens: sees that they fit, and writes meta.json, which training needs.

    python data/nanogpt/prepare.py --folder ~/nanoGPT/data/openwebtext           says the --dataset to train with

The folder is one that a prepare.py of nanoGPT's filled. meta.json is written beside these files, which are not changed.
Of nanoGPT's character datasets, data/shakespeare_char/prepare.py --input makes the same tokens from the text.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from reduced_sync.cli import set_up

if __name__ == "__main__":  # before the imports that take seconds: Ctrl-C ends them in silence
    set_up()

import argparse

import numpy as np

from reduced_sync import preparing

VOCAB_SIZE = 50257


def read_bin(path):
    """(number of tokens, sha256) of a file of uint16 token ids. Raises ValueError where it is none."""
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise ValueError(f"{path} has {size} bytes: these are no uint16 token ids")
    ids = np.memmap(path, dtype="<u2", mode="r")
    if size > 1000 and not ids[1::2].any():  # every other one is the upper half of a number below 65536
        raise ValueError(f"{path} holds numbers of 32 bits: token ids of 16 bits (uint16) are allowed")
    largest = int(ids.max())
    if largest >= VOCAB_SIZE:
        raise ValueError(f"{path} holds token id {largest}, but GPT-2 has {VOCAB_SIZE} tokens")
    if largest < 256:
        raise ValueError(f"{path} holds no token id above {largest}: these are characters or bytes, not GPT-2's tokens")
    return size // 2, preparing.file_sha256(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="holds train.bin and val.bin")
    folder = parser.parse_args().folder.resolve()

    if (folder / "meta.pkl").exists():
        same = f"python data/shakespeare_char/prepare.py --input {folder / 'input.txt'}"
        raise ValueError(f"{folder} has a meta.pkl, so its tokens are characters; this makes the same ones: {same}")
    meta = dict(vocab_size=VOCAB_SIZE, tokenizer="gpt2", source="nanoGPT's train.bin and val.bin")
    if preparing.is_complete(folder / "meta.json", **meta):
        print(f"{folder}: already there")
        return
    if (folder / "meta.json").exists():
        raise ValueError(f"{folder / 'meta.json'} is there, and is about other files: remove it first")
    bins = {split: read_bin(folder / f"{split}.bin") for split in ("train", "val")}
    print(preparing.write_meta(folder, bins, **meta))
    print(f"the tokens are taken for GPT-2's; train with --dataset={folder}")


if __name__ == "__main__":
    preparing.run(main)
