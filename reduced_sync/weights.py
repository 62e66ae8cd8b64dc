"""Dense weights and shards: a dense GPT-2 cut into shards and joined again, and OpenAI's weights as a model of ours."""

import torch

from reduced_sync_model import GPT, GPTConfig, baseline, role_of, shard_tensor

# OpenAI's models: n_layer, n_head, n_embd. All have 1024 positions, 50257 tokens and biases.
GPT2_SHAPES = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


def unshard_tensor(name: str, shards: torch.Tensor) -> torch.Tensor:
    """The inverse of shard_tensor: (n_shard, ...) -> the dense tensor; of copies it takes the first shard's."""
    match role_of(name).cut:
        case "replicated":
            return shards
        case "copied":
            return shards[0]
        case "heads":
            return shards.unflatten(1, (3, -1)).transpose(0, 1).flatten(0, 2)
        case "output":
            return shards.flatten(0, 1)
        case "input":
            return shards.flatten(0, 1).t()
        case "divided":
            return shards.sum(0)


def dense_to_shards(dense: dict, config: GPTConfig) -> dict:
    """State dict of a dense GPT-2 -> state dict of the whole sharded model."""
    return {name: shard_tensor(name, tensor, config.n_shard) for name, tensor in dense.items()}


def shards_to_dense(shards: dict, config: GPTConfig) -> dict:
    """State dict of the whole sharded model -> the dense GPT-2 that computes the same.

    Raises ValueError if there is none, as the pattern drops a sync or the block is another one. A norm whose gains
    differ from shard to shard folds into the matrix behind it.
    """
    if config.parallel_block or config.overlap:
        raise ValueError("a model with parallel_block or overlap equals no GPT-2")
    if config.sync_pattern != baseline(config.n_layer) and config.n_shard > 1:
        raise ValueError(f"sync_pattern={config.sync_pattern}: only all-2 (or n_shard=1) equals a dense model")
    shards = dict(shards)
    for i in range(config.n_layer):
        for norm, linear in (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc")):
            norm, linear = f"transformer.h.{i}.{norm}", f"transformer.h.{i}.{linear}"
            gain, bias = shards[f"{norm}.weight"], shards.get(f"{norm}.bias")
            if all(t is None or torch.equal(t, t[:1].expand_as(t)) for t in (gain, bias)):
                continue
            weight = shards[f"{linear}.weight"]  # (S, out, C)
            if bias is not None:
                shards[f"{linear}.bias"] = shards[f"{linear}.bias"] + torch.einsum("soc,sc->so", weight, bias)
                shards[f"{norm}.bias"] = torch.zeros_like(bias)
            shards[f"{linear}.weight"] = weight * gain[:, None, :]
            shards[f"{norm}.weight"] = torch.ones_like(gain)
    return {name: unshard_tensor(name, tensor) for name, tensor in shards.items()}


def from_pretrained(name, tp_group=None, block_size=None, **choices) -> GPT:
    """OpenAI's weights ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a folder of save_pretrained) in shards.

    block_size crops the position embedding; `choices` are GPTConfig's fields from dropout on, but bias. With dropped
    syncs it is another function than GPT-2: a place to train from. Raises ValueError or OSError where the weights are
    not there or do not fit.
    """
    from transformers import GPT2LMHeadModel

    hf = GPT2LMHeadModel.from_pretrained(name)
    if block_size is not None and block_size > hf.config.n_positions:
        raise ValueError(f"block_size={block_size} is above the {hf.config.n_positions} positions of {name}")
    shape = {key: getattr(hf.config, key) for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
    config = GPTConfig(block_size=block_size or hf.config.n_positions, **shape, bias=True, **choices)
    dense = {}
    for key, tensor in hf.state_dict().items():
        # transformers keeps the four linear layers of a block transposed (Conv1D)
        is_conv = key.startswith("transformer.h.") and tensor.dim() == 2
        dense[key] = tensor.t() if is_conv else tensor
    dense["transformer.wpe.weight"] = dense["transformer.wpe.weight"][: config.block_size]
    model = GPT(config, tp_group)
    shards = dense_to_shards(dense, config)
    model.load_state_dict({key: model.local_part(key, tensor) for key, tensor in shards.items()})
    return model
