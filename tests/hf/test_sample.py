"""Decoding and sample.py: the cache against the full forward, samplers against transformers', text in every layout."""

import contextlib
import dataclasses
import io
import json
import re
import time
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launch import ROOT, ending, one_line_error, run_script, start, succeeded
from spawn import run_ranks
from torch.distributed.tensor.debug import CommDebugMode
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from variants import VARIANTS, rough

import sample
from reduced_sync import checkpoint as ckpt
from reduced_sync import decoding
from reduced_sync.distributed import Layout
from reduced_sync.hf.export import hugging_face_tokenizer
from reduced_sync_model import GPT, GPTConfig, KVCache

pytestmark = pytest.mark.timeout(120)
SAMPLE = ROOT / "sample.py"
CHARS = "\n ,.aeiou" + "bcdfghklmnprstvwyé€"  # two and three bytes in UTF-8
SHAPE = dict(block_size=16, vocab_size=64, n_layer=4, n_head=4, n_embd=32, bias=True)


def build(sync="0101", n_shard=4, group=None, **changes):
    torch.manual_seed(5)
    return GPT(GPTConfig(**SHAPE | changes, n_shard=n_shard, sync=sync), group).eval()


def prompt(B, T=16):
    return torch.randint(0, 64, (B, T), generator=torch.Generator().manual_seed(B))


# --- invariant 7: decoding token by token is the full forward


def assert_decoding(model, B):
    """Logits of a prefill of 5 tokens and of 11 decode steps, static and not, against those of one forward pass."""
    idx, decoder, cache = prompt(B), decoding.Decoder(model, B, 16), KVCache(model, B)
    memory = [t.data_ptr() for pair in cache.layers for t in pair]
    with torch.no_grad():
        expected = model(idx, targets=idx)[0]  # (B, 16, V)
        for unseen, last in [(idx[:, :5], 4), *((idx[:, t : t + 1], t) for t in range(5, 16))]:
            logits, loss = model(unseen, cache=cache)
            static = decoder.prefill(unseen) if last == 4 else decoder.step(unseen[:, 0])
            assert loss is None and cache.length == decoder.cache.length == decoder.place.item() == last + 1
            for found in (logits, static):
                torch.testing.assert_close(found, expected[:, last : last + 1], rtol=0, atol=1e-5)
    assert [t.data_ptr() for pair in cache.layers for t in pair] == memory


@pytest.mark.parametrize("B", [2, 9])  # few rows and many
@pytest.mark.parametrize("n_shard", [1, 2, 4])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_decoding_equals_the_full_forward(variant, n_shard, B):
    model = rough(build(n_shard=n_shard, sync=variant))
    assert torch.unique(model(prompt(2))[0]).numel() > 100  # a model that tells tokens apart
    assert_decoding(model, B)
    assert_decoding(build(n_shard=n_shard, sync=variant, bias=False), B)


def assert_decoding_on_two_ranks(rank):
    for variant in VARIANTS:
        for n_shard in (2, 4):
            part = build(n_shard=n_shard, group=dist.group.WORLD, sync=variant)
            for B in (2, 9):
                assert_decoding(part, B)
                torch.testing.assert_close(part(prompt(B))[0], build(n_shard=n_shard, sync=variant)(prompt(B))[0])


def test_decoding_on_two_ranks():
    run_ranks(2, assert_decoding_on_two_ranks)


@pytest.mark.timeout(300)
def test_compiled_decoding():
    model = build("01", 2, n_layer=2)
    assert_decoding(decoding.for_decoding(model, compile=True), 2)


def test_a_step_sees_a_few_lengths_of_the_cache(monkeypatch):
    """Each is a graph on CUDA; a second generation takes the same ones."""
    monkeypatch.setattr(decoding.Decoder, "SHORTEST", 4)
    model, idx = rough(build()), prompt(2)
    decoder = decoding.Decoder(model, 2, 13)
    with torch.no_grad():
        expected = model(idx, targets=idx)[0]
        for _ in range(2):
            decoder.prefill(idx[:, :2])
            for t in range(2, 13):
                torch.testing.assert_close(decoder.step(idx[:, t])[:, 0], expected[:, t], rtol=0, atol=1e-5)
            assert list(decoder.steps) == [4, 8, 13]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_executed_all_reduces_of_a_decode_step(fake_group, variant):
    model = build(group=fake_group, sync=variant)
    cache = KVCache(model, 2)
    with torch.no_grad():
        for T in (5, 1, 1):
            with CommDebugMode() as comm:
                model(prompt(2, T), cache=cache)
            assert comm.get_total_counts() == model.config.rule.syncs


