"""Decoding: choose tokens from logits, and generate them one after the other with a KV cache."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from reduced_sync_model import ColumnParallel, KVCache, RowParallel, role_of


def sample_tokens(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Logits (B, V) -> token ids (B,), sampled from the softmax of logits / temperature; temperature 0: the largest.

    top_k > 0 keeps the k largest logits. top_p < 1 then keeps the fewest tokens whose probabilities reach top_p
    (nucleus sampling, arXiv 1904.09751). `generator` is on the logits' device.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.size(-1):
        smallest = torch.topk(logits, top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    probs = F.softmax(logits, dim=-1)
    if top_p < 1:
        ascending, order = probs.sort(dim=-1)
        dropped = ascending.cumsum(-1) <= 1 - top_p
        dropped[:, -1] = False  # the likeliest stays
        probs = probs.masked_fill(dropped.scatter(1, order, dropped), 0.0)
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)


def graphed(run: Callable, device: torch.device) -> Callable:
    """On CUDA `run` as one CUDA graph: the same kernels on the same memory, started at once. On a CPU `run` itself.

    What it returns is overwritten by the next call. `run` may wait for nothing on the host.
    """
    if device.type == "cpu":
        return run
    run()  # what happens the first time, such as compiling, belongs in no graph
    torch.clear_autocast_cache()  # a graph must not read what is freed behind it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog is another thread
        result = run()

    def replay():
        graph.replay()
        return result

    return replay


class Decoder:
    """A model with a KVCache for `capacity` tokens of batches of B."""

    SHORTEST = 128  # places that a step sees at least; then twice as many, and so on, with a graph for each

    def __init__(self, model: nn.Module, B: int, capacity: int):
        self.model, self.cache, self.capacity, self.steps = model, KVCache(model, B, capacity), capacity, {}
        self.device = self.cache.layers[0][0].device
        self.idx = torch.zeros(B, 1, dtype=torch.long, device=self.device)
        self.place = torch.zeros(1, dtype=torch.long, device=self.device)

    def prefill(self, idx: torch.Tensor) -> torch.Tensor:
        """Forget all tokens, and see those of idx (B, T): the logits (B, 1, vocab_size) of the last ones."""
        self.cache.length = 0
        logits, _ = self.model(idx, cache=self.cache)
        self.place.fill_(self.cache.length)
        return logits

    def step(self, new: torch.Tensor) -> torch.Tensor:
        """The logits (B, 1, vocab_size) behind the next tokens (B,), until the next step overwrites them."""
        self.cache.length += 1
        n_seen = self.SHORTEST
        while n_seen < self.cache.length:
            n_seen *= 2
        n_seen = min(n_seen, self.capacity)
        if n_seen not in self.steps:
            run = partial(self.model.decode_step, self.idx, self.place, self.cache, n_seen)
            self.steps[n_seen] = graphed(run, self.device)
        self.idx.copy_(new[:, None])
        logits = self.steps[n_seen]()
        self.place += 1
        return logits


@torch.inference_mode()
def generate(
    model: nn.Module, idx: torch.Tensor, max_new_tokens: int, pick: Callable, autocast: Callable
) -> Iterator[torch.Tensor]:
    """Yield the next token ids (B,) of the prompts idx (B, T), up to max_new_tokens times.

    pick: logits (B, vocab_size) -> ids (B,), the same on all TP ranks. autocast(): the context of a forward pass.
    Where the block is full, its window slides by one token and is computed anew, as in nanoGPT. Raises ValueError for a
    prompt without tokens.
    """
    if idx.size(1) == 0:
        raise ValueError("the prompt is empty: it needs at least one token")
    block_size = model.config.block_size
    window, new = idx[:, -block_size:], None
    decoder = Decoder(model, len(idx), min(block_size, window.size(1) + max_new_tokens))
    for _ in range(max_new_tokens):
        with autocast():
            if new is None or decoder.cache.length == block_size:
                logits = decoder.prefill(window)
            else:
                logits = decoder.step(new)
        new = pick(logits[:, -1])
        yield new
        window = torch.cat((window, new[:, None]), 1)[:, -block_size:]


def cast_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the matrices in `dtype`, to be read faster; norms and biases stay float32. For use under autocast."""
    for name, parameter in model.named_parameters():
        if role_of(name).is_matrix:
            parameter.data = parameter.data.to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding on a CPU: a token's products take as long as reading their matrices, and MKL, which gives a product with few
# rows one thread, reads them at half the memory's bandwidth.

FEW_ROWS = 8


def multiply_few(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (S, n, in) times weight (S, out, in) -> (S, n, out), for few rows n: torch.bmm(x, weight.mT), but faster."""
    if torch.compiler.is_compiling() and x.size(1) == 1:  # becomes one loop over the matrix, on all threads
        return (weight[:, :, None] * x[:, None]).sum(-1).mT
    if len(weight) == 1 and weight.is_contiguous() and weight.size(1) % 4 == 0:  # a batch is spread over the threads
        y = torch.bmm(x.expand(4, -1, -1), weight.squeeze(0).unflatten(0, (4, -1)).mT)  # (4, n, out/4)
        return y.transpose(0, 1).flatten(1).unsqueeze(0)
    return torch.bmm(x, weight.mT)


LINEAR = (ColumnParallel, RowParallel, nn.Linear)


def matrix(layer: nn.Module) -> torch.Tensor:
    """The matrix of a linear layer as (S, out, in); of the head S is 1."""
    weight = layer.weight.mT if isinstance(layer, RowParallel) else layer.weight
    return weight if weight.dim() == 3 else weight[None]


class FewRows(nn.Module):
    """In the place of a linear layer: the same product, by multiply_few where there are few rows."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (S, B, T, in) -> (S, B, T, out); of the head without S."""
        rows = x.flatten(-3, -2)  # (S, n, in), or (n, in) of the head
        if rows.size(-2) > FEW_ROWS:
            return self.layer(x)
        y = multiply_few(rows if rows.dim() == 3 else rows[None], matrix(self.layer))  # (S, n, out)
        if self.layer.bias is not None:
            y = y + self.layer.bias[:, None]
        return y.reshape(*x.shape[:-1], -1)


def for_decoding(model: nn.Module, compile: bool = False) -> nn.Module:
    """The model made ready to decode with: on a CPU its products become FewRows; with `compile`, decode_step compiled.

    To be called last, once weights are loaded and cast. Compiled, the first tokens take a minute.
    """
    if model.lm_head.weight.device.type == "cpu":
        for parent in list(model.modules()):
            for name, layer in parent.named_children():
                if compile and isinstance(layer, RowParallel):  # a decode step then reads all memory in order
                    layer.weight.data = layer.weight.data.mT.contiguous().mT  # (S, in, out), consecutive along in
                if isinstance(layer, LINEAR):
                    setattr(parent, name, FewRows(layer))
    if compile:  # no look at every module before each token: they do not change
        options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        model.decode_step = torch.compile(model.decode_step, options=options)
    return model
