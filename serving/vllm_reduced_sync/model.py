"""The model of reduced_sync_model.py for vLLM: its layers, on T tokens of many requests, with vLLM's attention.

Embedding, attention with its paged KV cache, head and all-reduce are vLLM's. The rest is a rank's shards, each of which
has a stream of its own between two syncs. Stream.sync makes the only all-reduces of the blocks; besides them vLLM makes
one in the embedding, which is cut by its rows, and gathers the logits.

Shapes: T tokens of all requests, C n_embd, S shards on this rank (n_shard / tensor_parallel_size), D head size, H heads
of queries and K of keys and values of a shard. A tensor with a leading S is per shard. Parameters have the names and
shapes of the exported file, of which a rank takes its S of the n_shard.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn import functional as F
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix
from vllm.sequence import IntermediateTensors


def load_shards(parameter, tensor):
    """Copy this rank's part of `tensor` (n_shard, ...) to `parameter` (S, ...). Raises ValueError for another shape."""
    n_local = len(parameter)
    n_shard = n_local * get_tensor_model_parallel_world_size()
    if tensor.shape != (n_shard, *parameter.shape[1:]):
        raise ValueError(f"a weight of {tuple(tensor.shape)}: expected {(n_shard, *parameter.shape[1:])}")
    parameter.data.copy_(tensor[get_tensor_model_parallel_rank() * n_local :][:n_local])


def sharded(*shape):
    """An empty parameter (S, ...) that load_shards fills."""
    parameter = nn.Parameter(torch.empty(shape), requires_grad=False)
    parameter.weight_loader = load_shards
    return parameter


class Norm(nn.Module):
    """A layer norm or RMS norm per shard. weight and bias (S, C); an RMS norm has no bias."""

    def __init__(self, config, n_local):
        super().__init__()
        self.normalize, self.eps = F.rms_norm if config.norm == "rmsnorm" else F.layer_norm, config.norm_eps
        self.weight = sharded(n_local, config.n_embd)
        self.bias = sharded(n_local, config.n_embd) if config.bias and config.norm == "layernorm" else None

    def forward(self, h):
        """h (T, C) or (S, T, C) -> (S, T, C)."""
        h = self.normalize(h, h.shape[-1:], eps=self.eps) * self.weight[:, None]
        return h if self.bias is None else h + self.bias[:, None]


def multiply(x, weight, bias):
    """x (S, T, in) times weight (S, in, out), plus bias (S, out) or None -> (S, T, out)."""
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias[:, None], x, weight)


class ColumnParallel(nn.Module):
    """A linear layer cut by its output. weight (S, out, in), bias (S, out)."""

    def __init__(self, n_local, n_in, n_out, bias):
        super().__init__()
        self.weight = sharded(n_local, n_out, n_in)
        self.bias = sharded(n_local, n_out) if bias else None

    def forward(self, h):
        """h (S, T, in) -> (S, T, out)."""
        return multiply(h, self.weight.mT, self.bias)


class RowParallel(nn.Module):
    """A linear layer cut by its input: its output is the sum over shards. weight (S, in, out), bias (S, out)."""

    def __init__(self, n_local, n_in, n_out, bias):
        super().__init__()
        self.weight = sharded(n_local, n_in, n_out)
        self.bias = sharded(n_local, n_out) if bias else None

    def forward(self, y):
        """y (S, T, in) -> (S, T, out), of which a sync makes the sum."""
        return multiply(y, self.weight, self.bias)


def rotate(x, rope):
    """RoPE: x (S, T, heads, D), the halves of D as pairs, turned by `rope`, cos and sin (T, 1, D/2)."""
    (a, b), (cos, sin) = x.chunk(2, dim=-1), rope
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class CausalSelfAttention(nn.Module):
    """The heads of all shards of this rank are one Attention layer of vLLM's: heads attend by themselves."""

    def __init__(self, config, n_local, vllm_config, prefix):
        super().__init__()
        self.head_size = config.head_size
        self.n_head, self.n_kv_head = config.n_head // config.n_shard, max(1, config.n_kv_head // config.n_shard)
        n_qkv = (self.n_head + 2 * self.n_kv_head) * self.head_size
        self.c_attn = ColumnParallel(n_local, config.n_embd, n_qkv, config.bias)
        self.c_proj = RowParallel(n_local, self.n_head * self.head_size, config.n_embd, config.bias)
        self.attn = Attention(
            n_local * self.n_head,
            self.head_size,
            scale=self.head_size**-0.5,
            num_kv_heads=n_local * self.n_kv_head,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, h, rope=None):
        """h (S, T, C) -> (S, T, C). rope: for rotate()."""
        S = len(h)
        qkv = self.c_attn(h).unflatten(-1, (-1, self.head_size))  # (S, T, H+2K, D)
        q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = (t.transpose(0, 1).flatten(1).contiguous() for t in (q, k, v))  # (T, S*H*D), (T, S*K*D) twice
        y = self.attn(q, k, v)  # (T, S*H*D)
        return self.c_proj(y.unflatten(1, (S, -1)).transpose(0, 1))


class MLP(nn.Module):
    """Of mlp="swiglu" the neurons have a gate each."""

    def __init__(self, config, n_local):
        super().__init__()
        n_hidden = config.n_hidden // config.n_shard
        self.c_fc = ColumnParallel(n_local, config.n_embd, n_hidden, config.bias)
        self.c_gate = ColumnParallel(n_local, config.n_embd, n_hidden, config.bias) if config.mlp == "swiglu" else None
        self.c_proj = RowParallel(n_local, n_hidden, config.n_embd, config.bias)

    def forward(self, h):
        """h (S, T, C) -> (S, T, C)."""
        if self.c_gate is None:
            return self.c_proj(F.gelu(self.c_fc(h), approximate="tanh"))
        return self.c_proj(F.silu(self.c_gate(h)) * self.c_fc(h))


