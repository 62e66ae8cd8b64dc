"""Texts to calibrate and to evaluate on: token ids of text files, and windows of them."""

import glob
from pathlib import Path

import numpy as np
import torch

from reduced_sync.hf.tokenizer import Tokens
from reduced_sync.preparing import decode_text


def read_texts(pattern: str, tokens: Tokens, key: str) -> dict[str, np.ndarray]:
    """{name: token ids} of the text files that the shell pattern `pattern` names. Raises ValueError, naming `key`.

    A text's name is its file's up to the first dot, or, where that does not tell all of them apart, more of its path.
    """
    paths = sorted(map(Path, glob.glob(pattern)))
    if not paths:
        raise ValueError(f"{key}={pattern!r}: there is no such file")
    ways = ([path.name.split(".")[0] for path in paths], [path.name for path in paths], list(map(str, paths)))
    names = next(names for names in ways if all(names) and len(set(names)) == len(paths))
    ids_of = {}
    for name, path in zip(names, paths, strict=True):
        try:
            text = decode_text(path.read_bytes(), str(path))
        except OSError as error:
            raise ValueError(f"{key}={pattern!r}: {path}: {error.strerror}") from None
        try:
            ids_of[name] = np.array(tokens.encode(text), dtype=np.int32)
        except ValueError as error:
            raise ValueError(f"{key}={pattern!r}: {path}: {error}") from None
    return ids_of


def spread_windows(texts: dict[str, np.ndarray], windows: int, length: int, key: str) -> torch.Tensor:
    """`windows` windows of `length` tokens, as many of each text and spread over it: (windows, length) int64.

    Raises ValueError, naming `key`, for a text that is too short for them not to overlap.
    """
    parts = []
    for i, (name, ids) in enumerate(texts.items()):
        if len(ids) < length:
            raise ValueError(f"the calibration text {name} has {len(ids)} tokens, less than a window of {length}")
        n = windows * (i + 1) // len(texts) - windows * i // len(texts)
        if n * length > len(ids):
            raise ValueError(f"{key}: {name} has {len(ids)} tokens; {n} windows of {length} need {n * length}")
        starts = np.arange(n) * (len(ids) // max(1, n))
        parts += [torch.from_numpy(ids[start : start + length].astype(np.int64)) for start in starts]
    return torch.stack(parts)


def random_windows(texts: dict[str, np.ndarray], n: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """n windows (n, length) int64 from random places, each text as likely."""
    arrays, windows = list(texts.values()), []
    for _ in range(n):
        ids = arrays[int(torch.randint(len(arrays), (), generator=generator))]
        start = int(torch.randint(len(ids) - length + 1, (), generator=generator))
        windows.append(torch.from_numpy(ids[start : start + length].astype(np.int64)))
    return torch.stack(windows)


def first_windows(ids: np.ndarray, n_tokens: int, length: int, name: str) -> torch.Tensor:
    """The first `n_tokens` tokens (0: all) in windows of `length`: (windows, length). Raises ValueError for none."""
    if 0 < n_tokens < length:
        raise ValueError(f"evaluation_tokens={n_tokens} is less than a window, block_size={length}")
    windows = min(len(ids), n_tokens or len(ids)) // length
    if windows < 1:
        raise ValueError(f"the evaluation text {name} has {len(ids)} tokens, less than a window of {length}")
    return torch.from_numpy(ids[: windows * length].astype(np.int64)).view(windows, length)
