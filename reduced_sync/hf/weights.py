"""Dense weights and shards: a dense model cut into shards and joined again, and models of the Hugging Face formats.

A dense model of ours has nanoGPT's names. transformers' GPT-2 has the same, its linear layers transposed (Conv1D);
the other families have names of their own, and Q, K and V apart. `hf_names` says which.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup

from reduced_sync.cli import one_line
from reduced_sync.hf.families import FAMILIES, MODEL_TYPE, TENSORS, fields_of_hf
from reduced_sync.old_keys import complete_config
from reduced_sync_model import GPT, GPTConfig, is_sharded, role_of, shard_tensor

# OpenAI's models: n_layer, n_head, n_embd. All have 1024 positions, 50257 tokens and biases.
GPT2_SHAPES = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
PRETRAINED = f"init_from takes a folder or hub name of one of these models: {', '.join(FAMILIES)}"
FLOAT_TYPES = ("F32", "BF16", "F16")  # what a tensor may be, in safetensors' words


def unshard_tensor(name: str, shards: torch.Tensor, config: GPTConfig) -> torch.Tensor:
    """The inverse of shard_tensor: (n_shard, ...) -> the dense tensor; of copies it takes the first shard's."""
    match role_of(name).cut:
        case "replicated":
            return shards
        case "copied":
            return shards[0]
        case "heads":
            heads, kv_heads = config.n_head // config.n_shard, max(1, config.n_kv_head // config.n_shard)
            q, k, v = shards.split([n * config.head_size for n in (heads, kv_heads, kv_heads)], dim=1)
            copies = max(1, config.n_shard // config.n_kv_head)
            return torch.cat((q.flatten(0, 1), k[::copies].flatten(0, 1), v[::copies].flatten(0, 1)))
        case "output":
            return shards.flatten(0, 1)
        case "input":
            return shards.flatten(0, 1).t()
        case "divided":
            return shards.sum(0)


def shards_to_dense(shards: dict, config: GPTConfig) -> dict:
    """State dict of the whole sharded model -> the dense model that computes the same.

    Raises ValueError if there is none, as the pattern drops a sync, the block is another one, or the copies of a KV
    head or of its norm have parted.
    """
    name, _, method_name = config.sync.partition("+")
    if method_name and method_name != "desync":
        raise ValueError(f"sync={config.sync!r}: no dense model computes that")
    if name != "baseline" and config.n_shard > 1:
        raise ValueError(f"sync={config.sync!r}: only the baseline (or n_shard=1) equals a dense model")
    shards = dict(shards)
    for block in (f"transformer.h.{i}" for i in range(config.n_layer)):
        fold_norm(shards, f"{block}.ln_1", [f"{block}.attn.c_attn"])
        fold_norm(shards, f"{block}.ln_2", [f"{block}.mlp.c_fc", f"{block}.mlp.c_gate"])
    dense = {name: unshard_tensor(name, tensor, config) for name, tensor in shards.items()}
    for name, tensor in shards.items():
        has_copies = role_of(name).cut in ("copied", "heads")
        if has_copies and not torch.equal(shard_tensor(name, dense[name], config), tensor):
            raise ValueError(f"{name}: the shards' copies differ, so no dense model computes the same")
    return dense


def fold_norm(shards: dict, norm: str, linears: list[str]) -> None:
    """Move the gains and biases of `norm`, where they differ between shards, into the `linears` that read it.

    W (g*h + b) + c = (W g) h + (W b + c), and what is left of the norm is the same on all shards.
    """
    gain, bias = shards[f"{norm}.weight"], shards.get(f"{norm}.bias")  # (S, C)
    if all(t is None or torch.equal(t, t[:1].expand_as(t)) for t in (gain, bias)):
        return
    for linear in (name for name in linears if f"{name}.weight" in shards):
        weight = shards[f"{linear}.weight"]  # (S, out, C)
        shards[f"{linear}.weight"] = weight * gain[:, None, :]
        if bias is not None:
            shards[f"{linear}.bias"] = shards[f"{linear}.bias"] + torch.einsum("soc,sc->so", weight, bias)
    shards[f"{norm}.weight"] = torch.ones_like(gain)
    if bias is not None:
        shards[f"{norm}.bias"] = torch.zeros_like(bias)


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face


def hf_names(name: str, family: str) -> tuple[list[str], bool]:
    """The tensors of transformers' `family` that our dense tensor `name` is, one under the other.

    And whether they are transposed. Of our own family it is the sharded tensor.
    """
    if family == MODEL_TYPE:
        return [f"model.{name}"], False
    if family == "gpt2":
        return [name], name.startswith("transformer.h.") and role_of(name).is_matrix
    layer, _, kind = name.removeprefix("transformer.").rpartition(".")
    if layer.startswith("h."):
        _, i, layer = layer.split(".", 2)
        return [f"model.layers.{i}.{part}.{kind}" for part in TENSORS[layer]], False
    return [{"wte": "model.embed_tokens", "ln_f": "model.norm", "lm_head": "lm_head"}[layer] + f".{kind}"], False


def hf_tensors(dense: dict, family: str, config: GPTConfig) -> dict:
    """State dict of a dense model -> that of transformers' `family`; the inverse of dense_tensors.

    GPT-2's class has all biases: those that a model has not are zeros.
    """
    if family == "gpt2":
        with torch.device("meta"):
            whole = GPT(dataclasses.replace(config, n_shard=1, sync="baseline", bias=True))
        for name, parameter in whole.named_parameters():
            if name not in dense:
                dense = dense | {name: torch.zeros(parameter.shape[1:] if is_sharded(name) else parameter.shape)}
    state = {}
    for ours, tensor in dense.items():
        theirs, transposed = hf_names(ours, family)
        tensor = tensor.t() if transposed else tensor
        heads = [config.head_size * n for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
        parts = tensor.split(heads) if len(theirs) == 3 else [tensor]
        state |= {name: part.contiguous() for name, part in zip(theirs, parts, strict=True)}
    return state


def _read_config(name):
    """config.json of a folder or hub name, a dict. Raises ValueError where it is none, or its weights are not plain."""
    from transformers import PretrainedConfig
    from transformers.utils import find_adapter_config_file

    if not Path(name).exists() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
        where = "there is no such folder, and a name on the hub is OWNER/MODEL"
        raise ValueError(f"{PRETRAINED}, besides scratch and resume: {where}")
    if find_adapter_config_file(str(name)) or any(Path(name).glob("adapter_model.*")):
        raise ValueError(
            "it has an adapter, of LoRA or another kind: merge it into the weights with "
            "PeftModel.merge_and_unload(), and save the result with save_pretrained() to a new folder"
        )
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError("the folder has no config.json")
    keys, _ = PretrainedConfig.get_config_dict(name)
    if not isinstance(keys, dict):
        raise ValueError("config.json holds no object")
    if keys.get("quantization_config") is not None:
        raise ValueError("it is quantized; allowed are float32, bfloat16 and float16")
    if keys.get("transformers_weights") is not None:
        raise ValueError("config.json has transformers_weights: the weights must be in model.safetensors")
    return keys


def pretrained_fields(name: str) -> tuple[str, dict]:
    """(family, fields of GPTConfig) of a folder of save_pretrained, one of export.py, or a hub name.

    The fields of our own family include n_shard and the rule of syncs. Raises ValueError for a model that is not there,
    or that our block does not compute.
    """
    from transformers import AutoConfig

    if name in GPT2_SHAPES and not Path(name).is_dir():
        shape = dict(zip(("n_layer", "n_head", "n_embd"), GPT2_SHAPES[name], strict=True))
        return "gpt2", shape | dict(vocab_size=50257, block_size=1024, bias=True)
    try:
        keys = _read_config(name)
        family = keys.get("model_type")
        if family == MODEL_TYPE:
            names = {field.name for field in dataclasses.fields(GPTConfig)} - {"dropout"}
            keys = complete_config(keys)
            if missing := sorted(names - keys.keys()):
                raise ValueError(f"config.json has no {missing[0]}")
            fields = {key: keys[key] for key in names}
        elif family not in list(FAMILIES):
            raise ValueError(f"it is a {family} model; {PRETRAINED}")
        else:
            hf = AutoConfig.from_pretrained(name, trust_remote_code=False)
            fields = fields_of_hf(family, hf)
        config = dataclasses.asdict(GPTConfig(**fields))
    except Exception as error:  # whatever a damaged or foreign config.json provokes
        line = one_line(error)
        line = line if isinstance(error, OSError | ValueError) else f"config.json cannot be used: {line}"
        raise ValueError(f"init_from={str(name)!r}: {line}") from None
    return family, {key: config[key] for key in fields}


def safetensors_files(name: str) -> dict[str, Any]:
    """{tensor: open file that holds it} of a folder of save_pretrained or a hub name. Raises ValueError.

    As transformers does it looks for one file first: an index beside that is an older model's.
    """
    from safetensors import SafetensorError, safe_open
    from transformers.utils import cached_file

    part, file_of = "model.safetensors", {}
    try:
        parts = [part]
        try:
            cached_file(name, part)
        except OSError as error:  # there is none, or the hub cannot be reached
            part = "model.safetensors.index.json"
            index = cached_file(name, part, _raise_exceptions_for_missing_entries=False)
            if index is None:
                raise OSError(f"no safetensors weights: {one_line(error)}") from None
            parts = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
        for part in parts:
            file = safe_open(cached_file(name, part), "pt")
            file_of |= dict.fromkeys(file.keys(), file)
    except OSError as error:
        raise ValueError(f"init_from={str(name)!r}: {one_line(error)}") from None
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"init_from={str(name)!r}: {part} is damaged: {one_line(error)}") from None
    return file_of


def _shapes(family, config):
    """{tensor of `family`: its shape} of a model of GPTConfig `config`."""
    with torch.device("meta"):
        tensors = dict(GPT(config).named_parameters())
    if family != MODEL_TYPE:
        tensors = {key: unshard_tensor(key, tensor, config) for key, tensor in tensors.items()}
    return {key: list(tensor.shape) for key, tensor in hf_tensors(tensors, family, config).items()}


def stored_tensors(name: str, family: str, config: GPTConfig) -> dict[str, tuple[Any, str]]:
    """{tensor of `family`: (open file, its name there)} of a folder or hub name whose config.json gives `config`.

    Raises ValueError unless the files hold the tensors of that model and no others, of its shapes, as floats. That is
    in the files' headers: no weights are read, but an lm_head beside the embedding that it is tied to.
    """
    source, stored = f"init_from={str(name)!r}", {}
    for key, file in safetensors_files(name).items():
        # OpenAI's own files, and GPT2Model's, have no prefix
        bare = family == "gpt2" and not key.startswith(("transformer.", "lm_head."))
        theirs = f"transformer.{key}" if bare else key
        if theirs in stored:
            raise ValueError(f"{source}: its safetensors have both {key} and {stored[theirs][1]}")
        stored[theirs] = file, key
    if config.n_layer > len(stored):
        raise ValueError(
            f"{source}: its safetensors have {len(stored)} tensors; config.json has {config.n_layer} layers"
        )
    try:
        expected = _shapes(family, config)
    except RuntimeError as error:  # sizes beyond any number of bytes
        raise ValueError(f"{source}: its config.json gives no model: {one_line(error)}") from None
    [head], [embedding] = (hf_names(key, family)[0] for key in ("lm_head.weight", "transformer.wte.weight"))
    is_tied = config.tie_embeddings and head in stored
    if is_tied:
        expected[head] = expected[embedding]
    # buffers that older versions of transformers wrote, and none reads
    buffers = {"model.rotary_emb.inv_freq"} if family not in ("gpt2", MODEL_TYPE) else set()
    for i in range(config.n_layer):
        if family == "gpt2":
            buffers |= {f"transformer.h.{i}.attn.bias", f"transformer.h.{i}.attn.masked_bias"}
        elif family != MODEL_TYPE:
            buffers.add(f"model.layers.{i}.self_attn.rotary_emb.inv_freq")
    for key in sorted((stored.keys() | expected.keys()) - buffers):
        if key not in stored:
            raise ValueError(f"{source}: its safetensors have no {key}")
        file, there = stored[key]
        if key not in expected:
            raise ValueError(
                f"{source}: its safetensors contain {there}, which is not part of the model in config.json"
            )
        tensor = file.get_slice(there)
        if tensor.get_shape() != expected[key]:
            raise ValueError(
                f"{source}: {there} of {tensor.get_shape()} does not fit its config.json, which gives {expected[key]}"
            )
        if tensor.get_dtype() not in FLOAT_TYPES:
            raise ValueError(f"{source}: {there} is {tensor.get_dtype()}; allowed are {', '.join(FLOAT_TYPES)}")
    if is_tied:
        ours, wte = (file.get_tensor(there) for file, there in (stored[head], stored[embedding]))
        if ours.dtype != wte.dtype or not torch.equal(ours, wte):
            raise ValueError(f"{source}: its config.json ties {head} to {embedding}, but they differ")
    return stored


def dense_tensors(
    stored: dict[str, tuple[Any, str]], family: str, names: list[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (our name, dense tensor) for our `names`, one at a time, mapped from the files that stored_tensors found.

    The tensors of our own family are sharded.
    """
    for ours in names:
        theirs, transposed = hf_names(ours, family)
        parts = [file.get_tensor(there) for file, there in (stored[key] for key in theirs)]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        yield ours, tensor.t() if transposed else tensor


def from_pretrained(
    name: str, tp_group: ProcessGroup | None = None, block_size: int | None = None, **choices: Any
) -> GPT:
    """A model of one of FAMILIES in shards, or of export.py: a rank keeps its own shards' part.

    name: a folder of save_pretrained or export.py, or a name on the hub. block_size crops the positions; `choices` are
    fields of GPTConfig that are no shape of the weights: dropout, n_shard (but of a folder that carries its code),
    sync. With dropped syncs it is another function than the original: a place to train from. Raises ValueError or
    OSError where the weights are not there or do not fit.
    """
    family, fields = pretrained_fields(name)
    if block_size is not None and block_size > fields["block_size"]:
        context = f"the {fields['block_size']} positions of {name}, or of its sliding window"
        raise ValueError(f"block_size={block_size} is above {context}")
    config = GPTConfig(**fields | choices | dict(block_size=block_size or fields["block_size"]))
    if family == MODEL_TYPE and config.n_shard != fields["n_shard"]:
        raise ValueError(f"n_shard={config.n_shard}: the weights of {name} are {fields['n_shard']} shards")
    stored = stored_tensors(name, family, GPTConfig(**fields))
    with torch.device("meta"):
        names = [key for key, _ in GPT(config).named_parameters()]
    return from_dense(
        config, dense_tensors(stored, family, names), tp_group, f"init_from={str(name)!r}", family == MODEL_TYPE
    )


def from_dense(
    config: GPTConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    tp_group: ProcessGroup | None,
    source: str,
    sharded: bool = False,
) -> GPT:
    """The model of `config` with the weights that `tensors`, pairs of our name and a dense tensor, give it.

    Where `sharded` the tensors have their shard dimension already. Raises ValueError, which begins with `source`, for a
    tensor of another shape.
    """
    with torch.device("meta"):  # no initial weights
        model = GPT(config, tp_group)
    model.to_empty(device="cpu")
    if config.tie_embeddings:  # to_empty has parted them
        model.lm_head.weight = model.transformer.wte.weight
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, dense in tensors:
            dense = dense[: config.block_size] if key == "transformer.wpe.weight" else dense
            try:
                part = model.local_part(key, dense if sharded else shard_tensor(key, dense, config))
            except RuntimeError:
                part = dense
            if part.shape != parameters[key].shape:  # copy_ would repeat one that is smaller
                raise ValueError(f"{source}: {key} of {tuple(dense.shape)} does not fit the model")
            parameters[key].copy_(part)
    return model
