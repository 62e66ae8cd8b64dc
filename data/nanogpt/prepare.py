"""nanoGPT's own train.bin and val.bin as they are: sees that they fit, and writes the meta.json that training needs.

    python data/nanogpt/prepare.py --folder ~/nanoGPT/data/shakespeare_char      says the --dataset to train with

The folder is one that a prepare.py of nanoGPT's filled. Its meta.pkl, where there is one, says which character each
token id is; where there is none, the tokens are GPT-2's. A pickle can run code when it is loaded: this one is only
read, and may hold dicts, ints and strings. meta.json is written beside these files, which are not changed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from reduced_sync.cli import set_up

if __name__ == "__main__":  # before the imports that take seconds: Ctrl-C ends them in silence
    set_up()

import argparse
import pickletools
import textwrap

import numpy as np

from reduced_sync import preparing


def read_pickle(data):
    """The value of a pickle (protocol 1 or above) of dicts, ints and strings, without Python's unpickler.

    Raises ValueError, LookupError or TypeError for anything else: no other opcode is known here.
    """
    stack, marks, memo = [], [], {}
    for opcode, argument, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "SHORT_BINUNICODE" | "BINUNICODE":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                marks.append(len(stack))
            case "SETITEM":
                *stack, key, value = stack
                stack[-1][key] = value
            case "SETITEMS":
                start = marks.pop()
                stack, items = stack[:start], stack[start:]
                stack[-1] |= dict(zip(items[::2], items[1::2], strict=True))
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "STOP":
                return stack.pop()
            case name:
                raise ValueError(f"it holds more than dicts, ints and strings ({name})")


def read_vocabulary(path):
    """The characters of a meta.pkl as one string, id = index. Raises ValueError where it is not nanoGPT's."""
    try:
        meta = read_pickle(path.read_bytes())
        itos, stoi = meta["itos"], meta["stoi"]
        tokens = [itos[i] for i in range(meta["vocab_size"])]
        inverse = {token: i for i, token in enumerate(tokens)}
        if not 0 < len(inverse) == len(tokens) == len(itos) <= 65536 or stoi != inverse:
            raise ValueError("they do not fit each other")
        if any(len(token) != 1 for token in tokens):
            raise ValueError("a token is not one character")
        "".join(tokens).encode()  # half a surrogate pair is no character
        return "".join(tokens)
    except (LookupError, TypeError, ValueError) as error:
        reason = textwrap.shorten(str(error), 200)
        raise ValueError(f"{path} is not nanoGPT's vocab_size, itos and stoi of characters: {reason}") from None


def read_bin(path, vocab_size, vocabulary):
    """(number of tokens, sha256) of a file of uint16 token ids. Raises ValueError where it is none."""
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise ValueError(f"{path} has {size} bytes: these are no uint16 token ids")
    largest = int(np.memmap(path, dtype="<u2", mode="r").max())
    if largest >= vocab_size:
        raise ValueError(f"{path} holds token id {largest}, but {vocabulary} has {vocab_size} tokens")
    return size // 2, preparing.file_sha256(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="holds train.bin, val.bin, and meta.pkl if any")
    folder = parser.parse_args().folder.resolve()

    pkl, source = folder / "meta.pkl", "nanoGPT's train.bin and val.bin"
    if pkl.exists():
        chars, vocabulary = read_vocabulary(pkl), pkl
        source += f", characters of meta.pkl (sha256 {preparing.file_sha256(pkl)})"
        meta = dict(vocab_size=len(chars), tokenizer="char", chars=chars, source=source)
    else:
        vocabulary = "GPT-2's vocabulary (there is no meta.pkl)"
        meta = dict(vocab_size=50257, tokenizer="gpt2", source=source)
    if preparing.is_complete(folder / "meta.json", **meta):
        print(f"{folder}: already there, {source}")
        return
    if (folder / "meta.json").exists():
        raise ValueError(f"{folder / 'meta.json'} is there, and is about other files: remove it first")
    bins = {split: read_bin(folder / f"{split}.bin", meta["vocab_size"], vocabulary) for split in ("train", "val")}
    print(preparing.write_meta(folder, bins, **meta))
    print(f"the tokens are taken for ids of {vocabulary}; train with --dataset={folder}")


if __name__ == "__main__":
    preparing.run(main)