class Stream:
    """The residual stream: x (T, C), as last synced, and d (S, T, C), what each shard has added since, or None."""

    def __init__(self, x, rule, n_shard):
        self.x, self.d = x, None
        self.rival, self.n_shard = rule.rival, n_shard

    def read(self):
        """What the shards see: (T, C) where all see the same, else (S, T, C) per shard."""
        return self.x if self.d is None else self.x + self.d

    def keep(self, y):
        """No sync: y (S, T, C) stays with its shard."""
        self.d = y if self.d is None else self.d + y

    def sync(self, y):
        """A sync point: x plus the sum of all shards' deltas; with desync those before y count by their mean."""
        if self.rival == "desync" and self.d is not None:
            self.d = self.d / self.n_shard
        delta = (y if self.d is None else self.d + y).sum(0)  # (T, C) of this rank, fresh: on a CPU it is changed
        if self.rival == "tracks":
            delta = delta / self.n_shard
        self.x, self.d = self.x + tensor_model_parallel_all_reduce(delta), None


class Block(nn.Module):
    """One layer."""

    def __init__(self, config, n_local, vllm_config, prefix):
        super().__init__()
        self.parallel = config.rule.rival == "parallel"
        self.ln_1 = Norm(config, n_local)
        self.attn = CausalSelfAttention(config, n_local, vllm_config, f"{prefix}.attn")
        self.ln_2 = Norm(config, n_local)
        self.mlp = MLP(config, n_local)

    def forward(self, stream, syncs, rope=None):
        """Add this layer to the Stream. syncs: whether to sync after attention, and after the MLP."""
        after_attention, after_mlp = syncs
        h = stream.read()
        y = self.attn(self.ln_1(h), rope)
        if after_attention:
            stream.sync(y)
        else:
            stream.keep(y)

        if not self.parallel:  # else the MLP reads what the attention has read
            h = stream.read()
        y = self.mlp(self.ln_2(h))
        if after_mlp:
            stream.sync(y)
        else:
            stream.keep(y)


@support_torch_compile
class GPT(nn.Module):
    """This rank's shards of a GPT of reduced_sync_model.py."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        self.rule = config.rule
        tp_size = get_tensor_model_parallel_world_size()
        n_local = config.n_shard // tp_size
        vocabulary = dict(num_embeddings=config.vocab_size, embedding_dim=config.n_embd)
        vocabulary |= dict(padding_size=math.lcm(64, tp_size))  # 64 is vLLM's own, and nothing that 3 ranks divide
        layers = dict(wte=VocabParallelEmbedding(**vocabulary, prefix=f"{prefix}.transformer.wte"))
        if config.position == "learned":
            layers |= dict(wpe=nn.Embedding(config.block_size, config.n_embd))
        else:
            exact = dict(dtype=torch.float32)
            pairs = torch.arange(0, config.head_size, 2, **exact) / config.head_size
            inv_freq = (
                torch.tensor(config.rope_inv_freq, **exact) if config.rope_inv_freq else config.rope_theta**-pairs
            )
            self.register_buffer("inv_freq", inv_freq, persistent=False)  # (D/2)
        blocks = [Block(config, n_local, vllm_config, f"{prefix}.transformer.h.{i}") for i in range(config.n_layer)]
        layers |= dict(h=nn.ModuleList(blocks))
        if config.norm == "rmsnorm":
            layers |= dict(ln_f=nn.RMSNorm(config.n_embd, config.norm_eps))
        else:
            layers |= dict(ln_f=nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias))
        self.transformer = nn.ModuleDict(layers)
        self.lm_head = ParallelLMHead(**vocabulary, prefix=f"{prefix}.lm_head")
        if config.tie_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.transformer.wte)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        """Token ids and their positions, (T) each -> what lm_head makes logits of, (T, C)."""
        x = self.transformer.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.position == "learned":
            x, rope = x + self.transformer.wpe(positions), None
        else:
            angles = positions[:, None, None] * self.inv_freq  # (T, 1, D/2)
            rope = angles.cos(), angles.sin()
        stream = Stream(x, self.rule, self.config.n_shard)
        for block, syncs in zip(self.transformer.h, self.rule.layers(), strict=True):
            block(stream, syncs, rope)
        return self.transformer.ln_f(stream.x)


class ReducedSyncForCausalLM(nn.Module):
    """What vLLM calls. Ids that generation_config.json says are no tokens get no probability, as in transformers."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.model = GPT(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.logits_processor = LogitsProcessor(self.model.config.vocab_size)
        suppressed = vllm_config.model_config.try_get_generation_config().get("suppress_tokens") or []
        self.register_buffer("suppressed", torch.tensor(suppressed, dtype=torch.long), persistent=False)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(T) -> (T, C), without positions."""
        return self.model.transformer.wte(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token ids and their positions, (T) each -> (T, C)."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Some rows of what forward returns -> logits (rows, vocab_size), or None on a rank that gets none."""
        logits = self.logits_processor(self.model.lm_head, hidden_states)
        return None if logits is None else logits.index_fill(1, self.suppressed, float("-inf"))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Names and tensors of the exported file -> the names that were loaded, of which vLLM misses none."""
        return AutoWeightsLoader(self).load_weights(self.checked(weights))

    def checked(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same weights. Raises ValueError for codes of eight bits, and for a head that config.json ties."""
        for name, tensor in weights:
            if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(f"{name} is {tensor.dtype}; allowed are float32, bfloat16 and float16")
            if name == "model.lm_head.weight" and self.model.config.tie_embeddings:
                raise ValueError(f"the file has {name}, which config.json ties to the embedding")
            yield name, tensor
