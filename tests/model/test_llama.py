"""Llama's family of blocks against transformers' LlamaForCausalLM and the independent oracle, and what is refused."""

import dataclasses
import json
import shutil

import oracle
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor.debug import CommDebugMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from variants import PATTERNS, VARIANTS, batch, dense_to_shards, rough

import bench
from reduced_sync.configurator import configure
from reduced_sync.hf import weights
from reduced_sync.train.experiment import Config, model_keys
from reduced_sync_model import GPT, GPTConfig

torch.set_num_threads(1)  # the tensors are tiny
SHAPE = dict(vocab_size=61, hidden_size=32, intermediate_size=88, num_hidden_layers=4, num_attention_heads=4)
SHAPE |= dict(max_position_embeddings=16, bos_token_id=0, eos_token_id=0)
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=8)
BLOCK = dict(norm="rmsnorm", position="rope", mlp="swiglu", n_hidden=88, bias=False)
SMALL = GPTConfig(block_size=16, vocab_size=61, n_layer=4, n_head=4, n_embd=32, **BLOCK)


def saved(folder, **keys):
    torch.manual_seed(3)
    model = rough(LlamaForCausalLM(LlamaConfig(**SHAPE | keys)))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("n_shard", [1, 2, 4])
@pytest.mark.parametrize(
    "keys",
    [
        dict(num_key_value_heads=4),
        dict(num_key_value_heads=2, tie_word_embeddings=True),
        dict(num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-3),
        dict(num_key_value_heads=2, rope_parameters=LLAMA3),
        dict(num_key_value_heads=2, rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=2.0)),
    ],
    ids=str,
)
def test_all_2_is_transformers_llama(tmp_path, keys, n_shard):
    theirs = saved(tmp_path, **keys)
    ours = weights.from_pretrained(tmp_path, n_shard=n_shard)
    x, y = batch()
    logits, loss = ours(x, y)
    loss.backward()
    expected = theirs(x).logits
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), y.flatten()).backward()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    gradient = theirs.model.embed_tokens.weight.grad
    torch.testing.assert_close(ours.transformer.wte.weight.grad, gradient, rtol=1e-4, atol=1e-5)
    dense = weights.shards_to_dense(dict(ours.named_parameters()), ours.config)
    stored = weights.stored_tensors(tmp_path, "llama", dataclasses.replace(ours.config, n_shard=1))
    for name, tensor in weights.dense_tensors(stored, "llama", dense):
        assert torch.equal(dense[name], tensor), name


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("n_shard", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_variants_against_the_oracle(variant, n_shard, n_kv_head):
    torch.manual_seed(0)
    shape = dict(n_kv_head=n_kv_head, tie_embeddings=n_kv_head > 1, qkv_bias=n_kv_head == 2, qk_norm=n_kv_head == 1)
    dense_model = rough(GPT(dataclasses.replace(SMALL, **shape))).double()
    dense = weights.shards_to_dense(dict(dense_model.named_parameters()), dense_model.config)
    dense.setdefault("lm_head.weight", dense["transformer.wte.weight"])
    config = dataclasses.replace(dense_model.config, n_shard=n_shard, sync=variant)
    model = GPT(config).double()
    model.load_state_dict(dense_to_shards(dense, config))
    x, y = batch()
    logits, loss = model(x, y)
    expected = oracle.logits(dense, x, 4, 4, n_shard, sync=variant, n_kv_head=n_kv_head)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)

    loss.backward()
    name = "transformer.wte.weight"
    expected_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), y.flatten())
    (gradient,) = torch.autograd.grad(expected_loss, [dense_model.get_parameter(name)])
    torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("files", [[], ["config/on_cpu.py"]])
def test_the_overlay_keeps_the_parameters(files):
    """config/modern.py and bench's `modern`: 2 % of the whole at most, GPT-2's position embedding included."""
    counts, models = [], []
    for overlay in ([], ["config/modern.py"]):
        config = configure(Config, [*files, *overlay, "--n_shard=2"])
        with torch.device("meta"):
            models.append(GPT(GPTConfig(**model_keys(vars(config)))))
        counts.append(models[-1].get_num_params(non_embedding=False))
    assert counts[1] == pytest.approx(counts[0], rel=0.02)
    built = models[1].config
    args = bench.Train(n_layer=built.n_layer, n_embd=built.n_embd, n_head=built.n_head, modern=True)
    args.n_kv_head, args.block_size, args.vocab_size = built.n_kv_head, built.block_size, built.vocab_size
    assert args.config("baseline@2") == built


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_is_chosen_without_copying_weights(pattern):
    torch.manual_seed(0)
    base = rough(GPT(dataclasses.replace(SMALL, n_shard=2, n_kv_head=2)))
    torch.manual_seed(0)
    built = rough(GPT(dataclasses.replace(SMALL, n_shard=2, n_kv_head=2, sync=pattern)))
    x, y = batch()
    chosen = base.with_sync(pattern)
    assert torch.equal(chosen(x, y)[0], built(x, y)[0])
    assert chosen.config.rule.pattern == pattern and base.config.rule.syncs == 8
    assert all(p is q for p, q in zip(chosen.parameters(), base.parameters(), strict=True))
    with pytest.raises(ValueError, match="sync="):
        base.with_sync(pattern + "1")
    with pytest.raises(ValueError, match="has other layers than this model's 'baseline'"):
        base.with_sync("spd+parallel")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_executed_all_reduces(fake_group, variant):
    model = GPT(dataclasses.replace(SMALL, n_shard=4, n_kv_head=2, sync=variant), dist.group.WORLD)
    x, y = batch()
    with CommDebugMode() as comm:
        model(x, y)
    assert comm.get_total_counts() == model.config.rule.syncs


