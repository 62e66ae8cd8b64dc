"""drop_syncs.py end to end on a tiny Llama with real text, and its parts against plain computations."""

import dataclasses
import math
import os
import re
import shutil
import signal
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import english
from launch import ROOT, one_line_error, run_script, status, succeeded
from spawn import run_ranks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from variants import rough

import drop_syncs
import export
import sample
import train_reduced_sync
from reduced_sync import checkpoint as ckpt
from reduced_sync.configurator import configure
from reduced_sync.data import Corpus
from reduced_sync.distributed import Layout
from reduced_sync.dropping import distillation, placement, quality, texts
from reduced_sync.dropping.log import DropLog, agreement_line, perplexity_line, read_drop_log, table_of
from reduced_sync.dropping.source import Source
from reduced_sync.hf import weights
from reduced_sync.train.log import RunLog
from reduced_sync_model import GPT, GPTConfig, SyncRule

torch.set_num_threads(1)  # the tensors are tiny
DROP = ROOT / "drop_syncs.py"
LAYOUT = Layout(torch.device("cpu"), torch.float32)
BLOCK = dict(norm="rmsnorm", position="rope", mlp="swiglu", n_hidden=96, bias=False)
SMALL = GPTConfig(block_size=32, vocab_size=256, n_layer=4, n_head=8, n_kv_head=4, n_embd=32, n_shard=2, **BLOCK)


@pytest.fixture(scope="module", autouse=True)
def short_continuations():
    """64 tokens take most of a run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "CONTINUED", 8)
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a Llama of four layers and a tokenizer of bytes, and two texts."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    shape = dict(vocab_size=256, hidden_size=32, intermediate_size=96, num_hidden_layers=4, num_attention_heads=8)
    shape |= dict(num_key_value_heads=4, max_position_embeddings=32, bos_token_id=0, eos_token_id=0)
    rough(LlamaForCausalLM(LlamaConfig(**shape))).save_pretrained(folder / "model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "model")
    (folder / "one.calibration.txt").write_text(english()[:6000], encoding="utf-8")
    (folder / "one.evaluation.txt").write_text(english()[6000:9000], encoding="utf-8")
    (folder / "two.evaluation.txt").write_text(english()[90_000:92_000], encoding="utf-8")
    return folder


def arguments(llama, out_dir, **keys):
    """The command's, of a folder with `model` and texts, or of `keys` alone."""
    if llama:
        keys = dict(init_from=llama / "model", calibration=llama / "one.calibration.txt") | keys
    keys = dict(out_dir=out_dir, evaluation=f"{llama}/*.evaluation.txt", block_size=32, device="cpu") | keys
    keys = dict(evaluation_tokens=512, calibration_windows=8, step_windows=4, batch_size=2) | keys
    keys = dict(distil_tokens=12 * 128, distil_learning_rate=1e-3) | keys
    keys = dict(finetune_tokens=11 * 128, finetune_learning_rate=1e-3) | keys
    return [f"--{key}={value}" for key, value in keys.items()]


UNTRAINED = dict(distil_tokens=0, finetune_tokens=0, arrange="as_is")


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    """The out_dir of a run that nothing has interrupted."""
    out_dir = tmp_path_factory.mktemp("whole") / "out"
    drop_syncs.main(arguments(llama, out_dir, drop=5))
    return out_dir


