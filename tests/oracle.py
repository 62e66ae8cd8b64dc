"""An independent reduced-sync GPT: one shard after the other, one layer after the other, from a dense GPT-2's weights.

It shares no code with the model, cuts the weights its own way and keeps every shard's whole stream (x + d) instead of x
and d. Slow and plain: what the model must agree with.
"""

import torch
from torch.nn import functional as F


def logits(dense, idx, n_layer, n_head, n_shard, sync_pattern, parallel_block=False, merge="sum", overlap=""):
    """Logits (B, T, vocab) of the dense state dict (nanoGPT's names) run as n_shard shards with the sync pattern."""
    T = idx.shape[1]
    heads = n_head // n_shard
    x = dense["transformer.wte.weight"][idx] + dense["transformer.wpe.weight"][:T]
    C = x.shape[-1]
    streams = [x] * n_shard
    mask = torch.ones(T, T, dtype=torch.bool).tril()

    def w(layer, name):
        return dense.get(f"transformer.h.{layer}.{name}")

    def norm(h, name, layer):
        return F.layer_norm(h, (C,), w(layer, f"{name}.weight"), w(layer, f"{name}.bias"))

    def attention(layer, shard, h):
        """This shard's heads, through its rows of the projection, with its share of the bias."""
        h, out = norm(h, "ln_1", layer), 0
        bias = w(layer, "attn.c_attn.bias")
        for head in range(shard * heads, (shard + 1) * heads):
            size = C // n_head
            parts = []
            for which in range(3):  # query, key, value
                rows = slice(which * C + head * size, which * C + (head + 1) * size)
                parts.append(F.linear(h, w(layer, "attn.c_attn.weight")[rows], None if bias is None else bias[rows]))
            q, k, v = parts
            scores = (q @ k.transpose(1, 2)) / size**0.5
            weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
            out = out + weights @ v @ w(layer, "attn.c_proj.weight")[:, head * size : (head + 1) * size].T
        bias = w(layer, "attn.c_proj.bias")
        return out if bias is None else out + bias / n_shard

    def mlp(layer, shard, h):
        rows = slice(shard * 4 * C // n_shard, (shard + 1) * 4 * C // n_shard)
        bias = w(layer, "mlp.c_fc.bias")
        h = F.linear(norm(h, "ln_2", layer), w(layer, "mlp.c_fc.weight")[rows], None if bias is None else bias[rows])
        h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
        out = h @ w(layer, "mlp.c_proj.weight")[:, rows].T
        bias = w(layer, "mlp.c_proj.bias")
        return out if bias is None else out + bias / n_shard

    late = None  # what a sync that is not waited for will have added to x
    for layer in range(n_layer):
        units = [((attention, mlp), "21")] if parallel_block else [((attention,), "2a"), ((mlp,), "21")]
        for sublayers, syncs in units:
            outputs = [sum(sublayer(layer, shard, h) for sublayer in sublayers) for shard, h in enumerate(streams)]
            if late is not None:
                x, late = x + late, None
                streams = [x] * n_shard
            after = [h + y for h, y in zip(streams, outputs, strict=True)]
            if sync_pattern[layer] not in syncs:
                streams = after
            elif merge == "desync":
                x = sum(streams) / n_shard + sum(outputs)
                streams = [x] * n_shard
            elif overlap:
                late = sum(h - x for h in after)
                streams = after if overlap == "delayed" else [x] * n_shard
            else:
                x = x + sum(h - x for h in after)
                streams = [x] * n_shard
    x = x if late is None else x + late
    final = F.layer_norm(x, (C,), dense["transformer.ln_f.weight"], dense.get("transformer.ln_f.bias"))
    return final @ dense["transformer.wte.weight"].T
