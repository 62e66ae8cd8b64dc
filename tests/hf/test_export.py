"""export.py: the folder in transformers against the model and against sample.py, its tokenizers, its mistakes."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import resource
import subprocess
import sys

import pytest
import torch
import transformers
from launch import ROOT, one_line_error, run_script, succeeded
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from variants import dense_to_shards

import export
import sample
import train_reduced_sync
from reduced_sync import checkpoint as ckpt
from reduced_sync import decoding, preparing
from reduced_sync.configurator import configure
from reduced_sync.data import Corpus, vocabulary_hash
from reduced_sync.hf import weights
from reduced_sync.hf.tokenizer import Tokens
from reduced_sync.train.experiment import Config
from reduced_sync.train.log import read_log
from reduced_sync_model import GPT, GPTConfig

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("modules")]
torch.set_num_threads(1)
EXPORT, SAMPLE, TRAIN = ROOT / "export.py", ROOT / "sample.py", ROOT / "train_reduced_sync.py"
CHARS = "\n ,.aeiou" + "bcdfghklmnprstvwyé€"  # two and three bytes in UTF-8
SHAPE = dict(block_size=24, vocab_size=64, n_layer=4, n_head=4, n_embd=32)
LLAMA = dict(norm="rmsnorm", position="rope", mlp="swiglu", n_hidden=88, bias=False)
GPT2 = dict(vocab_size=50304, n_embd=8, n_hidden=16)
PLAIN = [
    dict(n_shard=2),
    dict(n_shard=4, bias=False, norm_eps=1e-3, tie_embeddings=False),
    dict(sync="0a01", n_hidden=72),
    dict(n_shard=2, sync="baseline+desync"),
    dict(n_shard=2, **LLAMA),
    dict(n_shard=4, **LLAMA, n_kv_head=2, tie_embeddings=False, norm_eps=1e-3, rope_theta=500.0),
    dict(sync="0101", **LLAMA, n_kv_head=1, head_size=16),
    dict(n_shard=4, **LLAMA, n_kv_head=2, qkv_bias=True),
    dict(n_shard=2, **LLAMA, n_kv_head=1, head_size=16, qk_norm=True, tie_embeddings=False),
    dict(n_shard=2, bias=False, qkv_bias=True),
]
WITH_CODE = [
    dict(n_shard=2, sync="1111"),
    dict(n_shard=4, sync="0a01", bias=False),
    dict(n_shard=2, sync="0101+parallel"),
    dict(n_shard=2, sync="0101+desync"),
    dict(n_shard=2, sync="1111+delayed"),
    dict(n_shard=4, sync="2101", **LLAMA, n_kv_head=2, tie_embeddings=False),
    dict(n_shard=4, sync="0101", **LLAMA, n_kv_head=2, qkv_bias=True, qk_norm=True),
    # dense, but of neither class
    dict(n_shard=2, sync="baseline+ladder"),
    dict(n_shard=2, norm="rmsnorm"),
    dict(n_kv_head=2),
    dict(**LLAMA | dict(bias=True)),
    dict(**LLAMA, rope_inv_freq=(1.0, 0.25, 0.05, 0.01)),
    dict(**LLAMA, qkv_bias=True, qk_norm=True),
    dict(**LLAMA, qkv_bias=True, head_size=16),
    dict(n_shard=2, **LLAMA, qk_norm=True),  # the shards' norms differ
]


def save(out, meta=None, **shape):
    """A checkpoint of a random model that writes varied text; returns the model."""
    torch.manual_seed(5)
    model = GPT(GPTConfig(**SHAPE | shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too
            parameter += 0.2 * torch.randn_like(parameter)
    if model.config.n_kv_head < model.config.n_shard:  # a dense model, cut: copies of a head are alike
        dense = {name: weights.unshard_tensor(name, p.detach(), model.config) for name, p in model.named_parameters()}
        model.load_state_dict(dense_to_shards(dense, model.config), strict=False)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    rest = {
        "model_args": dataclasses.asdict(model.config),
        "scaler": {},
        "best_val_loss": 4.25,
        "step": 30,
        "evaluated": 20,
    }
    rest |= dict(skipped=0, bad_steps=0, data=meta or {"tokenizer": "char", "chars": CHARS, "vocab_size": len(CHARS)})
    rest["config"] = dict(batch_size=2, gradient_accumulation_steps=3, block_size=24, max_iters=40, init_from="scratch")
    out.mkdir(parents=True, exist_ok=True)
    ckpt.save(ckpt.gather(model, optimizer) | rest, out, is_best=True)
    return model


def exported(folder, meta=None, **shape):
    """(model, folder of its export)."""
    model = save(folder / "out", meta, **shape)
    with contextlib.redirect_stdout(io.StringIO()):
        export.main([str(folder / "out"), f"--to={folder / 'export'}"])
    return model, folder / "export"


def load(folder, **keys):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **keys).eval()


def batch(rows=3, length=20):
    return torch.randint(0, len(CHARS), (rows, length), generator=torch.Generator().manual_seed(1))


def greedy(model, prompt, new):
    """The ids that sample.py generates behind one prompt, a list of ids."""
    pick = lambda logits: logits[:, : len(CHARS)].argmax(-1)  # noqa: E731
    found = decoding.generate(model, torch.tensor([prompt]), new, pick, contextlib.nullcontext)
    return [int(ids) for ids in found]


# --- 1. a model that equals a dense one


@pytest.mark.parametrize("shape", PLAIN, ids=str)
def test_a_dense_model_is_a_plain_folder(tmp_path, shape):
    model, folder = exported(tmp_path, **shape)
    files = {path.name for path in folder.iterdir()}
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # who may read one may read all
    assert files == {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} | {
        "tokenizer_config.json"
    }
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    kind = "Qwen2" if "qkv_bias" in shape else "Qwen3" if "qk_norm" in shape else "Llama"
    assert type(theirs).__name__ == (f"{kind}ForCausalLM" if "norm" in shape else "GPT2LMHeadModel")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    idx = batch()
    with torch.no_grad():
        expected = model(idx, idx)[0]
        torch.testing.assert_close(theirs.eval()(idx).logits, expected, rtol=1e-5, atol=1e-5)
    again = weights.from_pretrained(folder, n_shard=2 if shape.get("n_kv_head") != 1 else 1)
    torch.testing.assert_close(again(idx, idx)[0], expected, rtol=1e-5, atol=1e-5)


# --- 2. a model that carries its code


@pytest.mark.parametrize("shape", WITH_CODE, ids=str)
def test_any_other_model_carries_its_code(tmp_path, shape):
    model, folder = exported(tmp_path, **shape)
    assert (folder / "reduced_sync_model.py").read_bytes() == (ROOT / "reduced_sync_model.py").read_bytes()
    assert not [path.name for path in folder.iterdir() if path.suffix not in (".json", ".md", ".py", ".safetensors")]
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    idx = batch()
    with torch.no_grad():
        expected = model(idx, idx)[0]
        torch.testing.assert_close(theirs.eval()(idx).logits, expected, rtol=1e-6, atol=1e-6)
        check_generation(theirs, model)
    again = weights.from_pretrained(folder)
    assert again.config == model.config and torch.equal(again(idx, idx)[0], expected)


def check_generation(theirs, model):
    """Greedy generate() of prompts of different lengths in one batch, padded on the left, against one at a time."""
    prompts = [row[:n] for row, n in zip(batch().tolist(), (3, 9, 1), strict=True)]
    ids = torch.tensor([[0] * (9 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (9 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    for keys in (dict(), dict(use_cache=False)):
        found = theirs.generate(ids, attention_mask=mask, max_new_tokens=15, do_sample=False, **keys)
        for row, prompt in zip(found[:, 9:].tolist(), prompts, strict=True):
            assert row == greedy(model, prompt, 15), keys
    assert len(set(found[:, 9:].flatten().tolist())) > 3


@pytest.mark.parametrize("shape", [WITH_CODE[1], WITH_CODE[5]], ids=str)
def test_generation_in_all_its_ways(tmp_path, shape):
    _, folder = exported(tmp_path, **shape)
    model, ids = load(folder), batch(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :8] = 0

    def generate(use_cache, **keys):
        transformers.set_seed(3)
        keys |= dict(use_cache=use_cache, attention_mask=mask, max_new_tokens=12)
        return model.generate(ids, **keys)

    for keys in (
        dict(num_beams=4),
        dict(num_beams=3, num_return_sequences=3),
        dict(do_sample=True, temperature=1.5, top_k=0),
        dict(do_sample=True, num_return_sequences=2, top_p=0.9),
    ):
        assert torch.equal(generate(True, **keys), generate(False, **keys)), keys
    greedy_ids, beams = generate(True), generate(True, num_beams=4)
    assert not torch.equal(greedy_ids, beams) and beams.max() < len(CHARS)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids[:1], assistant_model=model, max_new_tokens=3)

    # a conversation that goes on: several tokens behind those in the cache
    first = model.generate(ids, attention_mask=mask, max_new_tokens=5, return_dict_in_generate=True)
    told = torch.cat((first.sequences, batch(3, 4)), 1)
    mask = torch.cat((mask, torch.ones(3, 9, dtype=mask.dtype)), 1)
    keys = dict(attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(told, **keys, cache=first.cache), model.generate(told, **keys))


def test_the_forward_pass_is_as_transformers_models_have_it(tmp_path):
    model, folder = exported(tmp_path, n_shard=2, sync="0101")
    theirs, idx = load(folder), batch(3, 12)
    assert type(theirs.loss_function).__name__ == "function" and theirs.config.num_hidden_layers == 4
    with torch.no_grad():
        expected = model(idx, idx)[0]
        output = theirs(idx, labels=idx)
        loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
        torch.testing.assert_close(output.loss, loss)
        assert theirs(idx, labels=idx, return_dict=False)[0] == output.loss
        torch.testing.assert_close(theirs(idx, logits_to_keep=2).logits, expected[:, -2:])
        mask = torch.ones_like(idx)
        mask[1, 8:] = 0  # padding on the right: nothing sees it
        torch.testing.assert_close(theirs(idx, mask).logits[mask.bool()], expected[mask.bool()])
        assert "cache" not in theirs(idx) and "cache" in theirs(idx, use_cache=True)
    theirs(idx, labels=idx).loss.backward()
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    name = "transformer.h.1.attn.c_attn.weight"
    torch.testing.assert_close(theirs.model.get_parameter(name).grad, model.get_parameter(name).grad)
    assert load(folder, dtype=torch.bfloat16)(idx).logits.dtype == torch.bfloat16
    theirs.save_pretrained(tmp_path / "again")  # as after fine-tuning
    assert torch.equal(load(tmp_path / "again")(idx).logits, theirs(idx).logits)
    assert torch.equal(weights.from_pretrained(tmp_path / "again")(idx, idx)[0], expected)


def test_what_the_model_does_not_take_is_refused_by_name(tmp_path):
    _, folder = exported(tmp_path, n_shard=2, sync="0101")
    model, idx = load(folder), batch(2, 6)
    hole = torch.tensor([[0, 1, 0, 1, 1, 1], [1] * 6])
    for keys, words in {
        (("attention_mask", hole),): "pad prompts on the left, with tokenizer.padding_side='left'",
        (("attention_mask", hole[:, :4]),): r"attention_mask of \(2, 4\): it must be of \(2, 6\)",
        (("position_ids", idx), ("inputs_embeds", None)): "this model takes no position_ids$",
        (("output_attentions", True),): "this model takes no output_attentions",
        (("cache", transformers.DynamicCache()),): "the cache is a DynamicCache",
    }.items():
        with pytest.raises(ValueError, match=words):
            model(idx, **dict(keys))
    with pytest.raises(ValueError, match="a sequence of 25 tokens is longer than block_size=24"):
        model.generate(idx, max_new_tokens=20)


ALONE = """
import importlib.util, json, sys
assert importlib.util.find_spec("reduced_sync_model") is importlib.util.find_spec("reduced_sync") is None
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, *prompts = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer(prompts, return_tensors="pt", padding=True)
print(json.dumps(tokenizer.batch_decode(model.generate(**ids, max_new_tokens=10), skip_special_tokens=True)))
exec(open(f"{folder}/README.md").read().split("```python")[1].split("```")[0].replace("=50", "=5"))
"""


@pytest.mark.parametrize("shape", [PLAIN[0], WITH_CODE[0]], ids=str)
def test_a_process_with_transformers_and_the_folder_alone(tmp_path, shape):
    """Its greedy text is sample.py's, from the checkpoint and from the folder."""
    _, folder = exported(tmp_path, **shape)
    prompts = ["he said", "a", "no € or é"]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ALONE, "export", *prompts]
    process = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    line, example = succeeded(process).split("\n", 1)
    assert "'the" in example and "a" in example
    texts = json.loads(line)
    for text, prompt in zip(texts, prompts, strict=True):
        for source in (f"--out_dir={tmp_path / 'out'}", f"--init_from={folder}"):
            keys = [source, f"--start={prompt}", "--max_new_tokens=10", "--temperature=0", "--device=cpu"]
            with contextlib.redirect_stdout(io.StringIO()) as ours:
                sample.main(keys)
            assert ours.getvalue() == text + "\n---------------\n"