def test_copies_that_have_parted_have_no_dense_model():
    """Of a KV head, and of the norm of heads, which cannot be folded into a matrix."""
    model = GPT(dataclasses.replace(SMALL, n_shard=4, n_kv_head=2, qk_norm=True))
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights.shards_to_dense(state, model.config)
    for name in ("transformer.h.2.attn.c_attn.weight", "transformer.h.1.attn.k_norm.weight"):
        state[name][1, -1] += 1
        with pytest.raises(ValueError, match=f"{name}: the shards' copies differ"):
            weights.shards_to_dense(state, model.config)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(n_kv_head=3), "n_kv_head=3 must divide n_head=4"),
        (dict(n_shard=2, n_hidden=89), "n_hidden=89 is not divisible by n_shard=2"),
        (dict(n_head=6, head_size=6, n_kv_head=3, n_shard=2, n_hidden=90), "n_kv_head=3 must"),
        (dict(head_size=7), "head_size=7 must be even"),
        (dict(norm="batchnorm"), "norm='batchnorm'"),
        (dict(position="alibi"), "position='alibi'"),
        (dict(mlp="relu"), "mlp='relu'"),
    ],
)
def test_impossible_shapes_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize(
    "keys, words",
    [
        (dict(hidden_act="gelu"), "hidden_act='silu'"),
        (dict(attention_bias=True), "attention_bias=False"),
        (dict(mlp_bias=True), "mlp_bias=False"),
        (
            dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
            "rope_type='dynamic'; allowed are",
        ),
        (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=2.0)), "rope_type='yarn'; allowed are"),
    ],
)
def test_llamas_that_our_block_does_not_compute(tmp_path, keys, words):
    saved(tmp_path, num_key_value_heads=4)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | keys))
    with pytest.raises(ValueError, match=words):
        weights.from_pretrained(tmp_path)


def test_gpt2s_that_our_block_does_not_compute(tmp_path):
    shape = dict(vocab_size=61, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    GPT2LMHeadModel(GPT2Config(**shape, activation_function="relu")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="activation_function='gelu_new'"):
        weights.from_pretrained(tmp_path)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    """transformers does not say so where a missing file is allowed."""

    def cached_file(name, part, _raise_exceptions_for_missing_entries=True):
        if _raise_exceptions_for_missing_entries:
            raise OSError("no connection")

    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    with pytest.raises(ValueError, match="init_from='gpt2': no safetensors weights: no connection"):
        weights.from_pretrained("gpt2")


def test_folders_that_are_no_model_of_ours(tmp_path):
    saved(tmp_path / "whole", num_key_value_heads=4)
    for change, words in {
        "another kind": "is a gemma model",
        "no weights": "not appear to have a file named model.safetensors",
        "a tensor less": "have no model.layers.3.mlp.up_proj.weight",
        "another size": r"mlp.up_proj.weight of \[87, 32\] does not fit its config.json, which gives \[88, 32\]",
        "no config": "has no config.json",
        "no folder": "init_from takes a folder or hub name.* there is no such folder",
        "a config that is a list": "config.json holds no object",
        "cut weights": "model.safetensors is damaged: ",
        "a list for an index": "model.safetensors.index.json is damaged: ",
    }.items():
        folder = tmp_path / change
        if change != "no folder":
            shutil.copytree(tmp_path / "whole", folder)
        path = folder / "model.safetensors"
        if change == "another kind":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"model_type": "gemma"}))
        elif change == "no config":
            (folder / "config.json").unlink()
        elif change == "a config that is a list":
            (folder / "config.json").write_text("[]")
        elif change == "no weights":
            path.unlink()
        elif change == "cut weights":
            path.write_bytes(path.read_bytes()[:-100])
        elif change == "a list for an index":
            path.rename(folder / "model.safetensors.index.json")
            (folder / "model.safetensors.index.json").write_text("[]")
        elif path.exists():
            state = load_file(path)
            weight = state.pop("model.layers.3.mlp.up_proj.weight")
            if change == "another size":
                state["model.layers.3.mlp.up_proj.weight"] = weight[:-1].contiguous()
            save_file(state, path, {"format": "pt"})
        with pytest.raises(ValueError, match=words) as error:
            weights.from_pretrained(folder)
        assert str(error.value).count("init_from=") <= 1
