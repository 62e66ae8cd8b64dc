"""The tokens of pretrained folders in sample.py, drop_syncs.py and export.py, against transformers."""

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import subprocess

import pytest
import torch
from conftest import english
from launch import ending, run_script, start, status, succeeded
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from variants import rough

import drop_syncs
import export
import sample
from reduced_sync import checkpoint as ckpt
from reduced_sync.checkpoint import TOKENIZER_FOLDER
from reduced_sync.files import lock_folder, temporary_folder
from reduced_sync.hf.tokenizer import Tokens, pretrained_meta
from reduced_sync_model import GPT, GPTConfig

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("modules")]
torch.set_num_threads(1)
GPT2 = GPT2Config(vocab_size=256, n_positions=64, n_embd=16, n_layer=2, n_head=2)  # its ends are 50256
LLAMA = LlamaConfig(vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


def bytes_tokenizer(added=(), dropout=None, **roles):
    """A tokenizer of the 256 bytes and the pair `th`, in the place of byte 255."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:255]
    vocab = {character: i for i, character in enumerate([*alphabet, "th"])}
    backend = Tokenizer(models.BPE(vocab, [("t", "h")], dropout=dropout))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def save(folder, shape=LLAMA, own=None, **generation):
    """Write a random model, a tokenizer and, if given, a generation_config.json; returns the folder."""
    torch.manual_seed(0)
    model = (GPT2LMHeadModel if shape is GPT2 else LlamaForCausalLM)(shape)
    rough(model).save_pretrained(folder)
    (own or bytes_tokenizer()).save_pretrained(folder)
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def write_checkpoint(out_dir, meta, **shape):
    """A checkpoint of a tiny random model with the tokens of `meta`."""
    model = GPT(GPTConfig(block_size=16, vocab_size=meta["vocab_size"], n_layer=2, n_head=2, n_embd=8, **shape))
    rest = {
        "model_args": dataclasses.asdict(model.config),
        "config": {"block_size": 16},
        "scaler": {},
        "best_val_loss": 4.0,
    }
    rest |= dict.fromkeys(["step", "evaluated", "skipped", "bad_steps"], 0) | {"data": meta}
    out_dir.mkdir()
    ckpt.save(ckpt.gather(model) | rest, out_dir, is_best=False)


def sampled(**keys):
    keys = dict(start="the other", max_new_tokens=30, temperature=0.0, device="cpu") | keys
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert status(sample.main, [f"--{key}={value}" for key, value in keys.items()]) == 0
    return text.getvalue().removesuffix("\n---------------\n")


def greedy(folder, prompt="the other", **keys):
    """transformers' text of a folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=30, do_sample=False, **keys)
    return ids[0, tokenizer(prompt, return_tensors="pt").input_ids.shape[1] :].tolist(), tokenizer


def dropping(folder, out_dir, **keys):
    """The arguments of drop_syncs.py for a short run."""
    text = out_dir.parent / "text.txt"
    if not text.exists():
        text.write_text(english()[:3000], encoding="utf-8")
    keys = dict(init_from=folder, calibration=text, evaluation=text) | keys
    keys |= dict(out_dir=out_dir, block_size=32, calibration_windows=2, distil_tokens=0, finetune_tokens=0)
    keys |= dict(arrange="as_is", evaluation_tokens=64, device="cpu")
    return [f"--{key}={value}" for key, value in keys.items()]


def error_of(main, argv, capsys):
    """The one line with which the command ends."""
    capsys.readouterr()
    assert status(main, argv) == 1
    said = capsys.readouterr()
    assert said.out == "" and re.fullmatch(r"error: .*\n", said.err), said
    return said.err


# --- a folder and a name


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "char"])
def test_a_folder_wins_over_a_name(tmp_path, monkeypatch, name):
    """Fault 4: a folder called gpt2 has its own tokens, in sample.py, in drop_syncs.py, and in what it exports."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / name, GPT2)
    ids, tokenizer = greedy(tmp_path / name)
    assert sampled(init_from=name) == "the other" + tokenizer.decode(ids)
    assert drop_syncs.Source(name).tokens.encode("the") == tokenizer("the").input_ids
    assert status(drop_syncs.main, dropping(name, tmp_path / "out", drop=0)) == 0
    export.main(["out", "--to=export"])
    assert AutoTokenizer.from_pretrained("export")("the other").input_ids == tokenizer("the other").input_ids


def test_a_name_without_a_folder_is_openais(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "gpt2-xl"):
        assert sample.load(sample.Config(init_from=name))[2] == {"tokenizer": "gpt2", "vocab_size": 50257}
    assert pretrained_meta("owner/model", 9) == {"tokenizer": "owner/model", "vocab_size": 9}


# --- settings of a tokenizer's training


def test_a_text_is_neither_cut_nor_padded(tmp_path):
    """Fault 5: what tokenizer.json says of a batch in training is no rule for a text, nor is it exported."""
    own = bytes_tokenizer(dropout=0.5)
    own.backend_tokenizer.enable_truncation(max_length=8)
    own.backend_tokenizer.enable_padding(length=4000, pad_id=3, pad_token="$")
    folder = save(tmp_path / "model", own=own)
    written = json.loads((folder / "tokenizer.json").read_text())
    assert written["truncation"]["max_length"] == 8 and written["padding"] and written["model"]["dropout"] == 0.5
    text = english()[:3000]
    expected = bytes_tokenizer()(text).input_ids
    assert 255 in expected and len(expected) > 2500
    tokens = drop_syncs.Source(str(folder)).tokens
    assert all(tokens.encode(text) == expected for _ in range(3))
    assert status(drop_syncs.main, dropping(folder, tmp_path / "out")) == 0
    export.main([str(tmp_path / "out"), f"--to={tmp_path / 'export'}"])
    write_checkpoint(tmp_path / "unread", pretrained_meta(str(folder), 256))  # of which no text is encoded
    export.main([str(tmp_path / "unread"), f"--to={tmp_path / 'another'}"])
    for place in (tmp_path / "out" / TOKENIZER_FOLDER, tmp_path / "export", tmp_path / "another"):
        written = json.loads((place / "tokenizer.json").read_text())
        assert written["truncation"] is written["padding"] is written["model"]["dropout"] is None
        assert AutoTokenizer.from_pretrained(place, trust_remote_code=False)(text).input_ids == expected


def test_a_tokenizer_that_another_run_has_left_is_not_a_checkpoints(tmp_path):
    folder = save(tmp_path / "model")
    assert status(drop_syncs.main, dropping(folder, tmp_path / "out", drop=0)) == 0
    write_checkpoint(tmp_path / "new", {"tokenizer": "char", "chars": "abc", "vocab_size": 3})
    (tmp_path / "new" / "ckpt.pt").replace(tmp_path / "out" / "ckpt.pt")
    assert ckpt.load_with_tokens(tmp_path / "out" / "ckpt.pt")[2]["tokenizer"] == "char"


# --- ids beyond the embedding table


def test_tokens_beyond_the_table_are_refused_where_a_text_has_them(tmp_path, capsys):
    """Fault 6: before any work, and only there: many tokenizers have a padding token without a row."""
    folder = save(tmp_path / "model", own=bytes_tokenizer(["<more>"], pad_token="<more>"))
    assert sampled(init_from=folder).startswith("the other")
    words = "the tokenizer gives '<more>' the id 256, but the model has only the ids 0 to 255"
    argv = [f"--init_from={folder}", "--start=one <more>", "--device=cpu"]
    assert error_of(sample.main, argv, capsys) == f"error: {words}\n"
    (tmp_path / "more.txt").write_text(english()[:3000] + "<more>")
    for key in ("calibration", "evaluation"):
        argv = dropping(folder, tmp_path / "out", **{key: tmp_path / "more.txt"})
        line = f"error: {key}='{tmp_path}/more.txt': {tmp_path}/more.txt: {words}\n"
        assert error_of(drop_syncs.main, argv, capsys) == line and not (tmp_path / "out").exists()
    assert status(drop_syncs.main, dropping(folder, tmp_path / "out", drop=0)) == 0
    export.main([str(tmp_path / "out"), f"--to={tmp_path / 'export'}"])
    AutoModelForCausalLM.from_pretrained(tmp_path / "export")  # which pads with no id that it lacks


@pytest.mark.parametrize("suppressed, words", [([3, 256], " lists 256"), ([-1], " lists -1"), ("x", "='x' must be")])
def test_suppressed_tokens_beyond_the_table_are_refused(tmp_path, capsys, suppressed, words):
    """Fault 6: in the folder, and in what a run has kept of it, before anything is written."""
    folder = save(tmp_path / "model", suppress_tokens=[3])
    assert status(drop_syncs.main, dropping(folder, tmp_path / "out", drop=0)) == 0
    for place in (folder, tmp_path / "out" / TOKENIZER_FOLDER):
        (place / "generation_config.json").write_text(json.dumps(dict(suppress_tokens=suppressed)))
    before = sorted(tmp_path.iterdir())
    for main, argv in {
        sample.main: [f"--init_from={folder}", "--device=cpu"],
        drop_syncs.main: dropping(folder, tmp_path / "again"),
        export.main: [str(tmp_path / "out"), f"--to={tmp_path / 'export'}"],
    }.items():
        line = error_of(main, argv, capsys)
        assert line.startswith("error: generation_config.json of ") and f"suppress_tokens{words}" in line
        assert sorted(tmp_path.iterdir()) == before


def test_ends_beyond_the_table_are_none(tmp_path):
    """Fault 6: GPT2Config calls 50256 the end, however few ids there are; then the tokenizer's own is."""
    folder = save(tmp_path / "model", GPT2, bytes_tokenizer(eos_token="$"))
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == generation.bos_token_id == 50256
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    assert Tokens(pretrained_meta(str(folder), 256), 256).ends == {end}
    assert status(drop_syncs.main, dropping(folder, tmp_path / "out", drop=0)) == 0
    export.main([str(tmp_path / "out"), f"--to={tmp_path / 'export'}"])
    generation = GenerationConfig.from_pretrained(tmp_path / "export")
    assert (generation.eos_token_id, generation.bos_token_id, generation.pad_token_id) == (end, None, end)
    AutoModelForCausalLM.from_pretrained(tmp_path / "export")