def test_what_a_cache_cannot_hold():
    model, cache = build(), KVCache(build(), 2)
    model(prompt(2, 10), cache=cache)
    with pytest.raises(ValueError, match="2 tokens behind the 10 in the cache"):
        model(prompt(2, 2), cache=cache)
    for _ in range(6):
        model(prompt(2, 1), cache=cache)
    with pytest.raises(ValueError, match="17 tokens is longer than block_size=16"):
        model(prompt(2, 1), cache=cache)


@pytest.mark.parametrize("n_shard", [1, 4])
@pytest.mark.parametrize("keys", [*(dict(sync=rule) for rule in VARIANTS), dict(position="rope", n_kv_head=2)], ids=str)
def test_padding_at_the_start_of_a_row_changes_nothing_behind_it(keys, n_shard):
    """In one pass, and with a cache that takes several tokens at a time."""
    model, idx, padding = rough(build(n_shard=n_shard, **keys)), prompt(3), torch.tensor([0, 5, 15])
    cache, places = KVCache(model, 3), torch.arange(16)
    positions = (places - padding[:, None]).clamp(min=0)
    mask = torch.ones(16, 16, dtype=torch.bool).tril() & (places >= padding[:, None, None]) | torch.eye(
        16, dtype=torch.bool
    )
    with torch.no_grad():
        whole = model.hidden_states(idx, positions=positions, mask=mask)
        parts = [
            model.hidden_states(idx[:, a:b], cache, positions[:, a:b], mask[:, a:b, :b])
            for a, b in ((0, 7), (7, 12), (12, 13), (13, 16))
        ]
        assert whole.isfinite().all()
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-4)
        for row, n in enumerate(padding.tolist()):
            alone = model.hidden_states(idx[row : row + 1, n:])
            torch.testing.assert_close(whole[row : row + 1, n:], alone, rtol=0, atol=1e-4)


# --- choosing tokens


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 200])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 1.0])
def test_samplers_are_those_of_transformers(temperature, top_k, top_p):
    logits = 3 * torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = torch.multinomial(scores.softmax(-1), 1, generator=torch.Generator().manual_seed(2)).squeeze(1)
    chosen = decoding.sample_tokens(logits, temperature, top_k, top_p, torch.Generator().manual_seed(2))
    assert torch.equal(chosen, expected)
    assert len(set(chosen.tolist())) > 10


def test_temperature_0_takes_the_likeliest():
    logits = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(decoding.sample_tokens(logits, temperature=0, top_k=5, top_p=0.5), logits.argmax(-1))


