"""An independent reduced-sync GPT: one shard after the other, one layer after the other, from a dense GPT-2's weights.

It shares no code with the model, cuts the weights its own way and keeps every shard's whole stream (x + d) instead of x
and d. Slow and plain: what the model must agree with.
"""

import torch
from torch.nn import functional as F


def logits(dense, idx, n_layer, n_head, n_shard, sync, n_kv_head=None):
    """Logits (B, T, vocab) of the dense state dict (nanoGPT's names) run as n_shard shards.

    sync: one of 2 1 0 a per layer, and +METHOD. With n_kv_head the block is Llama's: RMSNorm, RoPE with theta 10,000
    and SwiGLU. Biases and norms of queries and keys are there where the state dict has them.
    """
    pattern, _, method = sync.partition("+")
    T = idx.shape[1]
    heads = n_head // n_shard
    x = dense["transformer.wte.weight"][idx]
    if n_kv_head is None:
        x = x + dense["transformer.wpe.weight"][:T]
    C = x.shape[-1]
    streams = [x] * n_shard
    mask = torch.ones(T, T, dtype=torch.bool).tril()

    def w(layer, name):
        return dense.get(f"transformer.h.{layer}.{name}")

    def rms_norm(h, gain):
        return h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain

    def turned(t):
        """RoPE by complex numbers: pair i is t[i] and t[i + size/2]."""
        half = t.shape[-1] // 2
        speed = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        turn = torch.polar(torch.ones(T, half, dtype=torch.float64), torch.arange(T)[:, None] * speed)
        pairs = torch.complex(t[..., :half], t[..., half:]) * turn
        return torch.cat((pairs.real, pairs.imag), -1)

    def norm(h, name, layer):
        if n_kv_head is not None:
            return rms_norm(h, w(layer, f"{name}.weight"))
        return F.layer_norm(h, (C,), w(layer, f"{name}.weight"), w(layer, f"{name}.bias"))

    def attention(layer, shard, h):
        """This shard's heads, through its rows of the projection, with its share of the bias."""
        h, out = norm(h, "ln_1", layer), 0
        bias = w(layer, "attn.c_attn.bias")
        for head in range(shard * heads, (shard + 1) * heads):
            size = C // n_head
            parts = []
            kv_heads = n_kv_head or n_head
            kv_head = head * kv_heads // n_head
            for first in (head, n_head + kv_head, n_head + kv_heads + kv_head):  # query, key, value
                rows = slice(first * size, (first + 1) * size)
                parts.append(F.linear(h, w(layer, "attn.c_attn.weight")[rows], None if bias is None else bias[rows]))
            q, k, v = parts
            if (gain := w(layer, "attn.q_norm.weight")) is not None:
                q, k = rms_norm(q, gain), rms_norm(k, w(layer, "attn.k_norm.weight"))
            if n_kv_head is not None:
                q, k = turned(q), turned(k)
            scores = (q @ k.transpose(1, 2)) / size**0.5
            weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
            out = out + weights @ v @ w(layer, "attn.c_proj.weight")[:, head * size : (head + 1) * size].T
        bias = w(layer, "attn.c_proj.bias")
        return out if bias is None else out + bias / n_shard

    def mlp(layer, shard, h):
        hidden = len(w(layer, "mlp.c_fc.weight")) // n_shard
        rows = slice(shard * hidden, (shard + 1) * hidden)
        bias = w(layer, "mlp.c_fc.bias")
        if n_kv_head is not None:
            h = norm(h, "ln_2", layer)
            gate = h @ w(layer, "mlp.c_gate.weight")[rows].T
            h = gate * torch.sigmoid(gate) * (h @ w(layer, "mlp.c_fc.weight")[rows].T)
            return h @ w(layer, "mlp.c_proj.weight")[:, rows].T
        h = F.linear(norm(h, "ln_2", layer), w(layer, "mlp.c_fc.weight")[rows], None if bias is None else bias[rows])
        h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
        out = h @ w(layer, "mlp.c_proj.weight")[:, rows].T
        bias = w(layer, "mlp.c_proj.bias")
        return out if bias is None else out + bias / n_shard

    delayed = []  # outputs of the last layer's sublayers, which the other shards have not got yet
    late = None  # what a sync that is not waited for will have added to x
    for layer in range(n_layer):
        units = [((attention, mlp), "21")] if method == "parallel" else [((attention,), "2a"), ((mlp,), "21")]
        for sublayers, characters in units:
            outputs = [sum(sublayer(layer, shard, h) for sublayer in sublayers) for shard, h in enumerate(streams)]
            if late is not None:
                x, late = x + late, None
                streams = [x] * n_shard
            after = [h + y for h, y in zip(streams, outputs, strict=True)]
            if method == "delayed-layer" and layer > 0:
                streams = after
                if layer > 1:
                    before = delayed.pop(0)
                    streams = [h + sum(before) - own for h, own in zip(after, before, strict=True)]
                delayed.append(outputs)
            elif pattern[layer] not in characters:
                streams = after
            elif method == "desync":
                x = sum(streams) / n_shard + sum(outputs)
                streams = [x] * n_shard
            elif method == "tracks":
                x = sum(after) / n_shard
                streams = [x] * n_shard
            elif method in ("ladder", "delayed"):
                late = sum(h - x for h in after)
                streams = after if method == "delayed" else [x] * n_shard
            else:
                x = x + sum(h - x for h in after)
                streams = [x] * n_shard
    x = sum(streams) / n_shard if delayed else x if late is None else x + late
    if n_kv_head is not None:
        return rms_norm(x, dense["transformer.ln_f.weight"]) @ dense["lm_head.weight"].T
    final = F.layer_norm(x, (C,), dense["transformer.ln_f.weight"], dense.get("transformer.ln_f.bias"))
    return final @ dense["transformer.wte.weight"].T