# --- 3. tokenizers

TEXTS = ["he said", "", " \n\n  no", "a\n", "é€é"]


@pytest.mark.parametrize("shape", [PLAIN[0], PLAIN[4], WITH_CODE[0]], ids=str)
def test_characters(tmp_path, shape):
    _, folder = exported(tmp_path, **shape)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert ids == [CHARS.index(char) for char in text] and tokenizer.decode(ids) == text
    assert tokenizer.pad_token_id == len(CHARS) and tokenizer.padding_side == "left"
    assert tokenizer("Xhe€ sa🙂idX").input_ids == tokenizer("he€ said").input_ids  # what is no token is dropped
    assert tokenizer("X").input_ids == []


def test_characters_that_leave_no_id_or_text_for_padding(tmp_path):
    for chars, pad in {"".join(map(chr, range(32, 96))): None, "".join(map(chr, range(32, 127))): "\u2400"}.items():
        meta = {"tokenizer": "char", "chars": chars, "vocab_size": len(chars)}
        _, folder = exported(tmp_path / str(len(chars)), meta, vocab_size=128 if pad else 64)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = chars + "<|pad|>" if pad else chars
        assert tokenizer.pad_token == pad and tokenizer.decode(tokenizer(text).input_ids) == text
        assert ("padding=True" in (folder / "README.md").read_text()) == (pad is not None)


