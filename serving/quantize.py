"""Quantize the linear layers of an exported folder, for vLLM's compressed-tensors; in the environment of vLLM.

$ .venv-serving/bin/python serving/quantize.py grouped --to=grouped-int8 --kind=int8
$ make serve MODEL=grouped-int8 ARGS="--tensor-parallel-size 2"

int8 and fp8: weights with a scale for each output, activations with one for each token, as they come. int4: weights in
groups of 32 inputs with a scale each, activations in 16 bits. An output that is a sum over shards has one scale for all
of them, so that the codes are those of the same model without shards. Embeddings, norms and biases stay as they are.

The folder is one of ours that carries its code, or a plain Llama's. The Python code is not copied: transformers would
take the quantized integers for weights.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reduced_sync.files import temporary_folder

GROUP = 32
NAMES = r"(c_attn|c_fc|c_gate|c_proj|[qkvo]_proj|gate_proj|up_proj|down_proj)\.weight"
KINDS = {  # bits, type, strategy, format, the largest code
    "int8": (8, "int", "channel", "int-quantized", 127),
    "fp8": (8, "float", "channel", "float-quantized", 448),
    "int4": (4, "int", "group", "pack-quantized", 7),
}


def codes(name: str, weight: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    """What is stored for one matrix, (out, in) or by shards. Raises ValueError for inputs that make no groups."""
    is_summed = weight.ndim == 3 and name.endswith("c_proj.weight")  # (n_shard, in, out), of which a sync makes the sum
    weight, largest = weight.float().mT if is_summed else weight.float(), KINDS[kind][-1]
    if kind == "int4":
        if weight.shape[-1] % GROUP:
            raise ValueError(f"{name} has {weight.shape[-1]} inputs, which are no groups of {GROUP}")
        groups = weight.unflatten(-1, (-1, GROUP))
        scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-9) / largest
        shape = torch.tensor(weight.shape[-2:]).expand(*weight.shape[:-2], 2)
        packed = pack_to_int32((groups / scale).round().to(torch.int8).flatten(-2), 4)
        return {f"{name}_packed": packed, f"{name}_scale": scale.squeeze(-1), f"{name}_shape": shape}
    scale = weight.abs().amax((0, -1) if is_summed else -1, keepdim=True).clamp_min(1e-9) / largest  # (..., out, 1)
    stored = weight / scale
    stored = stored.round().to(torch.int8) if kind == "int8" else stored.to(torch.float8_e4m3fn)
    return {name: stored.mT if is_summed else stored, f"{name}_scale": scale.expand(*weight.shape[:-1], 1)}


def quantization_config(kind: str) -> dict:
    """What config.json says of it, by which vLLM knows the layers and their kernels."""
    bits, type_, strategy, format_, _ = KINDS[kind]
    weights = dict(num_bits=bits, type=type_, symmetric=True, strategy=strategy, dynamic=False)
    group = dict(targets=["Linear"], weights=weights)
    if kind == "int4":
        weights["group_size"] = GROUP
    else:
        group["input_activations"] = dict(num_bits=bits, type=type_, symmetric=True, strategy="token", dynamic=True)
    keys = dict(quant_method="compressed-tensors", quantization_status="compressed", format=format_)
    return keys | dict(config_groups={"group_0": group}, ignore=["lm_head"])


def quantize(source: Path, target: Path, kind: str) -> None:
    """Write the folder `target`, which must not exist. Raises ValueError and OSError."""
    keys = json.loads((source / "config.json").read_text())
    kinds = keys.get("architectures") if isinstance(keys, dict) else None
    if kinds not in (["ReducedSyncForCausalLM"], ["LlamaForCausalLM"]) or "quantization_config" in keys:
        raise ValueError(f"{source} is {kinds}; allowed are folders with their code and Llamas, in floats")
    if target.exists():
        raise ValueError(f"to={str(target)!r} exists already: choose another folder, or remove it")
    state = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        state |= codes(name, tensor, kind) if re.search(rf"\.{NAMES}$", name) else {name: tensor}
    keys["quantization_config"] = quantization_config(kind)
    keys.pop("auto_map", None)
    others = shutil.ignore_patterns("*.py", "README.md", "*.safetensors", "config.json")
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    with temporary_folder(target) as folder:  # all of it, or none
        shutil.copytree(source, folder, ignore=others, dirs_exist_ok=True)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(keys, indent=1) + "\n")
        folder.rename(target)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of export.py")
    parser.add_argument("--to", type=Path, required=True, help="the folder to make; it must not exist")
    parser.add_argument("--kind", choices=KINDS, default="int8", help="default: %(default)s")
    args = parser.parse_args()
    try:
        quantize(args.folder, args.to, args.kind)
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
