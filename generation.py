"""Decoding: choose tokens from logits, and generate them one after the other with a KV cache."""

import torch
from torch.nn import functional as F

from reduced_sync_model import KVCache, RowParallel


def choose(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Logits (B, V) -> token ids (B,), drawn from the softmax of logits / temperature; temperature 0: the largest.

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


@torch.inference_mode()
def generate(model, idx, max_new_tokens, choose, autocast):
    """Yield the next token ids (B,) of the prompts idx (B, T), up to max_new_tokens times.

    choose: logits (B, vocab_size) -> ids (B,), the same on all TP ranks. autocast(): the context of a forward pass.
    Where the block is full, its window slides by one token and is computed anew, as in nanoGPT. Raises ValueError for a
    prompt without tokens.
    """
    if idx.size(1) == 0:
        raise ValueError("the prompt is empty: it needs at least one token")
    block_size = model.config.block_size
    window, cache = idx[:, -block_size:], KVCache(model, len(idx))
    unseen = window
    for _ in range(max_new_tokens):
        with autocast():
            logits, _ = model(unseen, cache=cache)
        new = choose(logits[:, -1])
        yield new
        unseen = new[:, None]
        window = torch.cat((window, unseen), 1)[:, -block_size:]
        if cache.length == block_size:
            unseen, cache.length = window, 0


def cast(model, dtype):
    """Keep the weights in `dtype`, to be read faster; norms stay float32, as the stream is. For use under autocast."""
    for name, parameter in model.named_parameters():
        if ".ln_" not in name:
            parameter.data = parameter.data.to(dtype)


def compiled(model):
    """The model compiled by torch.compile for decoding: the first tokens take a minute, the others less than before.

    Row-parallel matrices are laid out anew, values unchanged, so that a decode step reads all memory in order.
    """
    for module in model.modules():
        if isinstance(module, RowParallel):
            module.weight.data = module.weight.data.mT.contiguous().mT  # (S, in, out), consecutive along in
    # no look at every module before each token: they do not change
    return torch.compile(model, options={"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe})