@pytest.mark.parametrize("shape", [PLAIN[0], PLAIN[4], WITH_CODE[0]], ids=str)
def test_gpt2s_tokens_are_tiktokens(tmp_path, shape):
    meta = {"tokenizer": "gpt2", "vocab_size": 50257}
    _, folder = exported(tmp_path, meta, **shape | GPT2)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    encoding = preparing.gpt2_encoding()
    source = (ROOT / "README.md").read_text(encoding="utf-8")
    texts = [*TEXTS, source, "it's  what\tI'll 123456 say\r\n", "naïve 日本語 🙂\u2028\x00", "one<|endoftext|>two"]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert ids == encoding.encode(text, allowed_special="all") and tokenizer.decode(ids) == text
    generation = transformers.GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id in (50256, [50256]) and tokenizer.eos_token_id == generation.pad_token_id == 50256
    assert generation.suppress_tokens == list(range(50257, 50304))
    assert Tokens({"tokenizer": str(folder)}).ends == {50256}


def test_the_tokenizer_that_the_model_came_with(tmp_path):
    """An export's own, by a run that went on from it; and as drop_syncs.py keeps it beside its checkpoint."""
    _, folder = exported(tmp_path, n_shard=2, sync="1111")
    for meta, kept in (
        ({"tokenizer": str(folder), "vocab_size": 28}, False),
        ({"tokenizer": "gpt2", "vocab_size": 28}, True),
    ):
        out, again = tmp_path / str(kept) / "out", tmp_path / str(kept) / "export"
        save(out, meta, n_shard=2, sync="1111")
        if kept:
            torch.save(torch.load(out / "ckpt.pt") | {"progress": {}}, out / "ckpt.pt")
            AutoTokenizer.from_pretrained(folder, trust_remote_code=False).save_pretrained(out / "tokenizer")
        export.main([str(out), f"--to={again}"])
        tokenizer = AutoTokenizer.from_pretrained(again, trust_remote_code=False)
        assert tokenizer("he said").input_ids == [CHARS.index(char) for char in "he said"]


