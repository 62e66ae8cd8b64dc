"""bench.py on a tiny model, its rival cut by PyTorch, the cost model, and the recorded measurement."""

import json
import math
import statistics
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from launch import ROOT, one_line_error, run_script, status, succeeded
from spawn import run_ranks
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

import bench
from reduced_sync import latency
from reduced_sync.accelerators import ACCELERATORS
from reduced_sync.decode_timing import tensor_parallel_gpt2
from reduced_sync_model import GPT, GPTConfig, KVCache, count_syncs

pytestmark = pytest.mark.timeout(200)
BENCH = ROOT / "bench.py"
TINY = "--n_layer=2 --n_head=2 --n_embd=32 --vocab_size=64 --block_size=32 --device=cpu --rounds=2 --launches=1".split()


def finite(tree):
    """Whether there are numbers in a JSON tree, and all are finite."""
    if isinstance(tree, dict | list):
        return all(map(finite, tree.values() if isinstance(tree, dict) else tree))
    return not isinstance(tree, float) or math.isfinite(tree)


def test_decode(tmp_path):
    patterns, lengths = ["baseline", "spd", "grouped:2"], ["--batch_sizes", "1", "2", "--prompts", "5", "9"]
    files = [f"--json={tmp_path}/decode.json", f"--png={tmp_path}/decode.png"]
    begin = time.monotonic()
    out = succeeded(run_script([BENCH, "decode", *patterns, *TINY, *lengths, "--new_tokens=4", *files], timeout=180))
    seconds = time.monotonic() - begin
    table = json.loads((tmp_path / "decode.json").read_text())
    assert table["settings"]["command"] == "decode" and finite(table)
    cases = {(case["tp_size"], case["batch_size"], case["prompt"]): case for case in table["results"]}
    assert set(cases) == {(tp_size, B, T) for tp_size in (1, 2) for B in (1, 2) for T in (5, 9)}
    for (tp_size, B, T), case in cases.items():
        in_the_middle = latency.bytes_read(latency.Shape(2, 32, 64), tp_size, B, T + 2)
        assert case["bound_s"] * case["stream"] == pytest.approx(in_the_middle)
        seconds -= case["rival_ttft_s"] + 4 * case["rival_tpot_s"]
        assert [row["syncs"] for row in case["patterns"]] == [4, 2, 1]
        link = case["link"] and latency.Link(**case["link"])
        first, *_, last = case["patterns"]
        for figure, tokens in (("ttft", T), ("tpot", 1)):  # the cost model: they differ by three all-reduces
            sent = 3 * link.all_reduce(4 * B * tokens * 32, tp_size) if link else 0
            assert first[f"model_{figure}_s"] - last[f"model_{figure}_s"] == pytest.approx(sent)
        for row in case["patterns"]:
            seconds -= row["ttft_s"] + 4 * row["tpot_s"]
            assert row["ttft_s"] > 0 and row["tpot_s"] > 0
            assert row["all_reduces"] == (row["syncs"] if tp_size > 1 else 0)
            if tp_size > 1:
                assert (row["bytes"], row["prefill_bytes"]) == (4 * B * 32, 4 * B * T * 32)
                assert 0 < row["in_all_reduces_s"] < row["tpot_s"] and row["silent_tpot_s"] < row["tpot_s"]
                assert row["line_s"] == pytest.approx(case["compute_s"] + row["syncs"] * case["all_reduce_s"])
                fitted = case["fit_compute_s"] + row["syncs"] * case["fit_all_reduce_s"]
                assert row["tpot_s"] == pytest.approx(fitted + row["residual_s"])
    assert seconds > 0  # the process took longer than one round of all that it has timed
    assert out.count("tp_size 2, batch 2, prompt 9") == 1 and out.count("grouped:2") == 8
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


def test_train(tmp_path):
    argv = ["train", "gpt2", "spd@2", *TINY, "--mode=eager", f"--json={tmp_path}/train.json"]
    out = succeeded(run_script([BENCH, *argv], timeout=120))
    results = json.loads((tmp_path / "train.json").read_text())["results"]
    assert [row["candidate"] for row in results] == ["gpt2", "spd@2"] and finite(results)
    for row in results:
        assert len(row["rounds_s"]) == 2
        assert row["tokens_per_s"] == pytest.approx(4 * 32 / statistics.median(row["rounds_s"]))
        assert 100e6 < row["peak_bytes"] < 10e9  # a process with torch in it
        for ratio, figure in (("speed_ratio", "tokens_per_s"), ("memory_ratio", "peak_bytes")):
            assert row[ratio] == pytest.approx(row[figure] / results[0][figure])
    assert len(out.splitlines()) == 2


