"""The trained model whose syncs are dropped: its shape, its tokens and texts, and how it is built."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch.distributed as dist

import reduced_sync_model as rsm
from reduced_sync import checkpoint as ckpt
from reduced_sync.data import Corpus
from reduced_sync.dropping import texts
from reduced_sync.hf.tokenizer import Tokens, pretrained_meta
from reduced_sync.hf.weights import MODEL_TYPE, from_dense, from_pretrained, pretrained_fields, shards_to_dense
from reduced_sync.preparing import file_sha256


class Source:
    """The trained model: its shape, its tokens, and how it is built in any number of shards."""

    def __init__(self, name: str):
        """Raises ValueError or OSError where there is none, or none with all syncs."""
        self.name, path = name, Path(name) / "ckpt.pt"
        self.saved = None
        if not path.exists():
            family, fields = pretrained_fields(name)
            if family == MODEL_TYPE:
                raise ValueError(f"init_from={name!r} was exported with its code: name the out_dir it came from")
            self.meta = pretrained_meta(name, fields["vocab_size"]) | {"source": str(name)}
            self.fields = fields
        else:
            self.saved, trained, self.meta = ckpt.load_with_tokens(path)
            self.dense = shards_to_dense(self.saved["model"], trained)
            self.fields = dataclasses.asdict(trained) | {"sync": "baseline"}

    def build(self, n_shard: int, tp_group: dist.ProcessGroup | None = None) -> rsm.GPT:
        """The model with all syncs, on the CPU. Raises ValueError where it cannot be cut so."""
        if self.saved is None:
            return from_pretrained(self.name, tp_group, n_shard=n_shard)
        config = rsm.GPTConfig(**self.fields | {"n_shard": n_shard})
        return from_dense(config, self.dense.items(), tp_group, self.name)

    def hashes(self) -> dict[str, str]:
        """{file: sha256} of the weights, of a folder; nothing of a hub name, whose files do not change."""
        folder = Path(self.name)
        paths = [folder / "ckpt.pt"] if self.saved else sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        return {path.name: file_sha256(path) for path in paths}

    def texts(self, config: Any) -> tuple[dict, dict]:
        """{name: token ids} to calibrate and to evaluate on, as config says, drop_syncs.py's. Raises ValueError."""
        parts = []
        if self.meta["tokenizer"] not in ("gpt2", "char"):
            self.tokens  # noqa: B018  without a text, too: the result gets them
        for key, split in (("calibration", "train"), ("evaluation", "val")):
            if pattern := getattr(config, key):
                parts.append(texts.read_texts(pattern, self.tokens, key))
            elif self.saved is None or "dataset" not in self.saved["config"]:  # of this command, it has none
                raise ValueError(f"{key} is empty: it must name text files")
            else:
                corpus = Corpus(self.saved["config"]["dataset"], config.block_size)
                ckpt.check_data(self.saved, corpus.meta, Path(self.name) / "ckpt.pt")
                parts.append({split: corpus.splits[split]})
        return parts[0], parts[1]

    @functools.cached_property
    def tokens(self) -> Tokens:
        """Loaded once, and only where there is text."""
        return Tokens(self.meta, self.fields["vocab_size"])