# --- 4. the card, and the way back


def test_the_card_says_what_the_model_is(tmp_path):
    meta = {"tokenizer": "char", "chars": CHARS, "vocab_size": len(CHARS), "source": "a book"}
    model, folder = exported(tmp_path, meta, n_shard=2, sync="0101+parallel")
    text = (folder / "README.md").read_text(encoding="utf-8")
    for words in (
        "| sync rule | `grouped-2+parallel` |",
        r"| `AM AM\| AM AM\|` |",
        "| 2 of 8 |",
        "| n_shard | 2 |",
        f"| parameters | {model.get_num_params(non_embedding=False):,} |",
        "| data | a book |",
        "| 4,320 tokens, 30 steps of 40: unfinished |",
        "| 4.2500 nats per token, the lowest of the run |",
        'from_pretrained("export", trust_remote_code=True)',
        "`make serve MODEL=export`, on as many tensor-parallel ranks as divide 2.",
    ):
        assert words in text, words
    (tmp_path / "out" / "log.txt").write_text("# started: now\nstep 20: train loss 4.1000, val loss 4.3000\n")
    export.main([str(tmp_path / "out"), f"--to={tmp_path / 'second'}", "--best"])
    assert "| 4.3000 nats per token (perplexity 73.70) at step 20 |" in (tmp_path / "second" / "README.md").read_text()
    save(tmp_path / "plain" / "out")
    export.main([str(tmp_path / "plain" / "out"), f"--to={tmp_path / 'plain' / 'export'}"])
    text = (tmp_path / "plain" / "export" / "README.md").read_text()
    assert "trust_remote_code" not in text and "`vllm serve export`" in text and "other rules" not in text