def test_the_figures_of_a_case():
    """Medians over rounds and tokens, of the slower rank; the prefill's all-reduces are not a token's."""
    case = ("spd", True, 1, 5)
    calls = [(640, 9.0), (640, 9.0), (128, 0.01), (128, 0.03), (128, 0.02), (128, 0.04)]  # two in a forward pass
    times = [[(1.0, [0.1, 0.2]), (3.0, [0.3, 0.1])], [(2.0, [0.2, 0.2]), (1.0, [0.3, 0.5])]]  # [round][rank]
    rounds = [[({case: (ttft, steps, calls)}, None) for ttft, steps in ranks] for ranks in times]
    found = bench.summarize(rounds, case, n_forwards=3)
    assert found.pop("in_all_reduces_s") == pytest.approx(0.05)
    assert found == {"ttft_s": 2.0, "tpot_s": 0.3, "all_reduces": 2, "bytes": 128, "prefill_bytes": 640}


def test_the_link_that_was_measured_takes_the_times_that_were_measured():
    B, T, args = 2, 5, bench.Decode(n_embd=32)
    found = {"stream": 7.0, ("bandwidth", B): 3.0, ("peak", B, T): 4.0, ("overhead", B): 5.0}
    found |= {("all_reduce", B, 1): 1e-5, ("all_reduce", B, T): 1.5e-5}
    slow = {key: 100 * value for key, value in found.items()}
    stream, accelerator, link = bench.constants_of([[({}, found), ({}, found)], [({}, found), ({}, slow)]], B, T, args)
    assert (stream, accelerator.bandwidth, accelerator.peak, accelerator.overhead) == (7.0, 3.0, 4.0, 5.0)
    assert [link.all_reduce(4 * B * t * 32, 2) for t in (1, T)] == pytest.approx([1e-5, 1.5e-5])
    assert bench.constants_of([[({}, found)]], B, T, args)[2] is None


def test_predict(tmp_path, capsys):
    shape = ["--n_layer=12", "--n_embd=768", f"--json={tmp_path}/predict.json"]
    assert status(bench.main, ["predict", "baseline", "grouped:3", "--links", "nvlink", "10gbe", *shape]) == 0
    out = capsys.readouterr().out
    assert out.startswith("PREDICTED, not measured: h100, tp_size 8") and "sglang#22734" in out
    rows = json.loads((tmp_path / "predict.json").read_text())["results"]
    assert all(row["predicted"] for row in rows) and finite(rows)
    tpot = {(row["link"], row["syncs"]): row["tpot_s"] for row in rows}
    per_sync = {link: (tpot[link, 24] - tpot[link, 4]) / 20 for link in ("nvlink", "10gbe")}
    assert per_sync["nvlink"] == pytest.approx(15.03e-6, rel=1e-3)  # 6.6 + 14 x 0.6 us, and 3 KiB
    assert per_sync["10gbe"] == pytest.approx(14 * (40e-6 + 384 / 1.25e9))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["decode", "--tp_sizes", "3"], ["tp_size=3 must divide n_shard=2"]),
        (["decode", "--prompts", "250"], ["prompts of 250 and 16 new tokens exceed --block_size"]),
        (["decode", "1111"], ["sync_pattern='1111' has 4 characters; it needs n_layer=12"]),
        (["decode", "grouped:5"], ["layers_per_group=5 does not divide n_layer=12"]),
        (["decode", "--tp_sizes", "1", "--png=x.png"], ["--png", "tp_size 2 or more"]),
        (["train", "spd"], ["'spd': a candidate is gpt2 or VARIANT@N_SHARD"]),
        (["train", "--dtype=float8"], ["dtype='float8'"]),
        (["predict", "--json=/nowhere/x.json"], ["No such file or directory"]),
    ],
)
def test_mistakes_are_one_line(argv, words):
    process = run_script([BENCH, *argv])
    one_line_error(process, *words)


def assert_against_dense(rank):
    torch.manual_seed(0)
    shape = dict(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    dense = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    idx = torch.randint(64, (2, 9))
    with torch.no_grad():
        expected = dense(idx).logits
        parallel = tensor_parallel_gpt2(dense, 2, "cpu")
        assert parallel.transformer.h[0].mlp.c_fc.weight.to_local().shape == (64, 32)
        torch.testing.assert_close(parallel(idx).logits, expected, rtol=1e-4, atol=1e-5)
        generated = parallel.generate(idx, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert generated.shape == (2, 14)
    dist.barrier()


def test_the_rival_is_gpt2_in_two():
    run_ranks(2, assert_against_dense)


# --- the cost model


def test_bytes_are_those_of_the_model():
    shape, B, context = latency.Shape(4, 32, 64), 3, 10
    model = GPT(GPTConfig(block_size=context, vocab_size=64, n_layer=4, n_head=4, n_embd=32, bias=False, n_shard=4))
    for tp_size in (1, 2, 4):
        matrices = [p for n, p in model.named_parameters() if "c_" in n]
        cache = KVCache(model, B).layers
        parts = sum(p.nbytes for p in matrices) + sum(t.nbytes for pair in cache for t in pair)
        expected = parts / tp_size + model.lm_head.weight.nbytes
        assert latency.bytes_read(shape, tp_size, B, context) == expected


@pytest.mark.parametrize("T", [1, 12])
def test_flops_are_those_of_the_model(T):
    """As PyTorch's counter has them; it does not know a causal attention, so that part is reckoned apart."""
    B, L, C = 2, 4, 32
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=L, n_head=4, n_embd=C, bias=False, n_shard=2))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(B, T, dtype=torch.long))
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    attention = B * L * sum(4 * C * seen for seen in range(1, T + 1))
    assert latency.flops(latency.Shape(L, C, 64), 1, B, T, T) == counted + attention