def test_the_trained_model_is_greedy_as_transformers(llama, tmp_path):
    """sample.py on the folder, in one process and in two, with the folder's tokenizer."""
    argv = [ROOT / "sample.py", f"--init_from={llama / 'model'}", "--start=The list", "--max_new_tokens=12"]
    argv += ["--temperature=0", "--device=cpu"]
    one = succeeded(run_script(argv, cwd=tmp_path))
    two = succeeded(run_script(["--", *argv], nproc=2, cwd=tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(llama / "model")
    theirs = LlamaForCausalLM.from_pretrained(llama / "model")
    idx = theirs.generate(**tokenizer("The list", return_tensors="pt"), max_new_tokens=12, do_sample=False)
    assert one == two == tokenizer.decode(idx[0]) + "\n---------------\n"


def test_the_result_is_exported_with_its_perplexities(whole, tmp_path, modules):
    assert status(export.main, [str(whole), f"--to={tmp_path / 'folder'}"]) in (None, 0)
    saved = ckpt.load(whole / "ckpt.pt")
    model = GPT(GPTConfig(**saved["model_args"])).eval()
    ckpt.restore(saved, model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", trust_remote_code=True)
    idx = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, model(idx, idx)[0], rtol=1e-4, atol=1e-5)
    log = read_drop_log(whole / "log.txt")
    *_, (_, syncs, most, perplexities) = log.perplexities
    card = (tmp_path / "folder/README.md").read_text()
    assert f"| syncs of a forward pass | {syncs} of {most} |" in card and f"one {perplexities['one']:.2f} (" in card
    assert f"{log.tokens['distil']:,} tokens block to block, {log.tokens['finetune']:,} tokens towards" in card


def test_every_stage_leaves_its_line(whole):
    log = read_drop_log(whole / "log.txt")
    stages = [("dense", 8, 8), ("dropped", 3, 8), ("distilled", 3, 8), ("finetuned", 3, 8)]
    assert [(stage, syncs, most) for stage, syncs, most, _ in log.perplexities] == stages
    assert all(values.keys() == {"one", "two"} for *_, values in log.perplexities)
    assert [layer for layer, *_ in log.sensitivities.pop("MLP")] == [0, 1, 2] and not log.sensitivities
    assert not (whole / "progress.pt").exists()


def test_training_brings_the_dropped_model_nearer_to_the_dense_one(whole):
    """Of random weights a perplexity means little: by the losses and agreements that the log has."""
    text = (whole / "log.txt").read_text()
    for stage in ("distil", "finetune"):
        first, *_, last = re.findall(rf"{stage}: step \d+ of \d+, loss (\S+), \d+ tokens/s", text)
        assert 0 < float(last) < float(first), stage
    found = re.findall(r"^agreement (one|two): KL (\S+), top-1 (\S+) %, greedy (\S+) of 8$", text, re.MULTILINE)
    assert [name for name, *_ in found] == ["one", "two"]
    assert all(float(kl) > 0 and 0 < float(same) < 100 for _, kl, same, _ in found)
    assert "| out | against dense | 3 of 8 | KL " in table_of({"out": read_drop_log(whole / "log.txt")})


def test_the_checkpoint_is_sampled_with_its_own_tokenizer(whole, capsys):
    sample.main([f"--out_dir={whole}", "--start=The list", "--max_new_tokens=8", "--temperature=0", "--device=cpu"])
    text = capsys.readouterr().out
    saved = ckpt.load(whole / "ckpt.pt")
    assert (
        "step" not in saved and saved["model_args"]["sync"] == saved["progress"]["sync"] and text.startswith("The list")
    )


@pytest.mark.parametrize("where", [("arrange", 2), ("distil", 3), ("finetune", 4)])
def test_resumed_equals_uninterrupted(llama, whole, tmp_path, monkeypatch, where):
    step_done = drop_syncs.Run.step_done

    def interrupted(run):
        if (run.progress.stage, run.progress.done + 1) == where:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_done(run)

    monkeypatch.setattr(drop_syncs.Run, "step_done", interrupted)
    assert_goes_on(llama, whole, tmp_path, monkeypatch)


@pytest.mark.parametrize("where", ["dense perplexity two", "drop sensitivity", "distil perplexity one", "report two"])
def test_a_stop_during_an_evaluation(llama, whole, tmp_path, monkeypatch, where):
    """Fault 20c: it was heard afterwards. Now the evaluation is made anew, and no step of the stage."""
    bar = drop_syncs.Run.bar

    def asking(run, total, what="", initial=0):
        if f"{run.progress.stage} {what}" == where:
            os.kill(os.getpid(), signal.SIGTERM)
        return bar(run, total, what, initial)

    monkeypatch.setattr(drop_syncs.Run, "bar", asking)
    assert_goes_on(llama, whole, tmp_path, monkeypatch)
    text = (tmp_path / "out/log.txt").read_text()
    assert text.count("distil: step 0 of") == text.count("finetune: step 0 of") == 1


def assert_goes_on(llama, whole, tmp_path, monkeypatch):
    """A run that is patched to stop saves; resumed, it ends as `whole`."""
    drop_syncs.main(arguments(llama, tmp_path / "out", drop=5))
    assert (tmp_path / "out/progress.pt").exists() and not (tmp_path / "out/ckpt.pt").exists()
    monkeypatch.undo()
    drop_syncs.main(arguments(llama, tmp_path / "out", drop=5, init_from="resume"))
    logs = [read_drop_log(folder / "log.txt") for folder in (whole, tmp_path / "out")]
    assert logs[0].perplexities == logs[1].perplexities and logs[0].agreements == logs[1].agreements
    ours, theirs = (ckpt.load(folder / "ckpt.pt")["model"] for folder in (tmp_path / "out", whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("keys", [dict(tp_size=2), dict(tp_size=1), dict(tp_size=1, batch_size=1)])
def test_two_ranks_do_what_one_does(llama, whole, tmp_path, keys):
    """As tensor-parallel ranks, or as two replicas; with other micro-batches, too."""
    succeeded(run_script([DROP, *arguments(llama, tmp_path / "out", drop=5, **keys)], nproc=2, cwd=tmp_path))
    logs = [read_drop_log(folder / "log.txt") for folder in (whole, tmp_path / "out")]
    for (stage, *_, ours), (other, *_, theirs) in zip(*(log.perplexities for log in logs), strict=True):
        assert stage == other and ours == pytest.approx(theirs, rel=1e-3)
    ours, theirs = (re.findall(r"KL ([\d.]+)", str(log.agreements)) for log in logs)
    assert len(ours) == 2 and list(map(float, ours)) == pytest.approx(list(map(float, theirs)), rel=0.02)


def test_a_model_of_ours_on_its_own_data(small_dataset, tmp_path):
    keys = dict(n_layer=2, n_head=4, n_embd=32, n_shard=1, block_size=32, batch_size=4, max_iters=4, warmup_iters=1)
    keys |= dict(gradient_accumulation_steps=1, eval_iters=2, dataset=small_dataset, device="cpu", bias=True)
    train_reduced_sync.main([f"--{key}={value}" for key, value in (keys | dict(out_dir=tmp_path / "base")).items()])
    keys = dict(calibration="", evaluation="", finetune_tokens=0, n_shard=4, evaluation_tokens=2048)
    drop_syncs.main(arguments(None, tmp_path / "out", **keys, init_from=tmp_path / "base"))
    log = read_drop_log(tmp_path / "out/log.txt")
    (_, syncs, most, dense), (*_, dropped) = log.perplexities[:2]
    assert (syncs, most) == (4, 4) and dense.keys() == {"val"} and dropped != dense
    base = weights.from_dense(*ours(tmp_path / "base/ckpt.pt", n_shard=4), None, "test")
    windows = texts.first_windows(Corpus(small_dataset, 32).splits["val"], 2048, 32, "val")
    loss = distillation.mean_loss(base, windows.split(8), LAYOUT)
    assert dense["val"] == pytest.approx(np.exp(loss), rel=1e-4)


def ours(path, n_shard):
    """The GPTConfig with all syncs and the dense tensors of a checkpoint."""
    saved = ckpt.load(path)
    config = GPTConfig(**saved["model_args"])
    dense = weights.shards_to_dense(saved["model"], config)
    return dataclasses.replace(config, n_shard=n_shard), dense.items()


# --- the parts


def model(n_kv_head=4, n_shard=2):
    torch.manual_seed(1)
    return rough(GPT(dataclasses.replace(SMALL, n_kv_head=n_kv_head, n_shard=n_shard)))


def windows(B=6, T=16):
    return torch.randint(256, (B, T), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("n_kv_head, n_shard", [(4, 2), (8, 4), (2, 4)])
def test_arranging_leaves_the_dense_function(n_kv_head, n_shard):
    whole = model(n_kv_head, 1)  # of which the shards are cut, so that copies are equal
    dense = weights.shards_to_dense({name: p.detach() for name, p in whole.named_parameters()}, whole.config)
    config = dataclasses.replace(whole.config, n_shard=n_shard)
    base = weights.from_dense(config, dense.items(), None, "test").double()
    expected, dropped = base(windows(), windows())[0], base.with_sync("1111")(windows(), windows())[0]
    generator = torch.Generator().manual_seed(3)
    for i in range(4):
        groups = torch.randperm(n_kv_head, generator=generator).tolist() if n_kv_head >= n_shard else [0, 1]
        neurons = torch.randperm(96, generator=generator).tolist()
        tensors = placement.permuted(placement.dense_block(base, i), base.config, groups, neurons)
        placement.set_dense_block(base, i, tensors)
    torch.testing.assert_close(base(windows(), windows())[0], expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(base.with_sync("1111")(windows(), windows())[0], dropped, rtol=1e-3)


def test_affinity_finds_neurons_that_were_shuffled():
    """Shards that see one half of the stream each, and neurons that read one half each."""
    base = model()
    block = base.transformer.h[0]
    with torch.no_grad():
        block.attn.c_proj.weight[0, :, 16:] = 0  # shard 0's attention writes to the first half
        block.attn.c_proj.weight[1, :, :16] = 0
        for layer in (block.mlp.c_fc, block.mlp.c_gate):
            layer.weight[0, :, 16:] = 0  # and its neurons read that half
            layer.weight[1, :, :16] = 0
    everywhere, groups = list(range(96)), [0, 1, 2, 3]
    dense = placement.dense_block(base, 0)
    shuffled = placement.permuted(
        dense, base.config, groups, torch.randperm(96, generator=torch.Generator().manual_seed(5)).tolist()
    )
    x = base.embed(windows())
    rope = base.rope_cos_sin(x.size(1))
    found = placement.place_neurons(shuffled, base.config, [x.detach()], rope, LAYOUT)
    assert sorted(found) == everywhere
    errors = []
    for tensors in (dense, shuffled, placement.permuted(shuffled, base.config, groups, found)):
        placement.set_dense_block(base, 0, tensors)
        with torch.no_grad():
            exact, dropped = (base.with_sync(sync).run_blocks(x, range(1)) for sync in ("baseline", "spd"))
        errors.append(distillation.relative_error(dropped, exact).item())
    made, mixed, arranged = errors
    assert arranged < made < mixed, errors


def arrange_on_a_rank(rank):
    """Rank 1 finds everything the other way round."""
    if rank == 1:
        for name in ("place_groups", "place_neurons"):
            order_of = getattr(placement, name)
            setattr(placement, name, lambda *arguments, order_of=order_of: order_of(*arguments)[::-1])
    torch.manual_seed(1)
    base = GPT(SMALL, dist.group.WORLD)
    found = placement.arrange(base, 0, [base.embed(windows()).detach()], "affinity", LAYOUT)
    everywhere = [None, None]
    dist.all_gather_object(everywhere, found)
    assert everywhere[0] == everywhere[1]


def test_all_ranks_take_one_order():
    """A rounding error may change what a rank finds; the shards would then be those of two orders."""
    run_ranks(2, arrange_on_a_rank)


@pytest.mark.parametrize("by", ["affinity", "scatter"])
def test_places_of_groups_are_the_best_of_all_pairs(by):
    """Four groups on two shards have three partitions: the one that is found has the least cost of the three."""
    base = model()
    dense = placement.dense_block(base, 0)
    x, rope = base.embed(windows()).detach(), base.rope_cos_sin(windows().size(1))
    order = placement.place_groups(dense, base.config, [x], rope, by, LAYOUT)
    assert sorted(order) == [0, 1, 2, 3]
    groups = placement.whole_block(dense, dataclasses.replace(base.config, n_shard=4), "cpu")
    y = groups.attn(groups.ln_1(x), rope).detach()  # (4, B, T, C)
    y = (y / (x + y.sum(0)).norm(dim=-1, keepdim=True)).flatten(1).double()

    def cost(shards):
        if by == "affinity":  # what each shard does not see
            return sum(y[[g for g in range(4) if g not in shard]].sum(0).square().sum().item() for shard in shards)
        pairs = [(a, b) for shard in shards for a in shard for b in shard]
        return sum(torch.nn.functional.cosine_similarity(y[a], y[b], dim=0).abs().item() for a, b in pairs)

    partitions = [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))]
    found = cost((tuple(order[:2]), tuple(order[2:])))
    assert found == pytest.approx(min(map(cost, partitions)), rel=1e-5)


@pytest.mark.parametrize("by", ["affinity", "scatter"])
def test_arranging_what_is_not_divisible_or_does_nothing(by):
    """Neurons that as many shards as groups cannot share; a head and an MLP of zeros, as in layers that were added."""
    torch.manual_seed(1)
    base = rough(GPT(dataclasses.replace(SMALL, n_hidden=98)))
    with torch.no_grad():
        base.transformer.h[0].attn.c_proj.weight[0, :8] = 0
        base.transformer.h[0].mlp.c_proj.weight[:] = 0
    groups, neurons = placement.arrange(base, 0, [base.embed(windows()).detach()], by, LAYOUT)
    assert sorted(groups) == [0, 1, 2, 3] and sorted(neurons) == list(range(98))


def test_a_replica_without_windows_has_no_batch():
    """It had an empty one, in which attention fails."""
    layout = Layout(torch.device("cpu"), torch.float32, dp_size=2, dp_rank=1)
    run = SimpleNamespace(layout=layout, config=drop_syncs.Config(batch_size=2), stop=SimpleNamespace(agreed=False))
    run.bar = lambda total, what: drop_syncs.tqdm(total=total, disable=True)
    assert list(drop_syncs.Run.batches(run, windows(B=1), "x")) == []


@pytest.mark.parametrize("kept, dropped", [("2222", "1111"), ("1111", "0001")])
def test_sensitivities_are_those_of_whole_models(kept, dropped):
    base, n = model(), 3 + (kept == "2222")
    s, perplexities = distillation.sensitivities(base.with_sync(kept), dropped, windows().split(4), LAYOUT)
    assert len(s) == n and len(perplexities) == n + 1
    for i in range(n + 1):
        one = base.with_sync(kept[:i] + dropped[i:])
        loss = one(windows()[:, :-1], windows()[:, 1:])[1].item()
        assert perplexities[i] == pytest.approx(np.exp(loss), rel=1e-4)
    assert s == pytest.approx([perplexities[i] - perplexities[i + 1] for i in range(n)])


@pytest.mark.parametrize(
    "pattern, groups",
    [
        ("2222", []),
        ("1111", [[0], [1], [2], [3]]),
        ("2121", [[1], [3]]),
        ("2a02", [[1, 2, 3]]),
        ("0102", [[0, 1], [2, 3]]),
    ],
)
def test_groups_end_with_the_syncs_between_layers(pattern, groups):
    assert list(map(list, distillation.changed_groups(pattern))) == groups


@pytest.mark.parametrize("pattern", ["2121", "0102", "2a12"])
def test_errors_of_groups_are_those_of_whole_models(pattern):
    """A group is the only one that is dropped in a model whose other layers have all syncs; gradients stay in it."""
    teacher, student = model().eval(), model().with_sync(pattern).eval()
    with torch.no_grad():
        for p in student.transformer.h.parameters():
            p.mul_(1.01)
    groups = distillation.changed_groups(pattern)
    errors = distillation.group_errors(student, teacher, windows(), LAYOUT)
    for layers, error in zip(groups, errors, strict=True):
        error.backward()
        trained = {name for name, p in student.named_parameters() if p.grad is not None}
        assert trained == {name for name, _ in distillation.part_of(student, layers).named_parameters()}
        student.zero_grad()
        with torch.no_grad():
            x = teacher.run_blocks(teacher.embed(windows()), range(layers.start))
            exact, found = (one.run_blocks(x, layers) for one in (teacher, student))
        expected = ((found - exact).norm(dim=-1) ** 2 / exact.norm(dim=-1) ** 2).mean()
        assert error.item() == pytest.approx(expected.item(), rel=1e-4) and error > 0


@pytest.mark.parametrize("compile", [False, True])
def test_the_divergence_of_finetuning_and_its_gradients(monkeypatch, compile):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))  # no C++
    base = model().eval()
    one = base.with_sync("1111")
    (loss,) = distillation.divergences(compile)(one, base, windows(), LAYOUT)
    loss.backward()
    p, q = (each(windows(), windows())[0].softmax(-1) for each in (base, one))
    expected = (p.detach() * (p.detach() / q).log()).sum(-1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3) and loss > 0
    for found, exact in zip(base.parameters(), torch.autograd.grad(expected, base.parameters()), strict=True):
        torch.testing.assert_close(found.grad, exact, rtol=1e-3, atol=1e-6)


def test_agreement_and_greedy_text_against_plain_computations():
    base = model().eval()
    one = base.with_sync("1111")
    kl, same = quality.agreement(one, base, windows().split(4), LAYOUT)
    p, q = (each(windows(), windows())[0].flatten(0, 1).double().softmax(-1) for each in (base, one))
    assert kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-3)
    assert same == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    prompts = quality.prompts_of(windows(20), n=4)
    assert torch.equal(prompts, windows(20)[[0, 5, 10, 15], :8])
    lengths = []
    for prompt in prompts:
        texts = []
        for each in (base, one):
            ids = prompt[None]
            for _ in range(quality.CONTINUED):
                ids = torch.cat((ids, each(ids[:, -32:])[0][:, -1:].argmax(-1)), 1)
            texts.append(ids[0, 8:])
        lengths.append(next((i for i in range(8) if texts[0][i] != texts[1][i]), 8))
    assert quality.agreed_length(one, base, prompts.split(3), LAYOUT) == sum(lengths) / 4
    assert quality.agreed_length(base, base, prompts.split(3), LAYOUT) == 8


@pytest.mark.parametrize("drop, pattern", [(0, "2222"), (4, "1111"), (None, "1111"), (7, "0001")])
def test_what_needs_no_order_is_not_measured(llama, tmp_path, drop, pattern):
    """Fault 11: 0 meant that it was not given, and every block was dropped."""
    drop_syncs.main(arguments(llama, tmp_path / "out", **UNTRAINED, drop=drop))
    assert ckpt.load(tmp_path / "out/ckpt.pt")["model_args"]["sync"] == str(SyncRule(pattern))
    log = read_drop_log(tmp_path / "out/log.txt")
    assert not log.sensitivities and bool(log.agreements) == (pattern != "2222")


@pytest.mark.parametrize("drop", [1, 3, 6])
def test_the_least_sensitive_are_dropped_first(llama, tmp_path, drop):
    drop_syncs.main(arguments(llama, tmp_path / "out", **UNTRAINED, drop=drop))
    log = read_drop_log(tmp_path / "out/log.txt")
    sublayer, kept, dropped, n = ("attention", "2", "1", drop) if drop < 4 else ("MLP", "1", "0", drop - 4)
    ((found, measured),) = log.sensitivities.items()
    assert found == sublayer
    first = [layer for _, layer in sorted((s, layer) for layer, s, _ in measured)[:n]]
    pattern = "".join(dropped if i in first else kept for i in range(4))
    assert ckpt.load(tmp_path / "out/ckpt.pt")["model_args"]["sync"] == str(SyncRule(pattern))


def test_a_sensitivity_that_is_no_number_is_the_highest(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "sensitivities", lambda *_: ([0.5, math.nan, 0.1, 0.2], [1.0] * 5))
    drop_syncs.main(arguments(llama, tmp_path / "out", **UNTRAINED, drop=2))
    assert ckpt.load(tmp_path / "out/ckpt.pt")["model_args"]["sync"] == "2211"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_trains_in_half_precision(llama, tmp_path, dtype):
    drop_syncs.main(arguments(llama, tmp_path / "out", sync="a011", dtype=dtype))
    assert all(t.dtype == torch.float32 for t in ckpt.load(tmp_path / "out/ckpt.pt")["model"].values())
    assert len(read_drop_log(tmp_path / "out/log.txt").agreements) == 2


def test_a_loss_that_is_no_number_ends_the_run(llama, tmp_path, capsys):
    argv = arguments(llama, tmp_path / "out", distil_learning_rate=1e18)
    assert status(drop_syncs.main, argv) == 1
    error = capsys.readouterr().err
    assert re.search(r"error: distil: step \d+: loss .*: lower distil_learning_rate\n$", error), error


def test_a_models_own_data_is_not_that_of_a_dropped_one(llama, tmp_path, capsys):
    drop_syncs.main(arguments(llama, tmp_path / "out", **UNTRAINED, drop=0))
    argv = arguments(None, tmp_path / "more", init_from=tmp_path / "out", calibration="")
    assert status(drop_syncs.main, argv) == 1
    assert capsys.readouterr().err.endswith("error: calibration is empty: it must name text files\n")


# --- texts and their names

STRANGE = ["a, b 2", "a|b", "new\nline", 'qu"ote\\', "größe", "perplexity x: 1 of 2 syncs, y 3.0", "\udcff"]


@pytest.mark.parametrize("name", STRANGE, ids=ascii)
def test_a_name_breaks_no_line_of_the_log(tmp_path, name):
    """Fault 13: such a run did all its work and then failed on its own log."""
    log, values = RunLog(tmp_path / "log.txt"), {"plain": 2.5, name: 3.25, "other": math.inf}
    log.header({"model": name, "config": {"out_dir": name}})
    for stage in ("dense", "dropped"):
        log.line(perplexity_line(stage, 8, 8, values))
    log.line(agreement_line(name, 0.5, 0.25, 3.0, 64))
    found = read_drop_log(tmp_path / "log.txt")
    assert found.agreements == {name: "KL 0.5000, top-1 25.00 %, greedy 3.0 of 64"}
    assert found.perplexities == [("dense", 8, 8, values), ("dropped", 8, 8, values)]
    assert found.config == {"out_dir": name} and (tmp_path / "log.txt").read_bytes().count(b"\n") == 5
    table = table_of({name: found}).split("\n")
    assert len(table) == 5 and {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {7}


def test_a_table_of_runs_with_other_texts():
    """Cells stood under the first run's texts, whichever they were of."""
    a, b = DropLog(), DropLog()
    a.perplexities = [("dense", 4, 4, {"manual": 10.0, "poems": 20.0})]
    b.perplexities = [("dense", 4, 4, {"poems": 20.0}), ("dropped", 2, 4, {"poems": 22.0})]
    assert table_of({"a": a, "b": b}).split("\n")[-1] == "| b | dropped | 2 of 4 |  | 22.00 (+10.0 %) |"


def test_lines_of_older_logs_with_such_names(tmp_path):
    """Fault 13: as those runs left them."""
    line = "perplexity dense: 8 of 8 syncs, a, b 2 25.100, c d 4.250, val nan\n"
    (tmp_path / "log.txt").write_text(line)
    ((*_, found),) = read_drop_log(tmp_path / "log.txt").perplexities
    assert str(found) == "{'a, b 2': 25.1, 'c d': 4.25, 'val': nan}"
    (tmp_path / "log.txt").write_text(line.replace("nan", "2# resumed"))
    with pytest.raises(ValueError, match=r"log.txt: not a line of drop_syncs.py's log: 'perplexity dense"):
        read_drop_log(tmp_path / "log.txt")
    for damaged in ('# config: {"a": ', "sensitivity: block 3 0.1x, perplexity 24.6"):
        (tmp_path / "log.txt").write_text(damaged + "\n")
        with pytest.raises(ValueError, match=r"log.txt: not a line of drop_syncs.py's log"):
            read_drop_log(tmp_path / "log.txt")


def test_a_run_whose_names_are_strange(llama, tmp_path, capsys):
    """Fault 13: to its end, and exported. Faults 12, 14: texts of one name, and one that is in both roles."""
    out_dir = tmp_path / "out | |\nof ours"
    for name in ("a, b 2.txt", "a, b 2.more.txt", "x|y.txt"):
        (tmp_path / name).write_text(english()[6000:9000] + name, encoding="utf-8")
    same = (llama / "one.calibration.txt").read_text(encoding="utf-8")[50:] + "and more"
    (tmp_path / "same.txt").write_text(same, encoding="utf-8")
    drop_syncs.main(arguments(llama, out_dir, evaluation=f"{tmp_path}/*.txt", **UNTRAINED))
    said = capsys.readouterr().out
    log = read_drop_log(out_dir / "log.txt")
    assert [set(texts) for *_, texts in log.perplexities] == 2 * [
        {"a, b 2.txt", "a, b 2.more.txt", "x|y.txt", "same.txt"}
    ]
    warning = "warning: evaluation text 'same.txt' begins in calibration text 'one': not held out\n"
    assert said.count("warning") == 1 and warning in said and warning in (out_dir / "log.txt").read_text()
    assert "| out \\| \\| of ours | dense |" in said
    folder = tmp_path / 'fold"er'
    assert status(export.main, [str(out_dir), f"--to={folder}"]) == 0
    card = (folder / "README.md").read_text()
    assert "x\\|y.txt" in card and r'from_pretrained("fold\"er"' in card


def test_texts_of_one_name_are_told_apart(llama, tmp_path):
    """Fault 12: only the last of them was used."""
    source = Source(str(llama / "model"))
    for name in ("a/text.txt", "b/text.txt", "part.1.txt", "part.2.txt", ".hidden.txt", "one.calibration.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def found(pattern):
        named = texts.read_texts(f"{tmp_path}/{pattern}", source.tokens, "evaluation")
        return {name: source.tokens.decode(ids) for name, ids in named.items()}

    assert found("*/text.txt") == {f"{tmp_path}/{x}/text.txt": f"{x}/text.txt" for x in "ab"}
    assert found("part*") == {"part.1.txt": "part.1.txt", "part.2.txt": "part.2.txt"}
    assert found(".hidden.txt") == {".hidden.txt": ".hidden.txt"}
    assert found("one*") == {"one": "one.calibration.txt"}


# --- mistakes


@pytest.mark.parametrize(
    "keys, words",
    [
        (dict(init_from=""), "init_from is empty"),
        (dict(init_from="/no/such/model"), "init_from='/no/such/model'"),
        (dict(init_from="resume"), "no checkpoint"),
        (dict(n_shard=1), "n_shard=1 has no syncs to drop"),
        (dict(n_shard=3), "n_head=8 is not divisible by n_shard=3"),
        (dict(tp_size=2), "tp_size=2"),
        (dict(calibration="/no/such/text.txt"), "calibration='/no/such/text.txt': there is no such file"),
        (dict(calibration=""), "calibration is empty"),
        (dict(calibration_windows=5000), "calibration_windows: one has 6008 tokens; 5000 windows of 32 need 160000"),
        (dict(block_size=64), "block_size=64 is above the 32 positions"),
        (dict(drop=8), "drop=8: of the model's 8 syncs all but the last, 7, can be dropped"),
        (dict(drop=0, sync="spd"), "alternatives"),
        (dict(sync=""), "sync='': allowed are baseline"),
        (dict(evaluation_tokens=31), "evaluation_tokens=31 is less than a window, block_size=32"),
        (dict(sync="111a"), "the last layer must end in a sync"),
        (dict(sync="spd+desync"), "sync='spd+desync': syncs can be dropped afterwards, but not made +desync"),
        (dict(arrange="best"), "allowed are as_is, affinity, scatter"),
        (dict(device="tpu"), "device='tpu'"),
    ],
)
def test_mistakes_end_with_one_line(llama, tmp_path, capsys, keys, words):
    assert status(drop_syncs.main, arguments(llama, tmp_path / "out", **keys)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["calibration", "evaluation"])
def test_a_text_that_is_too_short(llama, tmp_path, capsys, key):
    (tmp_path / "short.txt").write_text("too short")
    assert status(drop_syncs.main, arguments(llama, tmp_path / "out", **{key: tmp_path / "short.txt"})) == 1
    assert f"the {key} text short has 9 tokens, less than a window of 32" in capsys.readouterr().err


def test_an_empty_out_dir_is_not_this_folder(tmp_path, monkeypatch, capsys):
    """Fault 11: the log of the folder that the command was started in would have been removed."""
    monkeypatch.chdir(tmp_path)
    assert status(drop_syncs.main, ["--out_dir=", "--init_from=gpt2"]) == 1
    assert "error: out_dir is empty" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["one.calibration.txt", "two.evaluation.txt", "model/model.safetensors"])
def test_a_run_goes_on_with_the_same_texts_and_weights(llama, tmp_path, capsys, monkeypatch, name):
    """Otherwise the table had the perplexities of the old text beside those of the new."""
    folder, out_dir = tmp_path / "llama", tmp_path / "out"
    shutil.copytree(llama, folder)
    with monkeypatch.context() as patch:
        patch.setattr(drop_syncs.Run, "evaluate", lambda run, *_: (run.save(), setattr(run.stop, "agreed", True)))
        patch.setitem(drop_syncs.STAGES, "arrange", lambda run: (_ for _ in ()).throw(drop_syncs.Stopped))
        drop_syncs.main(arguments(folder, out_dir))
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-4] + b"more")
    assert status(drop_syncs.main, arguments(folder, out_dir, init_from="resume")) == 1
    changed = {"one": "calibration text one", "two": "evaluation text two"}.get(name[:3], "model.safetensors")
    line = f"{out_dir} was started with other content of {changed}: choose another out_dir\n"
    assert capsys.readouterr().err.endswith(f"error: {line}")


