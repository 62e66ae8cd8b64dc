"""What was written before there was one key `sync` loads as it is: checkpoints, exported folders, logs and results."""

import dataclasses
import json

import pytest
import torch
from launch import ROOT
from variants import SMALL, batch, rough

from reduced_sync import checkpoint as ckpt
from reduced_sync.compare.frontier import read_results
from reduced_sync.compare.runs import read_run
from reduced_sync.configurator import configure
from reduced_sync.hf import export, weights
from reduced_sync.old_keys import translate_old_keys
from reduced_sync.train.experiment import Config
from reduced_sync_model import GPT, GPTConfig

OLD = {
    "2222": ("baseline", 0, "", False, "sum", ""),
    "1111": ("spd", 0, "", False, "sum", ""),
    "0101": ("grouped", 2, "", False, "sum", ""),
    "0001": ("grouped", 4, "", False, "sum", ""),
    "a011+desync": ("selective", 0, "a011", False, "desync", ""),
    "1111+parallel": ("spd", 0, "", True, "sum", ""),
    "0101+ladder": ("grouped", 2, "", False, "sum", "ladder"),
    "2222+delayed": ("baseline", 0, "", False, "sum", "delayed"),
}
KEYS = "architecture layers_per_group sync_pattern parallel_block merge overlap".split()


def old_fields(config):
    """The fields of GPTConfig as they were."""
    rule, fields = config.rule, dataclasses.asdict(config)
    del fields["sync"]
    overlap = rule.method_name if rule.hidden else ""
    merge = "desync" if rule.method_name == "desync" else "sum"
    return fields | dict(
        sync_pattern=rule.pattern, parallel_block=rule.method_name == "parallel", merge=merge, overlap=overlap
    )


@pytest.mark.parametrize("sync", OLD)
def test_the_keys_of_a_config(sync):
    keys = dict(zip(KEYS, OLD[sync], strict=True)) | {"n_layer": 4, "n_embd": 32}
    found = translate_old_keys(keys)
    assert found.keys() == {"n_layer", "n_embd", "sync"}
    expected = dataclasses.replace(SMALL, sync=sync)
    assert dataclasses.replace(SMALL, sync=found["sync"]) == expected
    assert GPTConfig(**translate_old_keys(old_fields(expected))) == expected


@pytest.mark.parametrize("sync", ["0101", "a011+desync", "1111+parallel"])
def test_a_checkpoint_and_an_exported_folder(tmp_path, sync):
    model = rough(GPT(dataclasses.replace(SMALL, n_shard=2, sync=sync))).eval()
    state = ckpt.gather(model, model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu"))
    chars = "".join(map(chr, range(32, 32 + SMALL.vocab_size)))
    state |= {"data": {"tokenizer": "char", "chars": chars, "vocab_size": len(chars)}, "config": {}, "scaler": {}}
    state |= dict(step=0, evaluated=0, skipped=0, bad_steps=0, best_val_loss=4.0, model_args=old_fields(model.config))
    ckpt.save(state, tmp_path, is_best=False)
    saved, config, _ = ckpt.load_with_tokens(tmp_path / "ckpt.pt")
    assert config == model.config
    again = GPT(config).eval()
    ckpt.restore(saved, again)

    export.export(tmp_path / "ckpt.pt", tmp_path / "folder")
    path = tmp_path / "folder" / "config.json"
    keys = json.loads(path.read_text())
    del keys["sync"]
    path.write_text(json.dumps(keys | old_fields(model.config)))
    loaded = weights.from_pretrained(str(tmp_path / "folder")).eval()
    assert loaded.config == model.config
    x, _ = batch()
    with torch.no_grad():
        expected = model(x)[0]
        assert torch.equal(again(x)[0], expected) and torch.equal(loaded(x)[0], expected)


@pytest.mark.parametrize(
    "name, sync",
    [
        ("pilot/2x128-parallel-spd-lr0.004-seed1", "spd+parallel"),
        ("pilot/2x128-1sync-desync-nshard4-lr0.004-seed1", "grouped-1+desync"),
        ("pilot/2x128-early-lr0.004-seed1", "21"),
        ("pypi/6x384-3sync-lr0.002-seed1", "grouped-3"),
    ],
)
def test_a_log(name, sync):
    assert read_run(ROOT / "results" / name).sync == sync


@pytest.mark.parametrize("argument", ["--sync_pattern=110111011101", "--overlap=True", "--merge=5"])
def test_an_old_key_is_told_the_new_one(argument):
    """Also where its value is not of the type that it had."""
    key = argument[2:].partition("=")[0]
    with pytest.raises(ValueError, match=f"^{key}: this is one key now, such as sync='[\\w+]+'$"):
        configure(Config, [argument])


def test_results_of_bench():
    """Where grouped:3 was 3 layers a group, 4 syncs of 12 layers."""
    _, cases = read_results(ROOT / "results/decode-all/every.json")
    rows = {row.candidate: row for row in cases[0].rows}
    assert {rows[name].syncs for name in ("grouped-4", "grouped-4+desync")} == {4} and "spd+parallel" in rows
    _, results = read_results(ROOT / "results/h100/train.json")
    assert [row.candidate for row in results if "grouped" in row.candidate] == [
        "grouped-4@2 compiled",
        "grouped-4@4 compiled",
    ]