def test_best_is_another_checkpoint(tmp_path):
    save(tmp_path / "out")
    saved = torch.load(tmp_path / "out" / "ckpt.pt")
    saved["model"]["transformer.wte.weight"] += 1
    ckpt.save(saved, tmp_path / "out", is_best=False)
    for name, keys in {"last": [], "best": ["--best"]}.items():
        export.main([str(tmp_path / "out"), f"--to={tmp_path / name}", *keys])
    last, best = (load_file(tmp_path / name / "model.safetensors") for name in ("last", "best"))
    torch.testing.assert_close(last["transformer.wte.weight"], best["transformer.wte.weight"] + 1)


@pytest.mark.parametrize("shape", [dict(n_shard=4, sync="0101"), dict(n_shard=2, **LLAMA)], ids=str)
def test_a_folder_is_trained_on(small_dataset, tmp_path, shape):
    """By the rule of syncs and the n_shard that it came with, unless the keys ask for another; the run resumes."""
    model, folder = exported(tmp_path, json.loads((small_dataset / "meta.json").read_text()), vocab_size=128, **shape)
    keys = dict(init_from=folder, dataset=small_dataset, out_dir="run", device="cpu", dtype="float32", max_iters=2)
    keys |= dict(block_size=24, batch_size=2, gradient_accumulation_steps=1, eval_iters=2, warmup_iters=0)
    argv = [f"--{key}={value}" for key, value in keys.items()]
    succeeded(run_script([TRAIN, *argv], cwd=tmp_path))
    step_0 = read_log(tmp_path / "run" / "log.txt").evaluations[0]
    with torch.no_grad():
        batches = list(Corpus(small_dataset, 24).evaluation_batches("val", 2, 2, 0, 1))
        assert step_0[2] == pytest.approx(sum(model(x, y)[1].item() for x, y, _ in batches) / 2, abs=1e-4)

    def prepared(*more):
        *_, config, _ = train_reduced_sync.prepare(configure(Config, [*argv, f"--out_dir={tmp_path / 'run'}", *more]))
        return config

    assert prepared("--init_from=resume") == model.config
    assert prepared("--eval_only=True") == model.config
    chosen = prepared("--eval_only=True", "--sync=spd")
    assert chosen == dataclasses.replace(model.config, sync="1111")
    if "sync" in shape:
        with pytest.raises(ValueError, match=f"n_shard=2: the weights of {folder} are 4 shards"):
            weights.from_pretrained(folder, n_shard=2)