def chooser():
    return partial(decoding.sample_tokens, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("length", [1, 9, 16, 30])
def test_generating_is_nanogpts_loop(length):
    """Also where the block is full: the window slides, and is computed anew."""
    model, idx = rough(build("0101")), prompt(3, length)
    expected, choose = idx, chooser()
    with torch.no_grad():
        for _ in range(25):
            logits, _ = model(expected[:, -16:])
            expected = torch.cat((expected, choose(logits[:, -1])[:, None]), 1)
    new = torch.stack(list(decoding.generate(model, idx, 25, chooser(), contextlib.nullcontext)), 1)
    assert torch.equal(new, expected[:, length:]) and len(set(new.flatten().tolist())) > 5


def test_bfloat16_decodes_as_float32_does():
    model, autocast = rough(build("0101")), partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(prompt(2))[0]
    decoding.cast_matrices(model, torch.bfloat16)
    assert len(list(decoding.generate(model, prompt(2, 4), 14, chooser(), autocast))) == 14
    with torch.no_grad(), autocast():
        cache = KVCache(model, 2)
        model(prompt(2)[:, :15], cache=cache)
        logits = model(prompt(2)[:, 15:], cache=cache)[0]
    assert cache.layers[0][0].dtype == torch.bfloat16 and (logits - expected).norm() < 0.03 * expected.norm()


# --- sample.py


def save(folder, pattern="0101", n_shard=4, meta=None, **changes):
    """A checkpoint of a random model that writes varied text; returns the folder."""
    model = rough(build(pattern, n_shard, **changes))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    rest = {"model_args": dataclasses.asdict(model.config), "config": {}, "scaler": {}, "best_val_loss": 4.0}
    rest |= dict.fromkeys(["step", "evaluated", "skipped", "bad_steps"], 0)
    rest["data"] = meta or {"tokenizer": "char", "chars": CHARS, "vocab_size": len(CHARS)}
    folder.mkdir(parents=True, exist_ok=True)
    ckpt.save(ckpt.gather(model, optimizer) | rest, folder, is_best=False)
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return save(tmp_path_factory.mktemp("sample") / "out")


def arguments(out, **keys):
    keys = dict(out_dir=out, start="he said", max_new_tokens=8, device="cpu") | keys
    return [SAMPLE, *(f"--{key}={value}" for key, value in keys.items())]


def under(nproc):
    """Under torchrun a -- comes before the script, or --start would be taken for an option of torchrun's."""
    return ["--"] if nproc else []


def text_of(out, nproc=None, **keys):
    if nproc:
        return succeeded(run_script(under(nproc) + arguments(out, **keys), nproc))
    with contextlib.redirect_stdout(io.StringIO()) as text:  # in this process: starting one takes longer than the text
        sample.main([str(argument) for argument in arguments(out, **keys)[1:]])
    return text.getvalue()


@pytest.mark.parametrize("pattern", ["2222", "0001"])
def test_the_same_text_in_every_layout(tmp_path, pattern):
    """20 tokens of 3 samples, past the end of the block."""
    out = save(tmp_path / "out", pattern)
    keys = dict(num_samples=3, max_new_tokens=20, temperature=1.1, top_p=0.95)
    one = text_of(out, **keys)
    samples = one.split("\n---------------\n")
    assert len(samples) == 4 and samples[3] == "" and len(set(samples)) == 4
    assert all(s.startswith("he said") and len(s) == 27 for s in samples[:3])
    for nproc in (2, 4):
        assert text_of(out, nproc, **keys) == one
    assert text_of(out, **keys, seed=2) != one


def test_ids_that_no_text_has_are_never_chosen(out):
    """The model has 64 rows for 28 characters; at this temperature all are equally likely."""
    text = text_of(out, temperature=1000.0, top_k=0, num_samples=50, start="a").replace("\n---------------\n", "")
    assert set(text) == set(CHARS)


def test_prompts(out, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("he said", encoding="utf-8")
    expected = text_of(out)
    assert text_of(out, start=f"FILE:{tmp_path}/prompt.txt") == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    assert text_of(out, start="FILE:~/prompt.txt") == expected
    for nproc in (None, 2):
        argv = under(nproc) + arguments(out, start="FILE:-")
        with open(tmp_path / "prompt.txt") as stdin, ending(start(argv, nproc, stdin=stdin)) as process:
            assert process.communicate(timeout=100)[0] == expected
    long = "abo ut a hundred lines, or so. " * 3
    process = run_script(arguments(out, start=long, temperature=0.0))
    assert succeeded(process).startswith(long[-16:])
    assert "the prompt has 93 tokens: its last 16, a block, are used\n" in process.stderr
    assert "past 16 tokens, a block, the window slides and each token takes longer\n" in process.stderr
    assert run_script(arguments(out, start="a", max_new_tokens=15)).stderr == ""


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"he said", "he said"),
        (b"\xef\xbb\xbfhe\r\nsaid\r\r\n", "he\nsaid\n\n"),
        ("\ufeff\ufeff€ \x85\u2028\f\n".encode(), "\ufeff€ \x85\u2028\f\n"),
    ],
)
def test_a_prompt_file_is_read_as_a_training_text_is(tmp_path, monkeypatch, content, text):
    """data/shakespeare_char/prepare.py reads its --input by the same function."""
    (tmp_path / "prompt.txt").write_bytes(content)
    assert sample.read_prompt(f"FILE:{tmp_path}/prompt.txt") == text
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="latin-1"))
    assert sample.read_prompt("FILE:-") == text
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content + b"\xff")))
    with pytest.raises(ValueError, match=f"^start='FILE:-' is not UTF-8 text: .* at byte {len(content)}$"):
        sample.read_prompt("FILE:-")


def test_text_ends_at_end_of_text(out, capsys):
    """Each sample by itself: the others go on, and nothing comes behind an end."""
    saved = ckpt.load(out / "ckpt.pt")
    model = build()
    ckpt.restore(saved, model)
    tokens = sample.Tokens(saved["data"])
    config = sample.Config(start="a", num_samples=4, max_new_tokens=15, temperature=1.0)
    layout = Layout(torch.device("cpu"), torch.float32)
    sample.sample(config, model, tokens, len(CHARS), layout)
    whole = capsys.readouterr().out.split("\n---------------\n")[:4]
    end = whole[0][7]
    tokens.ends = {CHARS.index(end)}
    sample.sample(config, model, tokens, len(CHARS), layout)
    ended = capsys.readouterr().out.split("\n---------------\n")[:4]
    assert ended == ["a" + text[1:].split(end)[0] for text in whole] and len(ended[0]) <= 7
    assert {len(text) for text in ended} != {len(ended[0])}


def test_text_appears_while_it_is_generated(out):
    with ending(start(arguments(out, max_new_tokens=1_000_000))) as process:
        end = time.monotonic() + 60
        seen = ""
        while len(seen) < 50 and time.monotonic() < end:
            seen += process.stdout.read(10)
        assert len(seen) >= 50 and process.poll() is None


