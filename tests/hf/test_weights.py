"""Folders of weights with one thing wrong: read as transformers reads them, or refused in one line."""

import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from variants import rough

from reduced_sync.hf import weights
from reduced_sync.hf.export import CODE, our_config
from reduced_sync_model import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("modules")
torch.set_num_threads(1)  # the tensors are tiny
LLAMA = dict(vocab_size=61, hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4)
LLAMA |= dict(num_key_value_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=0)
IDS = torch.randint(0, 61, (2, 6), generator=torch.Generator().manual_seed(4))


def gpt2(folder):
    shape = dict(vocab_size=61, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(1)
    rough(GPT2LMHeadModel(GPT2Config(**shape))).save_pretrained(folder)


def llama(folder, **keys):
    torch.manual_seed(2)
    rough(LlamaForCausalLM(LlamaConfig(**LLAMA | keys))).save_pretrained(folder)


def llama3(folder):
    rope = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    llama(folder, rope_parameters=rope | dict(original_max_position_embeddings=8), tie_word_embeddings=True)


def mistral(folder):
    other("mistral", folder, sliding_window=12)


def qwen2(folder):
    other("qwen2", folder, tie_word_embeddings=True)


def qwen3(folder):
    other("qwen3", folder, head_dim=16)


def other(family, folder, **keys):
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **LLAMA | keys))
    rough(model).save_pretrained(folder)


