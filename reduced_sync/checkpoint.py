"""Checkpoints: one file with the whole model, whatever layout wrote it, so that any other layout can read it.

A checkpoint is a dict of tensors and plain types: `model` (parameters, full shard dimension), `optimizer` (AdamW's
state by parameter name, likewise), `model_args`, `config`, `data` (meta.json), `step`, `evaluated` (the last step
evaluated), `best_val_loss`, `skipped` and `bad_steps` (updates skipped in all, and in a row), `scaler`. In an out_dir,
ckpt.pt is the last one, ckpt_previous.pt the one before, and ckpt_best.pt the one with the lowest validation loss.
Files are replaced whole, never changed.
"""

import contextlib
import dataclasses
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from reduced_sync.cli import one_line
from reduced_sync.files import fsync_folder, link_file, replace_file
from reduced_sync.old_keys import translate_old_keys
from reduced_sync_model import GPT, GPTConfig, is_sharded

# the keys of a checkpoint and their types: of a run of the training script, and of the result of drop_syncs.py
DROPPING_KEYS = dict.fromkeys("model optimizer model_args config data progress".split(), dict)
TRAINING_KEYS = dict.fromkeys("model optimizer model_args config data scaler".split(), dict)
TRAINING_KEYS |= dict.fromkeys("step evaluated skipped bad_steps".split(), int) | {"best_val_loss": float}
TOKENIZER_FOLDER = "tokenizer"  # of an out_dir: its model's own tokenizer and generation_config.json
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # of AdamW; none before its first update