def test_gpt2(tmp_path):
    """A folder of that name with GPT-2's tokenizer, and a small random model."""
    shape = dict(vocab_size=50257, n_positions=32, n_embd=8, n_layer=2, n_head=2)
    torch.manual_seed(0)
    dense = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    dense.save_pretrained(tmp_path / "gpt2")
    tokenizer, _ = hugging_face_tokenizer({"tokenizer": "gpt2", "vocab_size": 50257}, GPTConfig())
    tokenizer.save_pretrained(tmp_path / "gpt2")
    argv = [SAMPLE, "--init_from=gpt2", "--start=Hello", "--max_new_tokens=6", "--temperature=0", "--device=cpu"]
    one = succeeded(run_script(argv, cwd=tmp_path))
    assert one == succeeded(run_script([*under(2), *argv], nproc=2, cwd=tmp_path))
    encoding = sample.preparing.gpt2_encoding()
    idx = torch.tensor([encoding.encode("Hello")])
    with torch.no_grad():
        for _ in range(6):
            idx = torch.cat((idx, dense(idx).logits[:, -1].argmax(-1, keepdim=True)), 1)
    assert one == encoding.decode(idx[0].tolist()) + "\n---------------\n"


# --- mistakes


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (dict(num_samples=0), ["num_samples=0 must be at least 1"]),
        (dict(max_new_tokens=0), ["max_new_tokens=0 must be at least 1"]),
        (dict(temperature=-1.0), ["temperature=-1.0 must be at least 0"]),
        (dict(temperature="1e999"), ["temperature=inf"]),
        (dict(temperature=1e-9), ["temperature=1e-09 must be 0", "at least 0.001"]),
        (dict(top_k=-1), ["top_k=-1 must be at least 0"]),
        (dict(top_p=0.0), ["top_p=0.0 must be above 0 and at most 1"]),
        (dict(top_p=1.5), ["top_p=1.5"]),
        (dict(init_from="gpt5"), ["init_from='gpt5'", "a folder or hub name"]),
        (dict(temperatur=1.0), ["unknown key 'temperatur'", "temperature"]),
        (dict(start=""), ["the prompt is empty"]),
        (dict(start='"he said"'), ["does not know the character '\"'"]),  # quotes are part of a prompt
        (dict(start="he said X"), ["does not know the character 'X'", "aeiou"]),
        (dict(start="FILE:nowhere.txt"), ["FILE:nowhere.txt", "No such file"]),
        (dict(out_dir="nowhere"), ["no checkpoint nowhere/ckpt.pt"]),
        (dict(device="cuda:9"), ["cuda:9"]),
    ],
)
def test_mistakes_are_one_line(out, capsys, keys, words):
    argv = [str(argument) for argument in arguments(out, **keys)[1:]]
    with pytest.raises(SystemExit) as ended:
        sample.main(argv)
    said = capsys.readouterr()
    assert ended.value.code == 1 and said.out == "" and re.fullmatch(r"error: .*\n", said.err)
    assert all(word in said.err for word in words), said.err


@pytest.mark.parametrize(
    "meta", [{}, {"tokenizer": "char"}, {"tokenizer": "char", "chars": "ab", "vocab_size": 3}, {"tokenizer": "bpe"}]
)
def test_a_checkpoint_that_does_not_say_its_tokens(tmp_path, meta):
    out = save(tmp_path / "out", n_shard=2, meta={"vocab_size": 28} | meta)
    one_line_error(run_script(arguments(out)), "cannot be used", "tokenizer")


@pytest.mark.parametrize("vocab_size", [65, 0, "28", None])
def test_a_vocabulary_that_is_not_the_models(tmp_path, vocab_size):
    out = save(tmp_path / "out", meta={"tokenizer": "gpt2", "vocab_size": vocab_size})
    with pytest.raises(ValueError, match="vocab_size"):
        sample.load(sample.Config(out_dir=str(out)))


def test_layouts_that_do_not_fit(out):
    process = run_script([*under(3), *arguments(out)], nproc=3)
    assert process.returncode == 1 and process.stdout == ""
    said = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert said == [f"error: n_shard=4 of {out}/ckpt.pt is not divisible by 3 processes"]


def test_meta_json_of_real_data_is_understood(small_dataset):
    meta = json.loads((small_dataset / "meta.json").read_text())
    tokens = sample.Tokens(meta)
    ids = np.fromfile(small_dataset / "val.bin", dtype="<u2")[:200].tolist()
    text = b"".join(map(tokens.bytes_of, ids)).decode()
    assert tokens.encode(text) == ids and len(set(text)) > 20


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_model_that_diverged(tmp_path, capsys, temperature):
    path = save(tmp_path) / "ckpt.pt"
    saved = torch.load(path)
    saved["model"]["transformer.wte.weight"].fill_(float("nan"))
    torch.save(saved, path)
    with pytest.raises(SystemExit):
        sample.main(arguments(tmp_path, temperature=temperature)[1:])
    assert "error: the model's logits are not finite" in capsys.readouterr().err