def test_the_space_between_a_prompt_and_its_text(tmp_path):
    """Decoders like Llama 2's drop the one that a text begins with."""
    backend = Tokenizer(models.BPE({"\u2581to": 0, "\u2581be": 1}, []))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    tokens = Tokens({"tokenizer": str(tmp_path)})
    text_of = tokens.decoder([0])
    assert "".join(map(text_of, [1, 0, None])) == " be to" and tokens.decode([0, 1, 0]) == "to be to"


# --- generation_config.json


@pytest.mark.parametrize(
    "drop, file", [(0, "generation_config.json"), (2, "generation_config.json"), (0, "config.json")]
)
def test_a_text_ends_everywhere_at_the_same_tokens(tmp_path, drop, file):
    """Fault 7: several ends and suppressed tokens, from the source through the out_dir to its export."""
    folder = save(tmp_path / "model", own=bytes_tokenizer(eos_token="$"))
    free, _ = greedy(folder, eos_token_id=None)
    assert len(free) == 30
    suppressed = free[:1]
    again, _ = greedy(folder, eos_token_id=None, suppress_tokens=suppressed)
    end = next(token for i, token in enumerate(again) if i > 3 and token not in again[:i])
    said = dict(eos_token_id=[1, 5, end], bos_token_id=9, suppress_tokens=suppressed, temperature=0.6, do_sample=True)
    if file == "config.json":  # of older folders
        (folder / "generation_config.json").unlink()
        said = json.loads((folder / "config.json").read_text()) | dict(eos_token_id=[1, 5, end])
    (folder / file).write_text(json.dumps(said))

    ids, tokenizer = greedy(folder)
    assert 3 < len(ids) < 30 and ids[-1] == end
    assert sampled(init_from=folder) == "the other" + tokenizer.decode(ids[:-1])
    assert status(drop_syncs.main, dropping(folder, tmp_path / "out", drop=drop)) == 0
    assert Tokens({"tokenizer": str(tmp_path / "out" / TOKENIZER_FOLDER)}).ends == {1, 5, end}
    export.main([str(tmp_path / "out"), f"--to={tmp_path / 'export'}"])
    generation = GenerationConfig.from_pretrained(tmp_path / "export")
    assert generation.eos_token_id == sorted([1, 5, end])
    if file == "generation_config.json":
        assert (generation.suppress_tokens, generation.temperature) == (suppressed, 0.6)
        assert (generation.bos_token_id, generation.do_sample) == (9, True)
    theirs, _ = greedy(tmp_path / "export")
    assert theirs == ids or drop
    text = tokenizer.decode(theirs[:-1] if theirs[-1] in generation.eos_token_id else theirs)
    assert sampled(out_dir=tmp_path / "out") == sampled(init_from=tmp_path / "export") == "the other" + text