def training(folder, dataset, out_dir, *more):
    """What train_reduced_sync.py makes of a folder and further arguments: (notes, GPTConfig)."""
    argv = [f"--init_from={folder}", f"--dataset={dataset}", f"--out_dir={out_dir}", "--block_size=24"]
    config = configure(Config, [*argv, "--device=cpu", *more])
    _, _, notes, model_config, _ = train_reduced_sync.prepare(config)
    return notes, model_config


def meta_of(dataset):
    return json.loads((dataset / "meta.json").read_text())


def test_a_written_rule_converts_an_export_and_the_log_says_so(small_dataset, tmp_path):
    """Fault 9: a rule that equals its default was taken for one that was not written, and the export's own trained."""
    model, folder = exported(tmp_path, meta_of(small_dataset), vocab_size=128, n_shard=2, sync="spd")
    keys = dict(init_from=folder, dataset=small_dataset, out_dir="run", device="cpu", dtype="float32", max_iters=1)
    keys |= dict(block_size=24, batch_size=2, gradient_accumulation_steps=1, eval_iters=2, warmup_iters=0)
    argv = ["config/train_baseline_24sync.py", *(f"--{key}={value}" for key, value in keys.items())]
    process = run_script([TRAIN, *argv], cwd=tmp_path)
    succeeded(process)
    log = read_log(tmp_path / "run" / "log.txt")
    said = f"init_from='{folder}' was trained with sync='spd', now 'baseline'"
    assert log.header["converted"] == said and f"converted: {said}\n" in process.stderr
    assert log.header["sync"] == "baseline"
    with torch.no_grad():
        baseline = model.with_sync("baseline")
        batches = list(Corpus(small_dataset, 24).evaluation_batches("val", 2, 2, 0, 1))
        expected = sum(baseline(x, y)[1].item() for x, y, _ in batches) / 2
    assert log.evaluations[0][2] == pytest.approx(expected, abs=1e-4)

    def resumed(*more):
        return training("resume", small_dataset, tmp_path / "run", *more)

    assert resumed() == resumed("--sync=baseline") == ({}, dataclasses.replace(model.config, sync="baseline"))
    with pytest.raises(ValueError, match="holds another model: sync='baseline', not 'spd'"):
        resumed("--sync=spd")
    with pytest.raises(ValueError, match="holds another model: n_layer=4, not 12"):
        resumed("--n_layer=12")


