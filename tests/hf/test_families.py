"""Mistral, Qwen2 and Qwen3 against transformers: read into shards, on ranks, with a cache, and written again."""

import contextlib
import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from spawn import run_ranks
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from variants import batch, rough

import drop_syncs
import export
from reduced_sync import decoding
from reduced_sync.dropping.placement import dense_block, permuted, set_dense_block
from reduced_sync.hf import weights
from reduced_sync.hf.families import hf_config
from reduced_sync_model import KVCache

torch.set_num_threads(1)  # the tensors are tiny
SHAPE = dict(vocab_size=61, hidden_size=32, intermediate_size=88, num_hidden_layers=3, num_attention_heads=4)
SHAPE |= dict(max_position_embeddings=24, bos_token_id=None, eos_token_id=None, pad_token_id=None)
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=8)
LINEAR = dict(rope_type="linear", rope_theta=500.0, factor=2.0)
MODELS = [  # (family, keys of its config)
    ("mistral", dict(num_key_value_heads=2, sliding_window=None)),
    ("mistral", dict(num_key_value_heads=1, head_dim=16, sliding_window=14, tie_word_embeddings=True)),
    ("qwen2", dict(num_key_value_heads=4, rope_parameters=LLAMA3)),
    ("qwen2", dict(num_key_value_heads=1, tie_word_embeddings=True, use_sliding_window=True, sliding_window=4)),
    ("qwen3", dict(num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, rms_norm_eps=1e-3)),
    ("qwen3", dict(num_key_value_heads=1, head_dim=8, rope_parameters=LINEAR)),
]


def saved(folder, family, **keys):
    """A model of transformers with random weights, biases and gains, written to `folder` in several files."""
    torch.manual_seed(3)
    model = rough(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE | keys))).eval()
    model.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return model


def agree(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("n_shard", [1, 2, 4])
@pytest.mark.parametrize("family, keys", MODELS, ids=str)
def test_it_is_transformers_own(tmp_path, family, keys, n_shard):
    """Logits and gradients, token by token and greedy ids; and what is written of it is what was read."""
    theirs = saved(tmp_path, family, **keys)
    ours = weights.from_pretrained(tmp_path, n_shard=n_shard)
    x, y = batch()
    logits, loss = ours(x, y)
    expected = theirs(x).logits
    agree(logits, expected)
    loss.backward()
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), y.flatten()).backward()
    gradient = theirs.model.embed_tokens.weight.grad
    torch.testing.assert_close(ours.transformer.wte.weight.grad, gradient, rtol=1e-4, atol=1e-5)

    assert ours.config.block_size == (14 if family == "mistral" and keys["sliding_window"] else 24)
    greedy = decoding.generate(ours, x, 20, lambda logits: logits.argmax(-1), contextlib.nullcontext)
    new = ours.config.block_size - x.size(1) + 1  # as many as fit before the window of sample.py slides
    generated = theirs.generate(x, max_new_tokens=new, do_sample=False)[:, x.size(1) :]
    assert torch.equal(torch.stack(list(greedy)[:new], 1), generated) and generated.unique().numel() > 3

    dense = weights.shards_to_dense(dict(ours.named_parameters()), ours.config)
    if ours.config.rope_inv_freq:
        with pytest.raises(ValueError, match="names the kind of a scaled RoPE"):
            hf_config(ours.config)
    else:
        written, hf = hf_config(ours.config)
        assert written == ("llama" if family == "mistral" else family)
        state = weights.hf_tensors(dense, written, ours.config)
        expected = theirs.state_dict()
        assert state.keys() == expected.keys() - ({"lm_head.weight"} if ours.config.tie_embeddings else set())
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
        again = AutoModelForCausalLM.from_config(hf)
        again.load_state_dict(state, strict=not ours.config.tie_embeddings)
        again.tie_weights()
        agree(again.eval()(x).logits, theirs(x).logits)


def on_a_rank(rank, folders):
    """A prefill and decode steps of every folder, on this rank's shards."""
    x, _ = batch()
    for folder, n_shard in ((folder, n_shard) for folder in folders for n_shard in (2, 4)):
        model = weights.from_pretrained(folder, dist.group.WORLD, n_shard=n_shard)
        expected, cache = load_file(f"{folder}/expected")["logits"], KVCache(model, len(x))
        with torch.no_grad():
            agree(model(x, x)[0], expected)
            for unseen, last in [(x[:, :5], 4), *((x[:, t : t + 1], t) for t in range(5, x.size(1)))]:
                agree(model(unseen, cache=cache)[0][:, 0], expected[:, last])