def gather_tensor(model: GPT, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The whole parameter `name`, or a state of it, on the CPU. Every rank of the TP group has to call it."""
    if model.tp_group is not None and is_sharded(name) and tensor.dim() > 0:
        parts = [torch.empty_like(tensor) for _ in range(model.tp_size)]
        dist.all_gather(parts, tensor.contiguous(), group=model.tp_group)
        return torch.cat([part.cpu() for part in parts])
    return tensor.detach().cpu().clone()


def gather(model: GPT, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """The whole model's parameters and optimizer state on the CPU. Every rank of the TP group has to call it."""
    state = {"model": {}, "optimizer": {}}
    for name, parameter in model.named_parameters():
        state["model"][name] = gather_tensor(model, name, parameter.detach())
        moments = optimizer.state.get(parameter, {}) if optimizer else {}
        state["optimizer"][name] = {key: gather_tensor(model, name, value) for key, value in moments.items()}
    return state


def restore(checkpoint: dict, model: GPT, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Copy this rank's part of a loaded checkpoint into the model and, where given, the optimizer."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(model.local_part(name, checkpoint["model"][name]))
    if optimizer is not None:
        restore_optimizer(checkpoint["optimizer"], model, optimizer)


def restore_optimizer(states: dict, model: GPT, optimizer: torch.optim.Optimizer) -> None:
    """Copy this rank's part of a checkpoint's `optimizer` into the optimizer of the model."""
    for name, parameter in model.named_parameters():
        if moments := states[name]:
            optimizer.state[parameter] = {
                # AdamW keeps its step count on the CPU unless it is fused
                key: value.clone().to(parameter.device if optimizer.defaults["fused"] else "cpu")
                if value.dim() == 0
                else model.local_part(name, value).to(parameter.device, copy=True)
                for key, value in moments.items()
            }


def save(checkpoint: dict, out_dir: str | Path, is_best: bool) -> None:
    """Write ckpt.pt, durably, keeping the one before; with is_best also ckpt_best.pt.

    Raises OSError where that fails; every file is whole then.
    """
    out_dir = Path(out_dir)

    def write(file):
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch's zip writer turns a failed write into this
            cause = error.__context__
            raise OSError(cause.strerror if isinstance(cause, OSError) else f"writing failed: {error}") from None

    latest, previous, best = (out_dir / f"{name}.pt" for name in ("ckpt", "ckpt_previous", "ckpt_best"))
    if is_best:  # first: a run that is killed in between resumes from the older ckpt.pt, and saves the best again
        replace_file(best, write)
        if latest.exists():
            link_file(latest, previous)
        link_file(best, latest)
    else:
        replace_file(latest, write, keep=previous)
    fsync_folder(out_dir)


@contextlib.contextmanager
def usable(path: str | Path) -> Iterator[None]:
    """What goes wrong inside is a ValueError that names the checkpoint in `path`, and the one before it if there is."""
    try:
        yield
    except Exception as error:  # whatever a damaged or foreign file provokes
        previous = Path(path).with_name("ckpt_previous.pt")
        damaged = not isinstance(error, OSError | MemoryError)  # which say nothing of the file
        other = damaged and Path(path).name == "ckpt.pt" and previous.exists()
        # not cp: it would write into ckpt_best.pt, where that is another name of the same file
        hint = f"; to go on from the one before: mv {previous} {path}" if other else ""
        raise ValueError(f"checkpoint {path} cannot be used: {one_line(error)}{hint}") from None


def load(path: str | Path, kinds: dict | None = None) -> dict:
    """The checkpoint in `path`, read without running anything in it. Raises ValueError with one clear line.

    kinds: {key that it must have: type}; None: TRAINING_KEYS, or DROPPING_KEYS where it has a key of those alone.
    """
    if not Path(path).exists():
        raise ValueError(f"no checkpoint {path}")
    with usable(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load itself does not check the sums
        if damaged is not None:
            raise ValueError(f"{damaged} in it is damaged")
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if kinds is None:
            kinds = DROPPING_KEYS if isinstance(checkpoint, dict) and "progress" in checkpoint else TRAINING_KEYS
        for key, kind in kinds.items():
            if not isinstance(checkpoint, dict) or key not in checkpoint:
                raise ValueError(f"it is not a checkpoint of this project, or not one of this kind: no {key}")
            if type(checkpoint[key]) is not kind:
                raise ValueError(f"its {key} is {type(checkpoint[key]).__name__}, not {kind.__name__}")
        for key in kinds.keys() & {"model_args", "config", "data"}:
            json.dumps(checkpoint[key])  # no tensor where the header has plain values
        for key in kinds.keys() & {"model_args", "config", "progress"}:
            checkpoint[key] = translate_old_keys(checkpoint[key])
    return checkpoint


def check_model(checkpoint: dict, config: GPTConfig, path: str | Path) -> None:
    """Raise ValueError unless the checkpoint holds the model of GPTConfig `config`, and nothing else, in float32.

    It names the fields that differ, or a tensor.
    """
    with usable(path):
        saved = dataclasses.asdict(GPTConfig(**checkpoint["model_args"]))  # older ones lack some fields
    wanted = dataclasses.asdict(config) | {"dropout": saved.get("dropout")}  # dropout is no part of the weights
    differing = [f"{key}={saved.get(key)!r}, not {value!r}" for key, value in wanted.items() if saved.get(key) != value]
    if differing:
        raise ValueError(f"checkpoint {path} holds another model: {'; '.join(differing)}")
    with torch.device("meta"):  # shapes without memory
        parameters = dict(GPT(config).named_parameters())
    with usable(path):
        for name in [*checkpoint["model"], *checkpoint["optimizer"]]:
            if name not in parameters:
                raise ValueError(f"{name!r} in it is no parameter of its model")
        for name, parameter in parameters.items():
            weight, moments = checkpoint["model"].get(name), checkpoint["optimizer"].get(name)
            known = isinstance(moments, dict) and moments.keys() in (set(), MOMENTS)
            tensors = [weight, *moments.values()] if known else [None]
            fit = all(isinstance(t, torch.Tensor) and t.shape in (parameter.shape, ()) for t in tensors)
            if not fit or not weight.dim():
                raise ValueError(f"{name} or its optimizer state is not what it should be")
            if other := [str(t.dtype) for t in tensors if t.dtype != torch.float32]:
                raise ValueError(f"{name} or its optimizer state is {other[0]}; allowed is float32")


def load_with_tokens(path: str | Path) -> tuple[dict, GPTConfig, dict]:
    """(checkpoint, its GPTConfig without dropout, meta that tokenizer.Tokens takes) of the checkpoint in `path`.

    Raises ValueError with one clear line.
    """
    saved = load(path)
    with usable(path):
        config = GPTConfig(**saved["model_args"] | {"dropout": 0.0})
    check_model(saved, config, path)
    meta = saved["data"]
    with usable(path):
        chars, size = meta.get("chars"), meta.get("vocab_size")
        if type(size) is not int or not 0 < size <= config.vocab_size:
            raise ValueError(f"vocab_size={size!r} of its data does not fit its model")
        kept = Path(path).parent / TOKENIZER_FOLDER
        if "progress" in saved and kept.is_dir():  # else it is left of another run
            meta = meta | {"tokenizer": str(kept)}
        name = meta.get("tokenizer")
        is_char = name == "char" and isinstance(chars, str) and len(chars) == size
        if not (is_char or name == "gpt2" or (isinstance(name, str) and ("/" in name or Path(name).is_dir()))):
            raise ValueError("its data names no tokenizer: gpt2, char with chars, or a folder")
    return saved, config, meta


def check_data(checkpoint: dict, meta: dict, path: str | Path) -> None:
    """Raise ValueError naming the fields in which the meta.json of the checkpoint's data differs from `meta`."""
    saved = checkpoint["data"]
    differing = [key for key in dict.fromkeys([*saved, *meta]) if saved.get(key) != meta.get(key)]
    if differing:
        names = ", ".join(map(repr, differing))
        raise ValueError(f"checkpoint {path} was trained on other data: meta.json differs in {names}")