@pytest.mark.parametrize(
    "shape, argument, words",
    [
        (WITH_CODE[0], "--n_layer=12", "n_layer=4, not 12"),  # the default, written
        (WITH_CODE[0], "--n_shard=4", "n_shard=2, not 4"),
        (WITH_CODE[0], "--bias=False", "bias=True, not False"),
        (PLAIN[0], "--norm=rmsnorm", "norm='layernorm', not 'rmsnorm'"),
        (PLAIN[0], "--n_kv_head=2", "n_kv_head=4, not 2"),
        (PLAIN[5], "--n_kv_head=0", "n_kv_head=2, not 0"),
        (PLAIN[4], "--n_hidden=0", "n_hidden=88, not 0"),
        (PLAIN[4], "config/on_cpu.py", "n_embd=32, not 64"),
    ],
    ids=str,
)
def test_a_written_shape_that_is_not_the_folders_is_refused(small_dataset, tmp_path, shape, argument, words):
    """Fault 9: it was overwritten in silence."""
    _, folder = exported(tmp_path, meta_of(small_dataset), vocab_size=128, **shape)
    with pytest.raises(ValueError, match=f"init_from='{folder}' has {words}") as error:
        training(folder, small_dataset, tmp_path / "run", argument)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [PLAIN[0], PLAIN[4]], ids=str)
def test_a_dense_folder_takes_any_rule_and_any_shards(small_dataset, tmp_path, shape):
    """Fault 9: and keys that say what the weights are, or that 0 leaves to them."""
    _, folder = exported(tmp_path, meta_of(small_dataset), vocab_size=128, **shape)
    more = ["config/train_spd_12sync.py", "--n_shard=4", "--n_layer=4", "--n_kv_head=0", "--device=cpu"]
    notes, config = training(folder, small_dataset, tmp_path / "run", *more)
    assert not notes and (config.sync, config.n_shard, config.n_embd) == ("spd", 4, 32)
    assert training(folder, small_dataset, tmp_path / "run")[1].sync == "baseline"