def test_fit_finds_the_line():
    compute, all_reduce, residuals = latency.fit([24, 12, 4], [5 + 24 * 0.5, 5 + 12 * 0.5, 5 + 4 * 0.5])
    assert (compute, all_reduce) == (pytest.approx(5), pytest.approx(0.5)) and max(map(abs, residuals)) < 1e-9


def test_links():
    link = latency.Link(base=1e-6, step=2e-6, bandwidth=1e9)
    assert link.all_reduce(1000, 1) == 0
    assert link.all_reduce(1000, 2) == pytest.approx(1e-6 + 2 * (2e-6 + 0.5e-6))
    for one in latency.LINKS.values():
        assert one.source and 0 < one.all_reduce(3072, 2) < one.all_reduce(3072, 8) < one.all_reduce(2**20, 8)


@pytest.mark.parametrize(("tp_size", "published"), [(2, 1.08), (4, 1.16), (8, 1.43)])
def test_published_no_communication_bounds(tp_size, published):
    """Ladder residual (arXiv 2501.06589): a 70B model on H100 with NVLink, batch 1, against no communication at all."""
    shape = latency.Shape(n_layer=80, n_embd=8192, vocab_size=32000, itemsize=2)
    tpot = partial(latency.forward_seconds, shape, ACCELERATORS["H100"], latency.LINKS["nvlink"], tp_size)
    assert tpot(160, 1, 1, 1024) / tpot(0, 1, 1, 1024) == pytest.approx(published, rel=0.03)


# --- the recorded measurement


RECORDED = ROOT / "results" / "decode"
DOCUMENTS = ("EXPERIMENT_SUMMARY", "TRAINING_INSTRUCTIONS")


def test_recorded_measurement(capsys):
    """The limits that it keeps, and what EXPERIMENT_SUMMARY.md says of it."""
    results = [one for name in ("one", "two") for one in json.loads((RECORDED / f"{name}.json").read_text())["results"]]
    cases = {(case["tp_size"], case["batch_size"]): case for case in results}
    one, two = cases[1, 1], cases[2, 1]
    assert (
        one["rival_tpot_s"] / one["compiled_tpot_s"] >= 1.3 and one["compiled_bound_s"] / one["compiled_tpot_s"] >= 0.7
    )
    assert two["patterns"][0]["pattern"] == "2" * 12 and two["patterns"][0]["tpot_s"] <= two["rival_tpot_s"]
    for row in two["patterns"]:
        assert row["all_reduces"] == row["syncs"] == count_syncs(row["pattern"])
    near = sum(row["line_s"] == pytest.approx(row["tpot_s"], rel=0.10) for row in two["patterns"])
    rows = [row for case in cases.values() for row in case["patterns"]]
    good = sum(row["model_tpot_s"] == pytest.approx(row["tpot_s"], rel=0.15) for row in rows)
    good_ttft = sum(row["model_ttft_s"] == pytest.approx(row["ttft_s"], rel=0.15) for row in rows)
    saved = 100 * (1 - one["compiled_tpot_s"] / one["patterns"][0]["tpot_s"])
    summary, instructions = (" ".join((ROOT / f"{name}.md").read_text().split()) for name in DOCUMENTS)
    assert f"{near} of 8 patterns are within 10 %" in summary
    assert good >= 12 and f"TPOT within 15 % in {good} of {len(rows)} configurations, TTFT in {good_ttft}" in summary
    assert all(f"{saved:.0f} % off each token" in document for document in (summary, instructions))
    for case in results:
        bench.print_case(case)
    assert capsys.readouterr().out == "".join((RECORDED / f"{name}.txt").read_text() for name in ("one", "two"))


def test_recorded_prediction(capsys):
    assert status(bench.main, ["predict"]) == 0
    assert capsys.readouterr().out == (ROOT / "results" / "predicted" / "h100.txt").read_text()