# --- what is missing or damaged


@pytest.mark.parametrize("shape", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_a_folder_without_a_tokenizer(tmp_path, capsys, shape):
    """Fault 8: transformers would take an empty one for GPT-2's, and say half a sentence of Llama's."""
    folder = save(tmp_path / "model", shape)
    for more in (None, {}, {"tokenizer_class": "LlamaTokenizer"}):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).unlink(missing_ok=True)
        if more is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(more))
        for main, argv in {
            sample.main: [f"--init_from={folder}", "--device=cpu"],
            drop_syncs.main: dropping(folder, tmp_path / "out"),
        }.items():
            line = error_of(main, argv, capsys)
            assert line == f"error: no tokenizer in '{folder}': the folder has no tokenizer.json\n"


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_damaged_file_is_one_line(tmp_path, capsys, file):
    """Fault 8: whatever exception the libraries have for it."""
    folder = save(tmp_path / "model")
    for content in (
        "{ not JSON",
        "[]",
        "null",
        '"text"',
        *(["{}", '{"model": 1}'] if file == "tokenizer.json" else []),
    ):
        (folder / file).write_text(content)
        line = error_of(sample.main, [f"--init_from={folder}", "--device=cpu"], capsys)
        assert f"'{folder}'" in line and not line.endswith(":\n"), line


