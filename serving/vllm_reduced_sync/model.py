"""The model of reduced_sync_model.py for vLLM, out of vLLM's own layers: T tokens of many requests.

A rank has a set of them for each of its shards, built for one shard and not cut again over ranks. So a rank with one
shard, the usual case, computes what vLLM's own GPT-2 and Llama compute. The stream is ours: Stream.sync makes the only
all-reduces of the blocks. vLLM makes one more in the embedding, which is cut by its rows, and gathers the logits.

Shapes: T tokens of all requests, C n_embd, S shards on this rank (n_shard / tensor_parallel_size), D head size, H heads
of queries and K of keys and values of a shard.
"""

import math
import re

import torch
from torch import nn
from vllm import distributed
from vllm.compilation.decorators import support_torch_compile
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.activation import SiluAndMul, get_act_fn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fusion.fused_act_quant import maybe_fused_act_quant
from vllm.model_executor.layers.layernorm import LayerNorm, RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import maybe_prefix

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def per_shard(config, make):
    """What `make` makes, for each shard of this rank."""
    return nn.ModuleList(make() for _ in range(config.n_shard // distributed.get_tensor_model_parallel_world_size()))


def norm(config):
    """vLLM's layer norm or RMS norm."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, config.norm_eps)
    return LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)


def linears(layer, vllm_config, *sizes, prefix):
    """A linear layer of vLLM's for each shard of this rank."""
    config = vllm_config.model_config.hf_config
    bias = config.bias or (config.qkv_bias and layer is linear.QKVParallelLinear)
    # with disable_tp it is all there is of it: nothing is cut, and RowParallelLinear makes no all-reduce
    options = dict(bias=bias, quant_config=vllm_config.quant_config, disable_tp=True, return_bias=False)
    return per_shard(config, lambda: layer(*sizes, **options, prefix=prefix))


class Rope(RotaryEmbedding):
    """vLLM's, where the base can also be the speeds of all pairs."""

    def _compute_inv_freq(self, base):
        return torch.tensor(base, dtype=torch.float32) if isinstance(base, list) else super()._compute_inv_freq(base)


def by_head(norm, x):
    """What `norm`, of a head, makes of the heads in x (T, H*D)."""
    return norm(x.unflatten(-1, (-1, norm.hidden_size))).flatten(-2)


class CausalSelfAttention(nn.Module):
    """The heads of all shards of this rank are one Attention layer of vLLM's: heads attend by themselves."""

    def __init__(self, config, vllm_config, rope, prefix):
        super().__init__()
        n_head, n_kv_head = config.n_head // config.n_shard, max(1, config.n_kv_head // config.n_shard)
        C, D, self.rope = config.n_embd, config.head_size, rope
        self.sizes = [n_head * D, n_kv_head * D, n_kv_head * D]
        self.c_attn = linears(linear.QKVParallelLinear, vllm_config, C, D, n_head, n_kv_head, prefix=f"{prefix}.c_attn")
        self.c_proj = linears(linear.RowParallelLinear, vllm_config, n_head * D, C, prefix=f"{prefix}.c_proj")
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = per_shard(config, lambda: RMSNorm(D, config.norm_eps))
            self.k_norm = per_shard(config, lambda: RMSNorm(D, config.norm_eps))
        S = len(self.c_attn)
        options = dict(num_kv_heads=S * n_kv_head, cache_config=vllm_config.cache_config, prefix=f"{prefix}.attn")
        self.attn = Attention(S * n_head, D, scale=D**-0.5, **options)

    def forward(self, hs, positions):
        """(T, C) of each shard -> (T, C) of each shard."""
        qkv = [c_attn(h).split(self.sizes, dim=-1) for c_attn, h in zip(self.c_attn, hs, strict=True)]
        if self.q_norm is not None:
            norms = zip(self.q_norm, self.k_norm, qkv, strict=True)
            qkv = [(by_head(q_norm, q), by_head(k_norm, k), v) for q_norm, k_norm, (q, k, v) in norms]
        # (T, S*H*D), (T, S*K*D) twice
        q, k, v = qkv[0] if len(qkv) == 1 else (torch.cat(parts, dim=-1) for parts in zip(*qkv, strict=True))
        if self.rope is not None:
            q, k = self.rope(positions, q, k)
        y = self.attn(q, k, v)  # (T, S*H*D)
        ys = [y] if len(qkv) == 1 else [part.contiguous() for part in y.chunk(len(qkv), dim=-1)]  # (T, H*D) each
        return [c_proj(y) for c_proj, y in zip(self.c_proj, ys, strict=True)]


class MLP(nn.Module):
    """Of mlp="swiglu" the neurons have a gate each, in one matrix with them."""

    def __init__(self, config, vllm_config, prefix):
        super().__init__()
        C, n_hidden = config.n_embd, config.n_hidden // config.n_shard
        if config.mlp == "swiglu":
            sizes, self.act = [n_hidden] * 2, SiluAndMul()
            self.c_fc = linears(linear.MergedColumnParallelLinear, vllm_config, C, sizes, prefix=f"{prefix}.c_gate_fc")
        else:
            self.act = get_act_fn("gelu_pytorch_tanh")
            self.c_fc = linears(linear.ColumnParallelLinear, vllm_config, C, n_hidden, prefix=f"{prefix}.c_fc")
        self.c_proj = linears(linear.RowParallelLinear, vllm_config, n_hidden, C, prefix=f"{prefix}.c_proj")

    def forward(self, hs):
        """(T, C) of each shard -> (T, C) of each shard."""
        layers = zip(self.c_fc, self.c_proj, hs, strict=True)
        return [c_proj(maybe_fused_act_quant(self.act, c_fc(h), c_proj)) for c_fc, c_proj, h in layers]


class Stream:
    """The residual stream: x (T, C), as last synced, and ds, what each shard has added since, (T, C) each, or None.

    unadded: what the last sync adds to x, or None. Whoever reads adds it: vLLM's RMSNorm adds and norms in one.
    """

    def __init__(self, x, rule, n_shard):
        self.x, self.unadded, self.ds = x, None, None
        self.method_name, self.n_shard = rule.method_name, n_shard

    def read(self, norms):
        """What each of `norms`, one a shard, makes of what its shard sees: (T, C) each."""
        if self.ds is not None:
            return [norm(self.x + d) for norm, d in zip(norms, self.ds, strict=True)]
        return [self.normed(norm) for norm in norms]

    def normed(self, norm):
        """What `norm` makes of x, all of it."""
        unadded, self.unadded = self.unadded, None
        if unadded is None:
            return norm(self.x)
        if isinstance(norm, RMSNorm):
            h, self.x = norm(unadded, self.x)
            return h
        self.x = unadded + self.x
        return norm(self.x)

    def keep(self, ys):
        """No sync: ys, (T, C) each, stay with their shards."""
        self.ds = ys if self.ds is None else [d + y for d, y in zip(self.ds, ys, strict=True)]

    def sync(self, ys):
        """A sync point: x plus the sum of all deltas; by their mean count those before ys (desync), or all (tracks)."""
        if self.ds is not None:
            share = 1 / self.n_shard if self.method_name == "desync" else 1
            ys = [torch.add(y, d, alpha=share) for d, y in zip(self.ds, ys, strict=True)]
        delta = sum(ys[1:], start=ys[0])  # (T, C) of this rank, and no one else's: on a CPU it is changed
        if self.method_name == "tracks":
            delta = delta / self.n_shard
        self.unadded, self.ds = distributed.tensor_model_parallel_all_reduce(delta), None


class Block(nn.Module):
    """One layer."""

    def __init__(self, config, vllm_config, rope, prefix):
        super().__init__()
        self.parallel = config.rule.method_name == "parallel"
        self.ln_1 = per_shard(config, lambda: norm(config))
        self.attn = CausalSelfAttention(config, vllm_config, rope, f"{prefix}.attn")
        self.ln_2 = per_shard(config, lambda: norm(config))
        self.mlp = MLP(config, vllm_config, f"{prefix}.mlp")

    def forward(self, stream, after_attention, after_mlp, positions):
        """Add this layer to the Stream, which is synced or not after attention and after the MLP."""
        hs = stream.read(self.ln_1)
        same = stream.read(self.ln_2) if self.parallel else None  # the MLP reads what the attention reads
        ys = self.attn(hs, positions)
        if after_attention:
            stream.sync(ys)
        else:
            stream.keep(ys)

        ys = self.mlp(same if self.parallel else stream.read(self.ln_2))
        if after_mlp:
            stream.sync(ys)
        else:
            stream.keep(ys)


@support_torch_compile(dynamic_arg_dims=dict(input_ids=0, positions=0, inputs_embeds=0))
class GPT(nn.Module):
    """This rank's shards of a GPT of reduced_sync_model.py."""

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        self.rule = config.rule
        vocabulary = dict(num_embeddings=config.vocab_size, embedding_dim=config.n_embd)
        # 64 is vLLM's own, and nothing that 3 ranks divide
        vocabulary |= dict(padding_size=math.lcm(64, distributed.get_tensor_model_parallel_world_size()))
        layers, rope = dict(wte=VocabParallelEmbedding(**vocabulary, prefix=f"{prefix}.transformer.wte")), None
        if config.position == "learned":
            layers |= dict(wpe=nn.Embedding(config.block_size, config.n_embd))
        else:
            D, base = config.head_size, list(config.rope_inv_freq) or config.rope_theta
            rope = Rope(D, D, config.block_size, base, is_neox_style=True, dtype=torch.get_default_dtype())
        blocks = (Block(config, vllm_config, rope, f"{prefix}.transformer.h.{i}") for i in range(config.n_layer))
        self.transformer = nn.ModuleDict(layers | dict(h=nn.ModuleList(blocks), ln_f=norm(config)))
        self.lm_head = ParallelLMHead(**vocabulary, prefix=f"{prefix}.lm_head")
        if config.tie_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.transformer.wte)

    def forward(self, input_ids, positions, intermediate_tensors, inputs_embeds):
        """Token ids and their positions, (T) each -> what lm_head makes logits of, (T, C)."""
        x = self.transformer.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.position == "learned":
            x = x + self.transformer.wpe(positions)
        stream = Stream(x, self.rule, self.config.n_shard)
        for block, syncs_after in zip(self.transformer.h, self.rule.syncs_after(), strict=True):
            block(stream, *syncs_after, positions)
        return stream.read([self.transformer.ln_f])[0]


def check(name, part, parameter, place):
    """Raises ValueError where `part` of the tensor `name` would not be loaded to the parameter as it is."""
    allowed = FLOATS if parameter.dtype in FLOATS else (parameter.dtype,)
    if part.dtype not in allowed:
        raise ValueError(f"{name} is {part.dtype}; allowed are {', '.join(map(str, allowed))}")
    shape = list(parameter.shape)
    if place and hasattr(parameter, "output_dim"):
        shape[parameter.output_dim] //= 2
    # the vocabulary is cut over ranks, which vLLM checks, and one scale can be that of several matrices
    if ".h." in name and part.numel() > 1 and list(part.shape) != shape:
        raise ValueError(f"{name} has {tuple(part.shape)} a shard: expected {tuple(shape)}")


class ReducedSyncForCausalLM(nn.Module):
    """What vLLM calls. Ids that generation_config.json says are no tokens get no probability, as in transformers."""

    packed_modules_mapping = {"c_gate_fc": ["c_gate", "c_fc"]}  # noqa: RUF012

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.model = GPT(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.logits_processor = LogitsProcessor(self.model.config.vocab_size)
        suppressed = vllm_config.model_config.try_get_generation_config().get("suppress_tokens") or []
        self.register_buffer("suppressed", torch.tensor(suppressed, dtype=torch.long), persistent=False)

    def embed_input_ids(self, input_ids):
        """(T) -> (T, C), without positions."""
        return self.model.transformer.wte(input_ids)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        """Token ids and their positions, (T) each -> (T, C)."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states):
        """Some rows of what forward returns -> logits (rows, vocab_size), or None on a rank that gets none."""
        logits = self.logits_processor(self.model.lm_head, hidden_states)
        return None if logits is None else logits.index_fill(1, self.suppressed, float("-inf"))

    def load_weights(self, weights):
        """Names and tensors of the exported file -> the names of the parameters, all of which are loaded.

        Raises ValueError for a tensor that is not there, that no parameter takes as it is, or that config.json ties.
        """
        parameters, found, loaded = dict(self.named_parameters()), set(), set()
        for name, tensor in weights:
            if name == "model.lm_head.weight" and self.model.config.tie_embeddings:
                raise ValueError(f"the file has {name}, which config.json ties to the embedding")
            for target, part, *place in self.parts(name, tensor):
                if target not in parameters:
                    raise ValueError(f"the file has {name}, which is not a tensor of this model")
                parameter = parameters[target]
                check(name, part, parameter, place)
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, part, *place)
                loaded.add(target)
            found.add(name)
        missing = parameters.keys() - loaded
        if self.model.config.mlp == "swiglu":  # one parameter for two tensors
            missing |= {re.sub("c_fc|c_gate", other, name) for other in ("c_fc", "c_gate") for name in found} - found
        if missing:
            raise ValueError(f"the file has no {min(missing)}")
        return loaded

    def parts(self, name, tensor):
        """(parameter's name, its tensor) of each of this rank's shards, of a tensor (n_shard, ...) of the blocks.

        Where the parameter is one of several matrices, the number of this one follows.
        """
        config = self.model.config
        match = re.fullmatch(r"(model\.transformer\.h\.\d+\.\S+)\.(\w+)", name)
        if not match:
            yield name, tensor
            return
        layer, leaf = match.groups()
        if tensor.shape[:1] != (config.n_shard,):
            raise ValueError(f"{name} is {tuple(tensor.shape)}; its first dimension must be n_shard={config.n_shard}")
        if name.endswith(".c_proj.weight"):
            tensor = tensor.mT  # (n_shard, in, out) in the file
        place = []
        if config.mlp == "swiglu" and layer.endswith((".c_gate", ".c_fc")):
            place = [int(layer.endswith(".c_fc"))]
            layer = layer.replace(".c_gate", ".c_fc")
        ranks = tensor.chunk(distributed.get_tensor_model_parallel_world_size())
        for j, part in enumerate(ranks[distributed.get_tensor_model_parallel_rank()]):
            yield f"{layer}.{j}.{leaf}", part, *place