def test_a_folder_is_trained_on_its_own_tokens_alone(small_dataset, tmp_path):
    """Fault 10: sizes were compared, so that GPT-2's model learned from the ids of characters."""
    meta = {"tokenizer": "gpt2", "vocab_size": 50257}
    _, gpt2 = exported(tmp_path / "gpt2", meta, **GPT2)
    with pytest.raises(ValueError, match=f"dataset='{small_dataset}' and init_from='{gpt2}' have other tokens"):
        training(gpt2, small_dataset, tmp_path / "run")
    with pytest.raises(ValueError, match="and init_from='gpt2' have other tokens"):
        training("gpt2", small_dataset, tmp_path / "run")
    _, other = exported(tmp_path / "other", vocab_size=128)
    with pytest.raises(ValueError, match="have other tokens: prepare the data"):
        training(other, small_dataset, tmp_path / "run")
    _, same = exported(tmp_path / "same", meta_of(small_dataset), vocab_size=128)
    assert training(same, small_dataset, tmp_path / "run")[0] == {}
    (same / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        training(same, small_dataset, tmp_path / "run")
    (same / "tokenizer.json").unlink()
    notes, _ = training(same, small_dataset, tmp_path / "run")
    assert notes == {"tokens": f"the vocabulary of init_from='{same}' could not be checked; assuming it matches"}


def test_the_hash_of_gpt2s_tokens(tmp_path):
    """Fault 10: of OpenAI's own file, and of the folder that export.py makes of it."""
    preparing.gpt2_encoding()
    ids = json.loads(preparing.gpt2_files()["encoder.json"].read_text(encoding="utf-8"))
    expected = hashlib.sha256("\0".join(sorted(ids, key=ids.get)).encode()).hexdigest()
    meta = {"tokenizer": "gpt2", "vocab_size": 50257}
    _, folder = exported(tmp_path, meta, **GPT2)
    assert vocabulary_hash("gpt2", meta) == vocabulary_hash(str(folder), meta) == expected


def test_a_folder_is_sampled_on_its_shards(tmp_path, monkeypatch):
    _, folder = exported(tmp_path, n_shard=4, sync="0101")
    argv = [
        "--",
        SAMPLE,
        f"--init_from={folder}",
        "--start=he",
        "--max_new_tokens=9",
        "--temperature=0",
        "--device=cpu",
    ]
    assert succeeded(run_script(argv, nproc=2)) == succeeded(run_script(argv[1:]))
    monkeypatch.setattr(sample, "WORLD_SIZE", 3)
    with pytest.raises(ValueError, match=f"n_shard=4 of {folder} is not divisible by 3 processes"):
        sample.load(sample.Config(init_from=str(folder)))


# --- 5. mistakes


def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys):
    save(tmp_path / "out", n_shard=2, sync="1111")
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").touch()
    out, before = str(tmp_path / "out"), sorted(tmp_path.iterdir())
    for argv, words in {
        (out,): "name one out_dir, and the folder to make",
        (out, out, "--to=a"): "name one out_dir",
        (str(tmp_path / "no"), f"--to={tmp_path}/a"): f"no checkpoint {tmp_path}/no/ckpt.pt",
        (out, f"--to={tmp_path}/there"): "exists already: choose another folder",
        (out, f"--to={tmp_path}/link"): "exists already",
        (out, f"--to={tmp_path}/file"): "exists already",
        (out, f"--to={tmp_path}/no/a"): f"there is no folder {tmp_path}/no",
        (out, f"--to={tmp_path}/file/a"): f"there is no folder {tmp_path}/file",
        (out, "--to=/proc/a"): "to='/proc/a' cannot be written: No such file or directory",
        (out, f"--to={tmp_path}/a", "--best=1"): "best must be bool",
    }.items():
        with pytest.raises(SystemExit) as ended:
            export.main(list(argv))
        said = capsys.readouterr()
        assert ended.value.code == 1 and said.out == ""
        assert said.err.startswith("error: ") and said.err.count("\n") == 1 and words in said.err, said.err
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("shape, meta, limit", [(PLAIN[0], None, 99_000), (GPT2, {"tokenizer": "gpt2"}, 2_000_000)])
def test_a_full_disk(tmp_path, shape, meta, limit):
    """A limit on a file's size fails where a full disk does: in the weights, in the tokenizer."""
    save(tmp_path / "out", meta and meta | {"vocab_size": 50257}, **shape)
    if meta:
        preparing.gpt2_encoding()  # downloaded once, by whoever comes first, which is said

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    process = run_script([EXPORT, tmp_path / "out", f"--to={tmp_path / 'a'}"], preexec_fn=small_files)
    one_line_error(process, f"to='{tmp_path}/a' cannot be written", "File too large")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_model_that_diverged(tmp_path, capsys):
    save(tmp_path / "out")
    saved = torch.load(tmp_path / "out" / "ckpt.pt")
    saved["model"]["transformer.h.1.ln_1.weight"][0, 3] = float("nan")
    torch.save(saved, tmp_path / "out" / "ckpt.pt")
    with pytest.raises(SystemExit):
        export.main([str(tmp_path / "out"), f"--to={tmp_path / 'a'}"])
    assert "transformer.h.1.ln_1.weight is not finite: the training diverged\n" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_folder_whose_config_makes_no_model(tmp_path):
    _, folder = exported(tmp_path, n_shard=2, sync="1111")
    keys = json.loads((folder / "config.json").read_text())
    for change, words in (
        (dict(n_shard=3), "n_head=4 is not divisible by n_shard=3"),
        (dict(n_layer="x"), "init_from="),
    ):
        (folder / "config.json").write_text(json.dumps(keys | change))
        with pytest.raises(ValueError, match=words):
            weights.from_pretrained(folder)
