"""The variants of the model that several test files go through, and what they put in: patterns, methods, a batch."""

import torch

from reduced_sync_model import GPTConfig, shard_tensor

torch.set_num_threads(1)  # the tensors are tiny
PATTERNS = ["2222", "1111", "0101", "0001", "1101", "a2a1", "0a02", "a001"]  # every kind
METHODS = ["1111+parallel", "0101+parallel", "0101+desync", "a011+desync", "0101+tracks", "a021+tracks"]
METHODS += [f"{pattern}+{method}" for pattern in ("2222", "1111", "0a21") for method in ("ladder", "delayed")]
METHODS += ["2222+delayed-layer"]
VARIANTS = PATTERNS + METHODS  # sync rules for 4 layers
SMALL = GPTConfig(block_size=16, vocab_size=61, n_layer=4, n_head=4, n_embd=32, bias=True)


def batch(B=3, T=12, vocab_size=61):
    idx = torch.randint(0, vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(7))
    return idx[:, :-1], idx[:, 1:]


def dense_to_shards(dense, config):
    """State dict of a dense model -> state dict of the whole sharded model."""
    return {name: shard_tensor(name, tensor, config) for name, tensor in dense.items()}


def rough(model):
    """Give every parameter, norms and biases too, values in which a mistake shows."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model
