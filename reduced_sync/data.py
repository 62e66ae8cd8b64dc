"""Token files and batches: a batch is a function of (seed, step) alone, so there is no loader state to save.

data/NAME/ holds train.bin and val.bin (uint16 token ids) and meta.json, made by data/NAME/prepare.py.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parents[1] / "data"
GPT2_TOKENS = "009e06fa5ef9c82ae9139d16e1721700f2b11089529f8c5598a3c5e4041dbc0d"  # vocabulary_hash


class Corpus:
    """The token files of one dataset, checked. `dataset` is a folder under data/, or an absolute path.

    Raises ValueError where a file is missing, cut short or not what meta.json says.
    """

    def __init__(self, dataset, block_size):
        self.folder = DATA / os.path.expanduser(dataset)
        self.block_size = block_size
        self.meta = self._read_meta()
        self.splits = {split: self._open(split) for split in ("train", "val")}

    def train_batches(
        self, seed: int, step: int, windows: int, batch_size: int, part: int, parts: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the micro-batches (x, y), each (batch_size, block_size) int64, of one of `parts` shares of a step.

        The step's `windows` are a function of (seed, step); parts x batch_size must divide them.
        """
        tokens = self.splits["train"]
        starts = np.random.default_rng((seed, step)).integers(0, len(tokens) - self.block_size, windows)
        share = windows // parts
        for first in range(part * share, (part + 1) * share, batch_size):
            yield self._cut("train", starts[first : first + batch_size])

    def evaluation_starts(self, split: str, batches: int, batch_size: int) -> np.ndarray:
        """Where the fixed windows of an evaluation start in `split`; they do not overlap.

        They are `batches` x batch_size spread evenly, or with 0 the whole of val, its last window cut short by the
        file's end, and as many of train; all there are, where there are fewer.
        """
        T, length = self.block_size, len(self.splits[split]) - 1
        windows = batches * batch_size or -(-(len(self.splits["val"]) - 1) // T)
        if batches == 0 and windows * T >= length:
            return np.arange(0, length, T)
        windows = min(windows, length // T)
        return np.arange(windows) * (length // windows)

    def evaluation_batches(
        self, split: str, batches: int, batch_size: int, part: int, parts: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """Yield one of `parts` shares of the windows of `evaluation_starts`.

        Each batch is (x, y, n) with n counted targets; rows and places that fill a batch up have the target -1.
        """
        starts = self.evaluation_starts(split, batches, batch_size)[part::parts]
        for first in range(0, len(starts), batch_size):
            x, y = self._cut(split, starts[first : first + batch_size])
            if len(x) < batch_size:  # one shape for all batches: nothing is compiled twice
                fill = (0, 0, 0, batch_size - len(x))
                x, y = torch.nn.functional.pad(x, fill), torch.nn.functional.pad(y, fill, value=-1)
            yield x, y, int((y >= 0).sum())

    def _cut(self, split, starts):
        """Windows (n, block_size) of inputs and targets; past the file's end the input is 0 and the target -1."""
        tokens, T = self.splits[split], self.block_size
        rows = [np.asarray(tokens[start : start + T + 1], dtype=np.int64) for start in starts]
        if rows and (largest := max(int(row.max()) for row in rows)) >= (vocab_size := self.meta["vocab_size"]):
            raise ValueError(
                f"{self.folder / split}.bin holds token id {largest}, at or above the vocabulary size {vocab_size}"
            )
        x, y = np.zeros((len(rows), T), np.int64), np.full((len(rows), T), -1, np.int64)
        for i, row in enumerate(rows):
            x[i, : min(T, len(row))] = row[:T]
            y[i, : len(row) - 1] = row[1:]
        return torch.from_numpy(x), torch.from_numpy(y)

    def _read_meta(self):
        path = self.folder / "meta.json"
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            script = self.folder / "prepare.py"
            how = f"python {script}"
            if not script.exists():
                names = ", ".join(sorted(path.parent.name for path in DATA.glob("*/meta.json")))
                how = f"dataset is a folder under {DATA}, prepared are {names or 'none'}, or an absolute path"
            if (self.folder / "train.bin").exists():
                how += f", or for nanoGPT's own files python {DATA / 'nanogpt/prepare.py'} --folder {self.folder}"
            raise ValueError(f"no {path}; prepare the data first: {how}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        for key in ("vocab_size", "train_tokens", "val_tokens"):
            if not isinstance(meta, dict) or type(meta.get(key)) is not int or meta[key] < 1:
                raise ValueError(f"{path}: {key} is missing or not a positive integer; prepare the data again")
        if meta["vocab_size"] > 65536:
            raise ValueError(f"{path}: vocab_size={meta['vocab_size']} does not fit uint16 token ids")
        return meta

    def _open(self, split):
        path = self.folder / f"{split}.bin"
        try:
            size = path.stat().st_size
            if size % 2:
                raise ValueError(f"{path} has {size} bytes, an odd number: not uint16 token ids")
            if size != 2 * self.meta[f"{split}_tokens"]:
                raise ValueError(
                    f"{path} has {size // 2} tokens, not the {self.meta[f'{split}_tokens']} of meta.json; prepare again"
                )
            if size // 2 <= self.block_size:
                way_out = "prepare with a larger --val_fraction" if split == "val" else "take more text"
                raise ValueError(
                    f"{path} has {size // 2} tokens, too few for block_size={self.block_size}: "
                    f"{way_out}, or a smaller --block_size"
                )
            return np.memmap(path, dtype="<u2", mode="r")
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def vocabulary_hash(tokenizer: str | None, meta: dict) -> str | None:
    """A hash of the tokens that the ids of a dataset with this `meta` stand for, if `tokenizer` is theirs.

    tokenizer: "gpt2", "char" with the characters of `meta`, or a folder or hub name. None where it does not tell them.
    Raises ValueError for a tokenizer.json that is damaged.
    """
    if tokenizer == "gpt2":
        return GPT2_TOKENS
    if tokenizer == "char":
        tokens = meta.get("chars", "")
    else:
        tokens = _tokens_of(tokenizer, meta["vocab_size"])
    return hashlib.sha256("\0".join(tokens).encode()).hexdigest() if tokens else None


def _tokens_of(name, count):
    """The first `count` tokens of a folder or hub name; none where it has no tokenizer.json."""
    from tokenizers import Tokenizer
    from transformers.utils import cached_file

    try:
        path = name and cached_file(name, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    except OSError:  # neither a folder nor within reach
        path = None
    try:
        return [token for token in map(Tokenizer.from_file(path).id_to_token, range(count)) if token] if path else []
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ValueError(f"{path} is damaged: {error}") from None