def test_an_out_dir_is_used_once_and_resumed_with_the_same_keys(llama, whole, tmp_path, capsys):
    assert status(drop_syncs.main, arguments(llama, whole)) == 1
    assert "holds a run already" in capsys.readouterr().err
    assert status(drop_syncs.main, arguments(llama, whole, init_from="resume")) == 1
    assert capsys.readouterr().err == f"error: {whole} has finished: nothing to do\n"
    saved = {key: {} for key in ("progress", "inputs", "model", "optimizer")}
    saved["config"] = dataclasses.asdict(drop_syncs.Config())
    torch.save(saved, tmp_path / "progress.pt")
    one_line_error(run_script([DROP, *arguments(llama, tmp_path, init_from="resume")]), "was started with")
    same = configure(drop_syncs.Config, arguments(llama, tmp_path))
    saved["config"] = dataclasses.asdict(same) | dict(dtype="bfloat16")  # on a GPU, where None came to that
    torch.save(saved, tmp_path / "progress.pt")
    assert status(drop_syncs.main, arguments(llama, tmp_path, init_from="resume")) == 1
    assert "was started with dtype='bfloat16', not 'float32': go on" in capsys.readouterr().err
    capsys.readouterr()
    del saved["config"]["calibration_windows"]  # of another version
    torch.save(saved, tmp_path / "progress.pt")
    assert status(drop_syncs.main, [f"--out_dir={tmp_path}", "--init_from=resume"]) == 1
    assert "progress.pt was written by another version: choose another out_dir" in capsys.readouterr().err