# --- what a killed process leaves


KILLED = """
import os, signal, sys
import export
from reduced_sync.hf import export as library
def stop(*_):
    print("there", flush=True)
    signal.pause()
library.write_pretrained = stop
export.main(sys.argv[1:])
"""


def test_a_killed_export_leaves_nothing_for_good(tmp_path):
    """Fault 19: the next export to that place removes what a dead one left, and nothing of a live one."""
    write_checkpoint(tmp_path / "out", {"tokenizer": "char", "chars": "abcd", "vocab_size": 4})
    argv = [str(tmp_path / "out"), f"--to={tmp_path / 'a'}"]
    with ending(start(["-c", KILLED, *argv])) as live:
        with ending(start(["-c", KILLED, *argv])) as dead:
            assert dead.stdout.readline() == live.stdout.readline() == "there\n"
            dead.send_signal(signal.SIGKILL)
            dead.wait()
        left = {path.name for path in tmp_path.glob(".a.*.tmp")}
        assert left == {f".a.{dead.pid}.tmp", f".a.{live.pid}.tmp"}
        (tmp_path / ".a.b.1.tmp").mkdir()  # another's
        export.main(argv)
        names = {"out", "a", ".a.b.1.tmp"}
        assert {path.name for path in tmp_path.iterdir()} == names | {f".a.{live.pid}.tmp"}
        assert not (tmp_path / "a" / ".lock").exists() and (tmp_path / f".a.{live.pid}.tmp/model.safetensors").exists()
        live.kill()
    with temporary_folder(tmp_path / "a"):
        assert {path.name for path in tmp_path.iterdir()} == names | {f".a.{os.getpid()}.tmp"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_runs_lock_removes_what_a_killed_run_was_writing(tmp_path):
    """Fault 19: a checkpoint's temporary file may be as large as the checkpoint, and no later save has its name."""
    for name in ("ckpt_best.pt.tmp", "progress.pt.tmp", "log.txt.tmp", "ckpt.pt", "mine.tmp"):
        (tmp_path / name).touch()
    with lock_folder(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {"ckpt.pt", "mine.tmp", ".lock"}
        (tmp_path / "ckpt.pt.tmp").touch()
        with pytest.raises(ValueError, match="in use"):
            lock_folder(tmp_path)
        assert (tmp_path / "ckpt.pt.tmp").exists()


# --- an export's tokenizer needs no code


LOADED = """
import sys
from transformers import AutoTokenizer
exec(open("export/README.md").read().split("```python")[1].split("```")[0].replace("=50", "=2"))
print("without a word:")
print(AutoTokenizer.from_pretrained("export")("the").input_ids)
"""


@pytest.mark.parametrize("tokens, pattern", [("char", "11"), ("gpt2", "11"), ("char", "22")])
def test_a_tokenizer_of_an_export_asks_nothing(tmp_path, tokens, pattern, capsys):
    """Fault 21: loaded as its card does it. Without that word transformers asks because the model, not the tokenizer,
    has code; where nobody can answer it goes on. A plain model has none.
    """
    chars = " aeht"
    meta = {"tokenizer": "gpt2", "vocab_size": 50257}
    if tokens == "char":
        meta = {"tokenizer": "char", "chars": chars, "vocab_size": len(chars)}
    write_checkpoint(tmp_path / "out", meta, n_shard=2, sync=pattern)
    export.main([str(tmp_path / "out"), f"--to={tmp_path / 'export'}"])
    said = succeeded(run_script(["-c", LOADED], cwd=tmp_path, stdin=subprocess.DEVNULL))
    card, plain = said.split("without a word:\n")
    assert "the" in card and "[y/N]" not in card
    if tokens == "char":  # its tokenizer would leave it out
        argv = [f"--init_from={tmp_path / 'export'}", "--start=a the é", "--device=cpu"]
        assert "does not know the character 'é'" in error_of(sample.main, argv, capsys)
    assert ("[y/N]" in plain) == (pattern == "11") and plain.endswith(f"{Tokens(meta).encode('the')}\n")