def test_on_two_ranks_and_with_a_cache(tmp_path):
    folders = [tmp_path / str(i) for i in range(len(MODELS))]
    for folder, (family, keys) in zip(folders, MODELS, strict=True):
        theirs = saved(folder, family, **keys)
        with torch.no_grad():
            save_file({"logits": theirs(batch()[0]).logits}, folder / "expected")
    run_ranks(2, on_a_rank, folders)


@pytest.mark.parametrize("family, keys", [MODELS[2], MODELS[4]], ids=str)
def test_heads_and_neurons_in_another_order(tmp_path, family, keys):
    """As drop_syncs.py arranges them: the biases go with their heads, the norms of heads stay as they are."""
    saved(tmp_path, family, **keys)
    model = weights.from_pretrained(tmp_path, n_shard=2)
    x, _ = batch()
    with torch.no_grad():
        before = model(x, x)[0]
        for i in range(model.config.n_layer):
            groups, neurons = list(range(model.config.n_kv_head))[::-1], list(range(88))[::-1]
            set_dense_block(model, i, permuted(dense_block(model, i), model.config, groups, neurons))
        agree(model(x, x)[0], before)


@pytest.mark.parametrize("n_shard", [1, 4])
def test_under_autocast(tmp_path, n_shard):
    """Queries and keys stay in the type of the values."""
    theirs = saved(tmp_path, "qwen3", num_key_value_heads=2, head_dim=16)
    model = weights.from_pretrained(tmp_path, n_shard=n_shard)
    x, _ = batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(x, x)[0]
    with torch.no_grad():
        expected = theirs(x).logits
    assert (logits - expected).norm() < 0.02 * expected.norm()


REFUSED = [  # family, change of config.json, words
    ("mistral", dict(sliding_window=0), "block_size=0 must be at least 1"),
    (
        "mistral",
        dict(layer_types=["full_attention"] * 2 + ["sliding_attention"]),
        "layers of 'sliding_attention'; allowed",
    ),
    ("mistral", dict(hidden_act="gelu"), "has hidden_act='gelu'; allowed: hidden_act='silu' or 'swish'"),
    (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=8, max_window_layers=1, layer_types=None),
        "layers of 'sliding_attention'; allowed is 'full_attention' alone",
    ),
    ("qwen2", dict(rope_scaling=dict(type="yarn", factor=4.0)), "has rope_type='yarn'; allowed are"),
    ("qwen2", dict(head_dim=16), "has head_dim=16; allowed: head_dim=8"),
    ("qwen3", dict(attention_bias=True), "has attention_bias=True; allowed: attention_bias=False"),
    ("qwen3", dict(num_key_value_heads=0), "has num_key_value_heads=0; it must be at least 1"),
    ("qwen3", dict(head_dim=4), r"k_norm.weight of \[8\] does not fit its config.json, which gives \[4\]"),
    ("qwen3", dict(model_type="qwen3_moe"), "is a qwen3_moe model; init_from takes .* gpt2, llama, mistral, qwen2, q"),
]


@pytest.mark.parametrize("family, change, words", REFUSED, ids=str)
def test_what_the_block_does_not_compute(tmp_path, family, change, words):
    saved(tmp_path, family, num_key_value_heads=2, **dict(head_dim=8) if family == "qwen3" else {})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=words) as error:
        weights.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"init_from='{tmp_path}': ")


def test_a_context_beyond_the_window(tmp_path):
    saved(tmp_path, "mistral", num_key_value_heads=2, sliding_window=14)
    with pytest.raises(ValueError, match=f"block_size=15 is above the 14 positions of {tmp_path}, or of its sliding w"):
        weights.from_pretrained(tmp_path, block_size=15)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("family, keys", [("qwen2", {}), ("qwen3", dict(head_dim=16))], ids=str)
def test_its_syncs_are_dropped_and_the_result_exported(tmp_path, modules, family, keys):
    saved(tmp_path / "model", family, **keys | dict(vocab_size=256, num_key_value_heads=4))
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    keys = dict(init_from=tmp_path / "model", n_shard=2, block_size=24, device="cpu", out_dir=tmp_path / "out")
    keys |= dict(calibration=tmp_path / "text", evaluation=tmp_path / "text")
    keys |= dict(calibration_windows=4, evaluation_tokens=256, distil_tokens=256, finetune_tokens=256)
    drop_syncs.main([f"--{key}={value}" for key, value in keys.items()])
    export.main([str(tmp_path / "out"), f"--to={tmp_path / 'export'}"])
    ours = weights.from_pretrained(tmp_path / "export")
    assert ours.config.sync == "spd" and (ours.config.qkv_bias, ours.config.qk_norm) == (
        family == "qwen2",
        family == "qwen3",
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True)
    x, _ = batch()
    with torch.no_grad():
        agree(ours(x, x)[0], theirs(x).logits)