def ours(folder):
    """A folder as export.py writes it, without tokenizer and card."""
    shape = dict(block_size=16, vocab_size=61, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=88, bias=False)
    shape |= dict(norm="rmsnorm", position="rope", mlp="swiglu", n_shard=2, sync="01")
    torch.manual_seed(3)
    model = rough(GPT(GPTConfig(**shape)))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(our_config(model.config)))
    state = {f"model.{name}": tensor.detach() for name, tensor in model.named_parameters()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    for file in CODE:
        shutil.copy(file, folder)


def logits(folder):
    """Those of transformers, or None unless it reads all that is in the folder and misses nothing."""
    kind = AutoModelForCausalLM
    if (folder / "modeling_reduced_sync.py").exists():
        kind = get_class_from_dynamic_module("modeling_reduced_sync.ReducedSyncForCausalLM", folder)
    try:
        model, info = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
        if any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")):
            return None
        return model.eval()(IDS).logits
    except Exception:  # whatever a damaged folder provokes
        return None


@torch.no_grad()
def refusal(folder, expected=None):
    """The line that refuses the folder; None where our logits are transformers', or where it reads none, `expected`."""
    try:
        model = weights.from_pretrained(folder)
    except ValueError as error:
        line = str(error)
        assert "\n" not in line and len(line) < 1000 and line.count("init_from=") == 1, line
        return line
    theirs = logits(folder)
    expected = expected if theirs is None else theirs
    assert expected is not None, "transformers does not read it"
    torch.testing.assert_close(model(IDS, IDS)[0], expected, rtol=1e-5, atol=1e-5)
    return None


def write_tensors(state, folder):
    state = {name: tensor.contiguous() for name, tensor in state.items() if tensor is not None}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def read_folder(folder):
    """Its tensors, and its config.json."""
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


# --- one thing wrong, whatever it is


def damaged_tensors(state):
    """Yield (what was done, tensors that it was done to, state with it) for the last layer and outside of layers."""
    for key, tensor in state.items():
        if ".0." in key:
            continue
        changes = {
            "turned": {key: tensor.t() if tensor.dim() == 2 else tensor[None]},
            "a row less": {key: tensor[:-1]},
            "flat": {key: tensor.flatten()[:, None]},
            "one number": {key: tensor.flatten()[0]},
            "renamed": {f"{key}s": tensor, key: None},
            "absent": {key: None},
            "with a scale": {f"{key}_scale": torch.ones(())},
            "of a layer more": {key.replace(".1.", ".2."): tensor.clone()},
        } | {str(dtype): {key: tensor.to(dtype)} for dtype in (torch.bfloat16, torch.float64, torch.float8_e4m3fn)}
        for what, change in changes.items():
            yield f"{key} {what}", change.keys(), state | change


def damaged_configs(config, more):
    """Yield (field, config with another value of it) for the fields of config.json, and `more` of {field: values}."""
    for key in {**config, **more}:
        value = config.get(key)
        values = [float("nan"), "8"] if key in config else []
        values += [-1, 0, 10**20] if key in config and key not in ASIDE else []
        values += more.get(key, [])
        values += [not value, int(value)] if type(value) is bool else []
        values += [2 * value, float(value), str(value), 2**20] if type(value) in (int, float) else []
        for other in values:
            if repr(other) != repr(value):
                yield key, config | {key: other}
        yield key, {name: kept for name, kept in config.items() if name != key}
        if type(value) is dict:
            for _, changed in damaged_configs(value, {}):
                yield key, config | {key: changed}


MORE = {
    "is_causal": [False, 0, "no", True],
    "attention_bias": [True],
    "mlp_bias": [True],
    "hidden_act": ["gelu"],
    "hidden_size": [64],
    "n_embd": [2**30],
    "num_hidden_layers": [1],
    "num_attention_heads": [2],
    "head_dim": [4, 16],
    "sliding_window": [8, None],
    "use_sliding_window": [True],
    "max_window_layers": [1],
    "layer_types": [["full_attention", "sliding_attention"], ["full_attention"] * 2],
    "n_inner": [64],
    "tie_word_embeddings": [False],
    "rope_theta": [500.0],
    "partial_rotary_factor": [0.5],
    "rope_scaling": [dict(rope_type="linear", factor=2.0), dict(type="yarn", factor=2.0), dict(type="linear")],
    "quantization_config": [dict(quant_method="fp8")],
    "transformers_weights": ["other.safetensors"],
    "model_type": ["gpt2", "llama", "reduced_sync", "mistral", "qwen2", "qwen3", "gemma", []],
    "sync": ["10", "012", "2222", "02", "grouped-1+desync"],
    "rope_inv_freq": [[], [1.0], [1.0, 0.5, 0.2, "0.1"], [1.0, 0.5, 0.2, float("inf")], [1.0, 0.5, 0.2, 0.1]],
}
# what says nothing about the function; where transformers refuses such a value, our logits must be those of before
ASIDE = set("attn_pdrop embd_pdrop resid_pdrop attention_dropout dropout dtype architectures auto_map".split())
ASIDE |= set("pad_token_id bos_token_id eos_token_id use_cache rope_scaling".split())


@pytest.mark.parametrize("make", [gpt2, llama, llama3, mistral, qwen2, qwen3, ours])
def test_one_thing_wrong(tmp_path, make):
    """Fault 1: either the logits are those of transformers, which reads all of it, or one line refuses it."""
    make(tmp_path / "folder")
    folder = tmp_path / "folder"
    state, config = read_folder(folder)
    whole = logits(folder)
    assert refusal(folder) is None
    read = refused = 0
    for what, names, changed in damaged_tensors(state):
        write_tensors(changed, folder)
        line = refusal(folder)
        assert line is None or any(f" {name}" in line for name in names), (what, line)
        read, refused = read + (line is None), refused + (line is not None)
    write_tensors(state, folder)
    for key, changed in damaged_configs(config, MORE):
        (folder / "config.json").write_text(json.dumps(changed))
        is_wide = key == "sliding_window" and changed.get(key) == 10**20  # transformers cannot compute with it
        line = refusal(folder, whole if key in ASIDE or is_wide else None)
        read, refused = read + (line is None), refused + (line is not None)
    assert read > 60 and refused > 150, (read, refused)


# --- by name


@pytest.mark.parametrize(
    "make, change, words",
    [
        (
            gpt2,
            lambda state: {"transformer.h.1.mlp.c_fc.weight": state["transformer.h.1.mlp.c_fc.weight"].t()},
            r"transformer.h.1.mlp.c_fc.weight of \[128, 32\] does not fit its config.json, which gives \[32, 128\]",
        ),
        (
            llama,
            lambda state: {
                "model.norm.weight": state["model.norm.weight"].to(torch.float8_e4m3fn),
                "model.norm.weight_scale": torch.ones(()),
            },
            "model.norm.weight is F8_E4M3; allowed are F32, BF16, F16",
        ),
        (llama3, lambda _: {"lm_head.weight": torch.ones(61, 32)}, "ties lm_head.weight to model.embed_tokens.weight"),
        (gpt2, lambda _: {"lm_head.weight": torch.ones(61, 32)}, "ties lm_head.weight to transformer.wte.weight"),
        (ours, lambda _: {"model.lm_head.weight": torch.ones(61, 32)}, "ties model.lm_head.weight to model.transf"),
        (
            llama,
            lambda _: {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)},
            "contain model.layers.0.self_attn.q_proj.bias, which is not part of the model in config.json",
        ),
        (
            gpt2,
            lambda state: {"h.1.ln_1.bias": state["transformer.h.1.ln_1.bias"].clone()},
            "have both (transformer.)?h.1.ln_1.bias and (transformer.)?h.1.ln_1.bias",
        ),
        (gpt2, lambda _: {"transformer.h.2.attn.bias": torch.ones(1, 1, 16, 16)}, "contain transformer.h.2.attn.bias"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, make, change, words):
    """Fault 1."""
    make(tmp_path / "folder")
    state, _ = read_folder(tmp_path / "folder")
    write_tensors(state | change(state), tmp_path / "folder")
    with pytest.raises(ValueError, match=words):
        weights.from_pretrained(tmp_path / "folder")


def test_no_weights_are_read_where_something_is_wrong(tmp_path, monkeypatch):
    """Fault 1: what is wrong is found before, whatever its place in the file."""
    llama(tmp_path / "folder")
    state, _ = read_folder(tmp_path / "folder")
    write_tensors(state | {"model.norm.weight": torch.ones(31)}, tmp_path / "folder")
    monkeypatch.setattr(weights, "from_dense", None)
    with pytest.raises(ValueError, match="does not fit"):
        weights.from_pretrained(tmp_path / "folder")


def test_what_old_files_hold_besides_their_weights(tmp_path):
    """Fault 1: buffers, names without a prefix and an lm_head that is the embedding are all right."""
    llama(tmp_path / "llama")
    state, _ = read_folder(tmp_path / "llama")
    state |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    write_tensors(state | {"model.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "llama")
    assert refusal(tmp_path / "llama") is None

    gpt2(tmp_path / "gpt2")
    whole = logits(tmp_path / "gpt2")
    state, _ = read_folder(tmp_path / "gpt2")
    state |= {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.uint8) for i in range(2)}
    write_tensors(state | {"lm_head.weight": state["transformer.wte.weight"].clone()}, tmp_path / "gpt2")
    assert refusal(tmp_path / "gpt2") is None
    state |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    write_tensors({name.removeprefix("transformer."): tensor for name, tensor in state.items()}, tmp_path / "gpt2")
    assert logits(tmp_path / "gpt2") is None  # transformers 5 does not know masked_bias
    assert refusal(tmp_path / "gpt2", whole) is None


def test_an_export_of_before_qwen(tmp_path):
    ours(tmp_path / "folder")
    _, config = read_folder(tmp_path / "folder")
    config = {key: value for key, value in config.items() if key not in ("qkv_bias", "qk_norm")}
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    assert refusal(tmp_path / "folder") is None


def test_a_model_with_code_of_its_own_is_refused_unasked(tmp_path, monkeypatch):
    """Fault 1: transformers would ask on the terminal whether it may run the code."""
    ours(tmp_path / "folder")
    _, config = read_folder(tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config | {"model_type": "theirs"}))
    monkeypatch.setattr("builtins.input", None)
    with pytest.raises(ValueError, match="it is a theirs model"):
        weights.from_pretrained(tmp_path / "folder")


def test_tensors_that_do_not_fit_are_not_reshaped():
    """Fault 1: what drop_syncs.py hands over is looked at, too."""
    config = GPTConfig(block_size=16, vocab_size=61, n_layer=2, n_head=4, n_embd=32)
    for name, shape in {"transformer.wte.weight": (32, 61), "transformer.ln_f.bias": (1,)}.items():
        with pytest.raises(ValueError, match=f"source: {name} of .* does not fit"):
            weights.from_dense(config, [(name, torch.ones(shape))], None, "source")


# --- which files


def sharded(folder, seed):
    """A Llama in several files, as save_pretrained writes it."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    model.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize("shards", ["there", "gone"])
def test_an_index_beside_a_newer_file(tmp_path, shards):
    """Fault 2: transformers reads the one file."""
    folder = tmp_path / "folder"
    sharded(folder, 5)
    assert refusal(folder) is None
    llama(tmp_path / "newer")
    shutil.copy(tmp_path / "newer" / "model.safetensors", folder)
    if shards == "gone":
        for file in folder.glob("model-*.safetensors"):
            file.unlink()
    assert refusal(folder) is None
    assert torch.equal(logits(folder), logits(tmp_path / "newer"))


def on_the_hub(folder, monkeypatch, tmp_path):
    """The name under which `folder` is in the cache of the hub, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "hub" / "models--owner--model", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    return "owner/model"


def test_the_same_on_the_hub(tmp_path, monkeypatch):
    """Faults 2 and 3."""
    sharded(tmp_path / "folder", 5)
    llama(tmp_path / "newer")
    shutil.copy(tmp_path / "newer" / "model.safetensors", tmp_path / "folder")
    name = on_the_hub(tmp_path / "folder", monkeypatch, tmp_path)
    model = weights.from_pretrained(name)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, IDS)[0], logits(tmp_path / "newer"), rtol=1e-5, atol=1e-5)
    (snapshot,) = (tmp_path / "hub").glob("*/snapshots/*")
    (snapshot / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="init_from='owner/model': it has an adapter"):
        weights.from_pretrained(name)


@pytest.mark.parametrize("make", [gpt2, ours])
def test_an_adapter_is_not_left_out(tmp_path, make):
    """Fault 3: beside its model, and alone."""
    make(tmp_path / "folder")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "folder" / name).write_text("{}")
        with pytest.raises(ValueError, match=r"an adapter.*merge_and_unload\(\).*save_pretrained\(\).* new folder$"):
            weights.pretrained_fields(tmp_path / "folder")
        if name == "adapter_model.safetensors":
            (tmp_path / "folder" / name).unlink()
    (tmp_path / "folder" / "config.json").unlink()
    with pytest.raises(ValueError, match="an adapter"):
        weights.pretrained_fields(tmp_path / "folder")
