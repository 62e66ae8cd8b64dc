"""The families of transformers' models that our block computes: a table by which a config.json is read and written."""

import dataclasses
from typing import Any, NamedTuple

from reduced_sync_model import GPTConfig

MODEL_TYPE = "reduced_sync"  # model_type of a folder of export.py that carries its code


class Family(NamedTuple):
    """A family of transformers' models: what its config.json says of ours, and what of it our block computes."""

    model: str  # the class
    keys: dict[str, str]  # a field of GPTConfig: the key of config.json that gives it
    block: dict[str, Any]  # fields of GPTConfig that all of the family have alike
    allowed: dict[str, tuple]  # a key of config.json: the values that our block computes
    window: str = ""  # the key of a sliding window, up to whose length the attention is ours


LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "n_hidden": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
HEAD_KEYS = LLAMA_KEYS | {"head_size": "head_dim"}
LLAMA_BLOCK = dict(norm="rmsnorm", position="rope", mlp="swiglu", bias=False, qkv_bias=False, qk_norm=False)
SWIGLU = dict(is_causal=(True,), hidden_act=("silu", "swish"))
NO_BIAS = dict(attention_bias=(False, None))
FAMILIES = {  # by model_type. An export is the first that has its block, so a Mistral becomes a Llama
    "gpt2": Family(
        model="GPT2LMHeadModel",
        keys={key: key for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
        | dict(block_size="n_positions", n_hidden="n_inner", norm_eps="layer_norm_epsilon")
        | dict(tie_embeddings="tie_word_embeddings"),
        block=dict(norm="layernorm", position="learned", mlp="gelu", qk_norm=False),
        allowed=dict(is_causal=(True,), activation_function=("gelu_new", "gelu_pytorch_tanh"))
        | dict(scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,)),
    ),
    "llama": Family("LlamaForCausalLM", HEAD_KEYS, LLAMA_BLOCK, SWIGLU | NO_BIAS | dict(mlp_bias=(False, None))),
    "mistral": Family("MistralForCausalLM", HEAD_KEYS, LLAMA_BLOCK, SWIGLU, window="sliding_window"),
    "qwen2": Family("Qwen2ForCausalLM", LLAMA_KEYS, LLAMA_BLOCK | dict(qkv_bias=True), SWIGLU),
    "qwen3": Family("Qwen3ForCausalLM", HEAD_KEYS, LLAMA_BLOCK | dict(qk_norm=True), SWIGLU | NO_BIAS),
}
# our name in a layer: that of all families but GPT-2's, one or several
TENSORS = {
    "ln_1": ["input_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.q_norm": ["self_attn.q_norm"],
    "attn.k_norm": ["self_attn.k_norm"],
    "attn.c_proj": ["self_attn.o_proj"],
    "ln_2": ["post_attention_layernorm"],
    "mlp.c_fc": ["mlp.up_proj"],
    "mlp.c_gate": ["mlp.gate_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
}


def hf_config(config: GPTConfig) -> tuple[str, Any]:
    """(family, transformers' config) of the class that computes a dense model of this shape.

    Raises ValueError where none of FAMILIES does.
    """
    from transformers import CONFIG_MAPPING

    block = {key: getattr(config, key) for key in LLAMA_BLOCK}
    fitting = [family for family, row in FAMILIES.items() if row.block.items() <= block.items()]
    if not fitting:
        block = ", ".join(f"{key}={value}" for key, value in block.items())
        raise ValueError(f"none of {', '.join(FAMILIES)} has {block}")
    family, row = fitting[0], FAMILIES[fitting[0]]
    if config.rope_inv_freq:
        raise ValueError(f"{row.model} names the kind of a scaled RoPE, of which only the frequencies are known")
    if config.n_embd % config.n_head:
        raise ValueError(f"{row.model} has no n_embd={config.n_embd} with n_head={config.n_head}")
    usual = dataclasses.replace(config, n_kv_head=0, head_size=0)
    for key in ("n_kv_head", "head_size"):
        if key not in row.keys and getattr(config, key) != getattr(usual, key):
            raise ValueError(f"{row.model} has {key}={getattr(usual, key)}, not {getattr(config, key)}")
    keys = {hf_name: getattr(config, ours) for ours, hf_name in row.keys.items()}
    if config.position == "rope":
        keys |= dict(rope_parameters=dict(rope_type="default", rope_theta=config.rope_theta))
    else:
        keys |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
    keys |= dict(bos_token_id=None, eos_token_id=None, use_cache=True, dtype="float32", architectures=[row.model])
    return family, CONFIG_MAPPING[family](**keys)


def fields_of_hf(family: str, hf: Any) -> dict:
    """The fields of GPTConfig that transformers' config `hf` gives. Raises ValueError for what our block lacks."""
    row = FAMILIES[family]
    for key, values in row.allowed.items():
        refuse_unless(hf, key, values)
    if sliding := set(getattr(hf, "layer_types", None) or ()) - {"full_attention"}:
        raise ValueError(f"config.json has layers of {min(sliding)!r}; allowed is 'full_attention' alone")
    fields = row.block | {ours: getattr(hf, hf_name) for ours, hf_name in row.keys.items()}
    for ours, hf_name in row.keys.items():
        if type(fields[ours]) is int and fields[ours] < 1:  # 0 is another one's default in GPTConfig
            raise ValueError(f"config.json has {hf_name}={fields[ours]}; it must be at least 1")
    if "head_size" not in row.keys:
        refuse_unless(hf, "head_dim", (hf.hidden_size // hf.num_attention_heads,))
    if fields["n_hidden"] is None:  # of GPT-2
        fields["n_hidden"] = 4 * fields["n_embd"]
    if row.window and getattr(hf, row.window) is not None:
        fields["block_size"] = min(fields["block_size"], getattr(hf, row.window))
    return fields | (rope_fields(hf) if fields["position"] == "rope" else {})


def rope_fields(hf: Any) -> dict:
    """The fields of GPTConfig that rope_parameters gives. Raises ValueError for a RoPE that our block lacks."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = hf.rope_parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):  # others change with the sequence's length, or scale attention
        raise ValueError(f"config.json has rope_type={kind!r}; allowed are 'default', 'linear' and 'llama3'")
    if hf.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"config.json has partial_rotary_factor={hf.rope_parameters['partial_rotary_factor']!r}, not 1"
        )
    rotary = LlamaRotaryEmbedding(hf) if kind != "default" else None
    if rotary and rotary.attention_scaling != 1.0:
        raise ValueError(f"config.json has RoPE's attention factor {rotary.attention_scaling}, not 1")
    inv_freq = tuple(rotary.inv_freq.tolist()) if rotary else ()
    return dict(rope_theta=hf.rope_parameters["rope_theta"], rope_inv_freq=inv_freq)


def refuse_unless(hf: Any, key: str, allowed: tuple) -> None:
    """Raise ValueError unless transformers' config `hf` has one of the values that our block computes."""
    if (value := getattr(hf, key, allowed[0])) not in allowed:
        raise ValueError(f"config.json has {key}={value!r}; allowed: {key}={' or '.join(map(repr, allowed))}")
