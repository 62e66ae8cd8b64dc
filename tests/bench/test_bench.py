"""bench.py on a tiny model, its reference cut by PyTorch, the cost model, and the recorded measurement."""

import dataclasses
import itertools
import json
import math
import os
import re
import signal
import statistics
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from launch import ROOT, ending, run_script, start, status, succeeded
from matplotlib.axes import Axes
from spawn import run_ranks
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

import bench
from reduced_sync import distributed
from reduced_sync.bench import candidates, cost_model, timing
from reduced_sync.bench.figures import draw_decoding
from reduced_sync.bench.results import Case, Row, Times, describe, read_results
from reduced_sync.bench.timing import (
    AllReduce,
    AllReduceMeter,
    Condition,
    Constants,
    Decoding,
    Generation,
    Round,
    Workload,
    tensor_parallel_gpt2,
)
from reduced_sync.hardware import ACCELERATORS, LINKS, Accelerator, Link
from reduced_sync.train.experiment import MODERN
from reduced_sync_model import GPT, MLP, CausalSelfAttention, GPTConfig, KVCache, SyncRule

pytestmark = pytest.mark.timeout(200)
BENCH = ROOT / "bench.py"
TINY = "--n_layer=2 --n_head=2 --n_embd=32 --vocab_size=64 --block_size=32 --device=cpu --rounds=2 --launches=1".split()


def read_json(path):
    """What bench.py wrote with --json. All numbers must be finite."""
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def test_decode(tmp_path):
    syncs = {"baseline": (4, 0), "grouped-1": (1, 0), "baseline+ladder": (4, 3), "1x48": (2, 0)}  # all, and hidden
    sizes = "--batch_sizes 2 --prompts 5 --new_tokens 2"
    files = f"--rounds 1 --added_delay_us 0 2000 --json={tmp_path}/decode.json --png={tmp_path}/decode.png"
    begin = time.monotonic()
    out = succeeded(run_script([BENCH, "decode", *syncs, *TINY, *sizes.split(), *files.split()], timeout=180))
    seconds = time.monotonic() - begin
    table = read_json(tmp_path / "decode.json")
    assert table["settings"]["command"] == "decode"
    cases = {(case["tp_size"], case["added_delay_s"]): case for case in table["results"]}
    assert list(cases) == [(1, 0), (2, 0), (2, 0.002)]
    for (tp_size, delay), case in cases.items():
        assert (case["batch_size"], case["prompt"]) == (2, 5)
        times = case["reference_times"]
        assert times["all_reduces"] == (4 if tp_size > 1 else 0) and times["tpot_s"] > 4 * delay
        rows = {row["candidate"]: row for row in case["rows"]}
        assert {name: (row["syncs"], row["hidden"]) for name, row in rows.items()} == syncs
        for row in (*rows.values(), times):
            seconds -= row["ttft_s"] + 2 * row["tpot_s"]
        for row in rows.values():
            assert row["all_reduces"] == (row["syncs"] if tp_size > 1 else 0)
            config = GPTConfig(block_size=32, **row["model"])
            assert config.vocab_size == 64  # compare.py looks whether it is that of a run
            assert row["bound_s"] * case["read_rate"] == pytest.approx(
                cost_model.bytes_read(config, cost_model.Forward(tp_size, 2, 1, 6))
            )
            if tp_size > 1:
                assert row["bytes"] == 8 * config.n_embd
                # also with hidden ones: the next starts where one is waited for
                assert row["syncs"] * delay < row["tpot_s"] and 0 < row["in_all_reduces_s"] < row["tpot_s"]
    assert seconds > 0  # the process took longer than one round of all that it has timed
    assert (
        out.count("tp_size 2, batch 2, prompt 5") == 3 and out.count("every all-reduce at least 2000 us (added)") == 1
    )
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("modern", [False, True])
def test_every_candidate_decodes(fake_group, modern):
    """With the all-reduces that it claims. Those of one size and n_shard are one model in memory."""
    names = ["baseline", "spd+parallel", "grouped-1+desync", "baseline+ladder", "spd+delayed", "1x48", "01"]
    names += ["1x48+ladder", "spd@4"]
    args = bench.Decode(n_layer=2, n_embd=32, n_head=4, vocab_size=64, block_size=32, modern=modern, n_kv_head=2)
    work = Workload({name: args.config(name, 2) for name in names}, (1,), (5,), new_tokens=2, delays_us=(0, 1000))
    dtype = torch.bfloat16 if modern else torch.float32
    layout = distributed.Layout(torch.device("cpu"), dtype, tp_size=2, tp_group=fake_group)
    measured = Decoding(candidates.Candidate("ours", args.config("baseline", 2), tp_size=2), layout, work)
    found, read_rate, constants = measured()
    assert measured.small.config.block_size == 32 + timing.OVERHEAD_TOKENS
    assert math.isfinite(read_rate) and constants.keys() == {(1, 5)} and all(map(math.isfinite, constants[1, 5]))
    weights = {}
    for name, config in work.configs.items():
        syncs = config.rule.syncs
        for sent, us in ((True, 0), (True, 1000), (False, 0)):
            ttft, steps, calls, _ = found[name, sent, 1, 5, us]
            assert len(steps) == 2 and len(calls) == 3 * syncs
            assert calls[-1].bytes == cost_model.Forward(2, 1, 1, 6, dtype.itemsize).payload(config.n_embd)
            assert min(steps) > syncs * us / 1e6 and ttft > syncs * us / 1e6
        assert config.mlp == ("swiglu" if modern else "gelu") and config.n_kv_head == 2
        embeddings = {measured.models[name, sent].transformer.wte.weight.data_ptr() for sent in (True, False)}
        weights.setdefault((config.n_layer, config.n_shard), set()).update(embeddings)
    assert len(weights) == 3 and all(len(embeddings) == 1 for embeddings in weights.values())


def test_all_reduces_are_inside_the_compiled_graph(fake_group):
    for sync in ("baseline", "baseline+delayed"):
        model = GPT(GPTConfig(16, 64, n_layer=1, n_head=2, n_embd=32, n_shard=2, sync=sync), fake_group).eval()
        graphs = []

        def keep(graph, inputs, graphs=graphs):
            graphs.append(graph)
            return graph.forward

        with torch.inference_mode():
            torch.compile(model, backend=keep, fullgraph=True)(torch.zeros(1, 5, dtype=torch.long))
        assert sum("all_reduce" in str(node.target) for node in graphs[0].graph.nodes) == 2


def test_a_candidate_is_spelled_as_it_is_trained():
    keys = candidates.keys_of("grouped-4+desync@4", n_layer=12)
    assert keys == dict(n_shard=4, sync="grouped-4+desync")
    keys = candidates.keys_of("spd+parallel", n_layer=12, n_shard=2)
    assert keys == dict(n_shard=2, sync="spd+parallel")
    assert candidates.keys_of("baseline+delayed-layer", n_layer=12, n_shard=2)["sync"] == "baseline+delayed-layer"
    study = {}
    exec((ROOT / "config" / "study_124m.py").read_text(), study)
    for name, keys in study["arms"].items():
        if name.startswith("control-"):
            control = candidates.keys_of(name.removeprefix("control-"), 12, n_shard=2)
            assert control == dict(sync="baseline") | keys | dict(n_shard=2)
    assert candidates.keys_of("6x1008", 12, n_shard=8)["n_head"] == 24  # no multiple of 8 fits: 42


def test_train(tmp_path):
    argv = ["train", "gpt2", "spd+parallel@2", *TINY, f"--json={tmp_path}/train.json"]
    out = succeeded(run_script([BENCH, *argv], timeout=120))
    results = read_json(tmp_path / "train.json")["results"]
    assert [row["candidate"] for row in results] == ["gpt2", "spd+parallel@2"]
    for row in results:
        assert len(row["rounds_s"]) == 2
        assert row["tokens_per_s"] == pytest.approx(4 * 32 / statistics.median(row["rounds_s"]))
        assert 100e6 < row["peak_bytes"] < 10e9  # a process with torch in it
        for ratio, figure in (("speed_ratio", "tokens_per_s"), ("memory_ratio", "peak_bytes")):
            assert row[ratio] == pytest.approx(row[figure] / results[0][figure])
    assert len(out.splitlines()) == 2


def test_the_figures_of_a_case():
    """Medians over rounds and tokens, of the slower rank; the prefill's all-reduces are not a token's."""
    condition = Condition("spd", True, 1, 5)
    calls = [(640, 9.0), (640, 9.0), (128, 0.01), (128, 0.03), (128, 0.02), (128, 0.04)]  # two in a forward pass
    calls = list(itertools.starmap(AllReduce, calls))
    times = [[(1.0, [0.1, 0.2]), (3.0, [0.3, 0.1])], [(2.0, [0.2, 0.2]), (1.0, [0.3, 0.5])]]  # [round][rank]
    rounds = [[Round({condition: Generation(*one, calls, 3)}) for one in ranks] for ranks in times]
    found = bench.summarize(rounds, condition)
    expected = Times(ttft_s=2.0, tpot_s=0.3, all_reduces=2, bytes=128)
    assert found == dataclasses.replace(expected, in_all_reduces_s=pytest.approx(0.05))
    for one in (one for ranks in rounds for one in ranks):  # on CUDA, of a forward pass that is not timed
        one.generations[condition] = one.generations[condition]._replace(all_reduces=calls[2:4], n_metered=1)
    assert bench.summarize(rounds, condition) == expected


def test_exposed_syncs_of_slower_links(monkeypatch, capsys):
    """Of a machine whose all-reduces take 0.5 ms and its sublayers 2 ms: slopes, exposed parts, compiled or not."""
    args = bench.Decode(candidates=("baseline", "baseline+ladder"), n_layer=2, n_embd=32, n_head=2, vocab_size=64)
    args.tp_sizes, args.compile, args.prompts = (2,), True, (5,)
    args.new_tokens, args.device, args.added_delay_us = 2, "cpu", (3000, 0, 1000)
    constants = {(1, 5): Constants(7e9, 1e12, 4e-3, 0.5e-3, 0.6e-3)}

    def measure(setup, *_):
        for candidate in setup:
            silent, cases = 0.005 if candidate.compile else 0.008, {}
            for name, sent, us in itertools.product(
                ("baseline", "baseline+ladder", candidate.name), (True, False), (0, 1000, 3000)
            ):
                all_reduce = max(0.5e-3, us / 1e6)
                exposed = 4 * all_reduce if name == "baseline" else all_reduce + 3 * max(0, all_reduce - 0.002)
                steps, calls = [silent + sent * exposed] * 2, [AllReduce(128, all_reduce)] * 12
                cases[name, sent, 1, 5, us] = Generation(0.1, steps, calls, 3)
            yield [[Round(cases, 7e9, constants)] * 2]

    monkeypatch.setattr(bench, "measure", measure)
    none, one, three = bench.decode(args)
    assert [case.added_delay_s for case in (none, one, three)] == [0, 0.001, 0.003]
    for case, dense, ladder in ((none, 0.002, 0.0005), (one, 0.004, 0.001), (three, 0.012, 0.006)):
        for key in ("exposed_s", "model_exposed_s"):
            assert [getattr(row, key) for row in case.rows] == pytest.approx([dense, ladder], rel=0.01)
    for key in ("", "model_"):
        slopes = [[getattr(row, f"{key}exposed_syncs") for row in case.rows] for case in (one, three)]
        assert slopes[0] == pytest.approx([2, 0.5], rel=0.01) and slopes[1] == pytest.approx([4, 2.5], rel=0.01)
        hidden = [getattr(case.rows[1], f"hidden_{key}exposed_s") for case in (none, one, three)]
        assert hidden == pytest.approx([0, 0, 0.001], rel=0.01, abs=1e-6)
    assert (none.compiled.tpot_s, none.compiled_silent.tpot_s) == pytest.approx((0.007, 0.005))
    assert one.compiled is None and none.compiled.all_reduces is None
    out = capsys.readouterr().out
    assert "ours, baseline compiled, all-reduces send nothing: TTFT 100.00, TPOT 5.00, bound/TPOT 0." in out
    lines = [line.split() for line in out.splitlines()[-2:]]
    assert lines[0][:3] == ["baseline", "4", "2.00"] and lines[1][:3] == ["baseline+ladder", "1+3", "0.50"]


def test_the_link_that_was_measured_takes_the_times_that_were_measured():
    B, T, constants = 2, 5, (3.0, 4.0, 5.0, 1e-5, 1.5e-5)
    found = Round({}, 7.0, {(B, T): Constants(*constants)})
    slow = Round({}, 700.0, {(B, T): Constants(*(100 * one for one in constants))})
    prefill = cost_model.Forward(2, B, T, T)
    read_rate, accelerator, link = bench.machine_of([[found, found], [found, slow]], prefill, 32)
    assert (read_rate, accelerator.bandwidth, accelerator.peak_flops, accelerator.overhead) == (7.0, 3.0, 4.0, 5.0)
    assert [link.all_reduce(4 * B * t * 32, 2) for t in (1, T)] == pytest.approx([1e-5, 1.5e-5])
    assert bench.machine_of([[found]], prefill, 32).link is None


@pytest.mark.parametrize("T, prompt", [(1, 1e-5), (1, 1.2e-5), (5, 0.9e-5)])
def test_a_link_that_noise_makes_faster_for_more(T, prompt):
    """It had a bandwidth below 0, or that of the noise over one byte."""
    rank = Round({}, 7.0, {(2, T): Constants(3.0, 4.0, 5.0, 1e-5, prompt)})
    link = bench.machine_of([[rank, rank]], cost_model.Forward(2, 2, T, T), 32).link
    assert [link.all_reduce(n, 2) for n in (1, 256, 10**6)] == pytest.approx([1e-5] * 3, rel=1e-3)


def test_the_exposed_syncs_of_a_method_with_first_layers_in_step():
    """Of 23 syncs 20 are hidden: three all-reduces are waited for."""
    config = GPTConfig(32, 64, n_layer=12, n_head=2, n_embd=32, n_shard=2, sync="baseline+delayed-layer")
    row = Row(candidate="x", **describe(config), tpot_s=1.003, silent_tpot_s=1.0)
    link = Link(1e-3, 0.0, 1e18, "made")
    machine = bench.Machine(1e9, Accelerator(1e9, 1e12, 1.0, "made"), link)
    forward = cost_model.Forward(2, 1, 1, 8)
    bench.add_model(row, config, machine, forward, forward, 0.0)
    assert (row.syncs, row.hidden) == (23, 20) and row.hidden_exposed_s == pytest.approx(0, abs=1e-9)


def test_a_figure_has_the_time_alone_of_its_own_prompt(tmp_path, monkeypatch):
    drawn = []
    axhline = Axes.axhline
    monkeypatch.setattr(Axes, "axhline", lambda axes, y, **keys: drawn.append(y) or axhline(axes, y, **keys))
    cases = [
        Case(tp_size=n, batch_size=1, prompt=T, bound_s=1.0, rows=[Row(tpot_s=T * n, silent_tpot_s=1.0)])
        for n, T in itertools.product((1, 2), (16, 1024))
    ]
    draw_decoding(cases, tmp_path / "x.png")
    assert drawn == [1000, 16_000, 1000, 1_024_000]


def test_predict(tmp_path, capsys):
    shape = ["--n_layer=12", "--n_embd=768", f"--json={tmp_path}/predict.json"]
    assert status(bench.main, ["predict", "baseline", "grouped-4", "--links", "nvlink", "10gbe", *shape]) == 0
    out = capsys.readouterr().out
    assert out.startswith("PREDICTED, not measured: h100, tp_size 8") and "sglang#22734" in out
    rows = read_json(tmp_path / "predict.json")["results"]
    tpot = {(row["link"], row["syncs"]): row["tpot_s"] for row in rows}
    per_sync = {link: (tpot[link, 24] - tpot[link, 4]) / 20 for link in ("nvlink", "10gbe")}
    assert per_sync["nvlink"] == pytest.approx(15.015e-6, rel=1e-4)  # 6.6 + 14 x 0.6 us, and 1.5 KiB
    assert per_sync["10gbe"] == pytest.approx(14 * (40e-6 + 192 / 1.25e9))
    assert status(bench.main, ["predict", "--links=nvlink", "--n_layer=6"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in out[2:7]] == ["baseline", "spd", "grouped-3", "grouped-2", "grouped-1"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["decode", "--tp_sizes", "3"], ["n_shard=2 of baseline is not divisible by tp_size=3"]),
        (["decode", "--prompts", "241"], ["prompts of 241 and 16 new tokens exceed --block_size"]),
        (["decode", "1111"], ["sync='1111' has 4 characters; it needs n_layer=12"]),
        (["decode", "grouped-5"], ["grouped-5 does not divide n_layer=12"]),
        (["decode", "--tp_sizes", "1", "--png=x.png"], ["--png", "tp_size 2 or more"]),
        (["decode", "baseline+lader"], ["sync='baseline+lader': what follows the + is one of parallel, desync"]),
        (["decode", "grouped-1+ladder"], ["sync='grouped-1+ladder': a single sync"]),
        (["decode", "3x102", "--n_shard=4"], ["'3x102': no even head size makes heads divisible by n_shard=4"]),
        (["predict", "spd@2"], ["spd@2: predict has a rank a shard, here n_shard=8"]),
        (["decode", "--tp_sizes=1", "--added_delay_us=50", "--device=cpu"], ["--added_delay_us", "tp_size 2 or more"]),
        (["train", "spd"], ["'spd': a candidate is RULE@N_SHARD, such as grouped-4@2"]),
        (["train", "--dtype=float8", "--device=cpu"], ["dtype='float8'"]),
        (["decode", "--json=/nowhere/x.json"], ["/nowhere/x.json: No such file or directory"]),
        (["decode", "--json=x.png", "--png=./x.png"], ["--json and --png are one file: x.png"]),
        (["predict", "--n_layer=65537"], ["n_layer=65537 must be at least 1, and below 65537"]),
        (["predict", "9999999x64"], ["'9999999x64': at most 65536 layers and a width of 1048576 are allowed"]),
        (["decode", "spd@4", "--tp_sizes=4"], ["n_shard=2 of the baseline (--n_shard) is not divisible by tp_size=4"]),
        (
            ["decode", "--compile", "--tp_sizes=2", "--added_delay_us=50", "--device=cpu"],
            ["--compile is timed without an added delay: name 0 among"],
        ),
        (["decode", "spdd"], ["sync='spdd': allowed are baseline, spd, grouped-N"]),
    ],
)
def test_mistakes_are_one_line(argv, words, capsys):
    assert status(bench.main, argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(word in error for word in words), error


def test_too_few_tokens_for_a_time_on_a_gpu():
    """The first steps of every text capture a graph."""
    with pytest.raises(ValueError, match="--new_tokens=4: at least 8 on a GPU"):
        bench.check_decode(bench.Decode(new_tokens=4), {}, "cuda")


class Clock:
    """time.perf_counter in whole seconds: a look at it takes one."""

    now = 0

    def perf_counter(self):
        self.now += 1
        return self.now


@pytest.mark.parametrize(("delay", "blocking", "hidden"), [(0, 101, 32), (50, 102, 33), (1000, 1001, 930)])
def test_a_delay_counts_from_the_start_and_is_waited_for_at_the_use(monkeypatch, delay, blocking, hidden):
    """Real all-reduces of 100 s. The hidden one starts in 1 s, and a sublayer of 70 s runs before 30 s of waiting."""
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    x, operators = torch.zeros(3), timing.OPERATORS

    def takes(seconds):
        def fake(tensor, *_):
            clock.now += seconds
            return tensor

        return fake

    monkeypatch.setattr(torch.distributed, "all_reduce", takes(100))
    monkeypatch.setattr(operators, "all_reduce", takes(0))
    monkeypatch.setattr(operators, "wait_tensor", takes(30))
    meter = AllReduceMeter(torch.device("cpu"))
    meter.added_delay = delay
    with meter:
        torch.distributed.all_reduce(x)
        total = operators.all_reduce(x, "sum", "group")
        clock.now += 70
        assert operators.wait_tensor(total) is x
    assert meter.take() == [(12, blocking), (12, hidden)]


def assert_reference(rank):
    torch.manual_seed(0)
    shape = dict(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    dense = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    idx = torch.randint(64, (2, 9))
    with torch.no_grad():
        expected = dense(idx).logits
        cut = tensor_parallel_gpt2(dense, 2, "cpu")
        assert cut.transformer.h[0].mlp.c_fc.weight.to_local().shape == (64, 32)
        torch.testing.assert_close(cut(idx).logits, expected, rtol=1e-4, atol=1e-5)
        generated = cut.generate(idx, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert generated.shape == (2, 14)


def assert_slopes(rank):
    """A layer whose sublayers take 0.1 s: both syncs of standard TP cost the delay, of an overlapped pair the last."""

    def sublayer(self, h, *_):
        time.sleep(0.1)
        return h

    MLP.forward = CausalSelfAttention.forward = sublayer
    meter, idx = AllReduceMeter(torch.device("cpu")), torch.zeros(1, 1, dtype=torch.long)
    for sync, slope in (("baseline", 2), ("baseline+ladder", 1), ("baseline+delayed", 1)):
        model = GPT(GPTConfig(8, 64, n_layer=1, n_head=2, n_embd=32, n_shard=2, sync=sync), dist.group.WORLD)
        seconds = {0.0: [], 0.08: []}
        for delay, taken in [*seconds.items()] * 3:
            meter.added_delay = delay
            dist.barrier()
            begin = time.perf_counter()
            with torch.inference_mode(), meter:
                model(idx)
            taken.append(time.perf_counter() - begin)
        least, most = (min(taken) for taken in seconds.values())
        assert (most - least) / 0.08 == pytest.approx(slope, abs=0.45)


def assert_in_two(rank):
    assert_reference(rank)
    assert_slopes(rank)
    dist.barrier()


def test_two_ranks():
    """PyTorch's tensor parallelism computes what GPT-2 does, and an added delay costs as often as a sync blocks."""
    run_ranks(2, assert_in_two)


# --- the cost model


BLOCKS = [{}, MODERN | dict(n_kv_head=2)]


@pytest.mark.parametrize("block", BLOCKS, ids=["GPT-2", "modern"])
def test_bytes_are_those_of_the_model(block):
    B, context = 3, 10
    config = GPTConfig(context, 64, n_layer=4, n_head=4, n_embd=32, bias=False, n_shard=4, **block)
    model = GPT(config)
    for tp_size in (1, 2, 4):
        matrices = [p for n, p in model.named_parameters() if "c_" in n]
        cache = KVCache(model, B).layers
        parts = sum(p.nbytes for p in matrices) + sum(t.nbytes for pair in cache for t in pair)
        expected = parts / tp_size + model.lm_head.weight.nbytes
        assert cost_model.bytes_read(config, cost_model.Forward(tp_size, B, 1, context)) == expected


@pytest.mark.parametrize("block", BLOCKS, ids=["GPT-2", "modern"])
@pytest.mark.parametrize("T", [1, 12])
def test_flops_are_those_of_the_model(T, block):
    """As PyTorch's counter has them; it does not know a causal attention, so that part is reckoned apart."""
    B, L, C = 2, 4, 32
    config = GPTConfig(16, 64, n_layer=L, n_head=4, n_embd=C, bias=False, n_shard=2, **block)
    model = GPT(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(B, T, dtype=torch.long))
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    attention = B * L * sum(4 * C * seen for seen in range(1, T + 1))
    assert cost_model.flops(config, cost_model.Forward(1, B, T, T)) == counted + attention


def test_a_hidden_sync_takes_what_its_sublayer_leaves():
    """On a machine where only bytes count: an attention takes as long as 4 C^2 weights, an MLP as 8 C^2."""
    C = 32
    accelerator = Accelerator(bandwidth=4.0, peak_flops=1e30, overhead=0.0)
    shape = dict(vocab_size=1, n_layer=3, n_head=2, n_embd=C, n_shard=1)

    def exposed(all_reduce, added_delay=0.0, **keys):
        model = partial(cost_model.forward_seconds, GPTConfig(**shape, **keys), accelerator, added_delay=added_delay)
        token = cost_model.Forward(tp_size=2, batch_size=1, tokens=1, context=0)
        return model(Link(all_reduce, 0.0, 1e30), token) - model(None, token)

    attention, mlp = 2 * C**2, 4 * C**2  # a half of it, on one rank of two
    for sync in ("baseline+ladder", "baseline+delayed"):
        assert exposed(attention, sync=sync) == attention  # 1 blocks
        between = attention + 100
        assert exposed(between, sync=sync) == between + 2 * 100  # 2 hide behind an attention, 3 behind an MLP
        beyond = mlp + 100
        assert exposed(beyond, sync=sync) == beyond + 2 * (beyond - attention) + 3 * 100
        assert exposed(1, beyond, sync=sync) == exposed(beyond, sync=sync)
        assert exposed(between, sync=sync.replace("baseline", "a11")) == between + 100
    assert exposed(between) == 6 * between and exposed(between, sync="111+parallel") == 3 * between


def test_links():
    link = Link(base=1e-6, step=2e-6, bandwidth=1e9)
    assert link.all_reduce(1000, 1) == 0
    assert link.all_reduce(1000, 2) == pytest.approx(1e-6 + 2 * (2e-6 + 0.5e-6))
    for one in LINKS.values():
        assert one.source and 0 < one.all_reduce(3072, 2) < one.all_reduce(3072, 8) < one.all_reduce(2**20, 8)


@pytest.mark.parametrize(
    ("name", "payload", "n", "published"),
    [
        ("pcie-8", 4096, 8, 45e-6),
        ("pcie-8", 65536, 8, 344e-6),
        ("usb4", 8192, 2, 120e-6),
        ("thunderbolt", 8192, 2, 300e-6),
        ("gigabit", 4352, 2, 24e-3 / 64),
        ("gigabit", 4352, 4, 75e-3 / 64),
    ],
)
def test_published_all_reduces(name, payload, n, published):
    assert LINKS[name].all_reduce(payload, n) == pytest.approx(published, rel=0.06)


@pytest.mark.parametrize(("tp_size", "published"), [(2, 1.08), (4, 1.16), (8, 1.43)])
def test_published_no_communication_bounds(tp_size, published):
    """Ladder residual (arXiv 2501.06589): a 70B model on H100 with NVLink, batch 1, against no communication at all."""
    config = GPTConfig(n_layer=80, n_embd=8192, n_head=64, vocab_size=32000, n_shard=tp_size)
    token = cost_model.Forward(tp_size, batch_size=1, tokens=1, context=1024, itemsize=2)
    tpot = partial(cost_model.forward_seconds, config, ACCELERATORS["H100"], forward=token)
    with_link, without = (tpot(link) for link in (LINKS["nvlink"], None))
    assert with_link / without == pytest.approx(published, rel=0.03)


# --- processes

MEASURED = """import multiprocessing, os, time
from multiprocessing.util import Finalize
from reduced_sync.cli import one_line_errors, set_up

if __name__ == "__mp_main__" and os.path.exists("wait"):
    open("importing", "w").close()
    time.sleep(60)

def job(candidate, layout):
    lock = multiprocessing.Lock()  # as torch.compile's workers have them
    Finalize(None, time.sleep, [1], exitpriority=100)  # before the lock is removed
    return lambda: lock and 7

if __name__ == "__main__":
    set_up()
    from reduced_sync.bench.candidates import Candidate, measure
    from reduced_sync_model import GPTConfig
    config = GPTConfig(block_size=8, vocab_size=64, n_layer=2, n_head=2, n_embd=16, n_shard=2, sync="spd")
    with one_line_errors():
        print(measure([Candidate("spd@2", config, tp_size=2)], job, device="cpu"))
"""


def test_processes_that_measured_end_by_themselves(tmp_path):
    """Killed in the middle of their tear-down they left semaphores, of which Python warned."""
    (tmp_path / "script.py").write_text(MEASURED)
    process = run_script([tmp_path / "script.py"], cwd=tmp_path)
    assert (process.returncode, process.stdout, process.stderr) == (0, "[[[7, 7]]]\n", "")


def test_ctrl_c_while_processes_start(tmp_path):
    """A terminal sends it to all of them, and one line comes out."""
    (tmp_path / "script.py").write_text(MEASURED)
    (tmp_path / "wait").touch()
    with ending(start([tmp_path / "script.py"], cwd=tmp_path)) as process:
        while not (tmp_path / "importing").exists():
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


# --- the recorded measurement


RECORDED = ROOT / "results" / "decode"


def test_recorded_measurement(capsys):
    """The limits that it keeps, and what EXPERIMENT_SUMMARY.md says of it."""
    results = [case for name in ("one", "two") for case in read_results(RECORDED / f"{name}.json")[1]]
    cases = {(case.tp_size, case.batch_size): case for case in results}
    one, two = cases[1, 1], cases[2, 1]
    compiled = one.compiled
    assert one.reference_times.tpot_s / compiled.tpot_s >= 1.3 and compiled.bound_s / compiled.tpot_s >= 0.7
    assert two.rows[0].pattern == "2" * 12 and two.rows[0].tpot_s <= two.reference_times.tpot_s
    for row in two.rows:
        assert row.all_reduces == row.syncs == SyncRule(row.pattern).syncs
    worst = max(abs(row.line_s / row.tpot_s - 1) for row in two.rows)
    rows = [row for case in cases.values() for row in case.rows]
    good = sum(row.model_tpot_s == pytest.approx(row.tpot_s, rel=0.15) for row in rows)
    good_ttft = sum(row.model_ttft_s == pytest.approx(row.ttft_s, rel=0.15) for row in rows)
    saved = 100 * (1 - compiled.tpot_s / one.rows[0].tpot_s)
    summary = " ".join((ROOT / "EXPERIMENT_SUMMARY.md").read_text().split())
    assert worst < 0.10 and f"8 of 8 patterns are within {100 * worst:.1f} %" in summary
    assert good == good_ttft >= 12
    assert f"TPOT and TTFT within 15 % in {good} of {len(rows)} configurations" in summary
    assert f"{saved:.0f} % off each token" in summary
    for case in results:
        bench.print_case(case)
    assert capsys.readouterr().out == "".join((RECORDED / f"{name}.txt").read_text() for name in ("one", "two"))


def test_recorded_delays(capsys):
    """On a link slow beyond a layer's compute every all-reduce is exposed, hidden or not."""
    folder = ROOT / "results" / "decode-all" / "delays"
    _, cases = read_results(folder / "delays.json")
    for row in cases[-1].rows:
        assert row.exposed_syncs == pytest.approx(row.syncs, abs=1.3), row.candidate
    for case in cases:
        bench.print_case(case)
    bench.print_exposed(cases)
    assert capsys.readouterr().out == (folder / "delays.txt").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "results").rglob("*.json")), ids=lambda path: path.stem)
def test_all_that_was_recorded_is_read(path, tmp_path):
    """Every figure under a name of today, but for what nobody reads any more; written anew, it is read the same."""

    def figures(tree):
        if isinstance(tree, dict):
            unread = r"residual_s|fit_.*|(\w+_)?prefill_bytes|predicted|model"
            return [one for key, value in tree.items() if not re.fullmatch(unread, key) for one in figures(value)]
        if isinstance(tree, list):
            return [one for value in tree for one in figures(value)]
        return [tree] if isinstance(tree, float) and tree else []

    recorded, (options, results) = json.loads(path.read_text()), read_results(path)
    again = {"settings": options, "results": list(map(dataclasses.asdict, results))}
    assert sorted(figures(recorded["results"])) == sorted(figures(again["results"])) != []
    (tmp_path / "again.json").write_text(json.dumps(again))
    assert read_results(tmp_path / "again.json") == (options, results)


def test_recorded_prediction(capsys):
    assert status(bench.main, ["predict"]) == 0
    assert capsys.readouterr().out == (ROOT / "results" / "predicted" / "h100.txt").read_text()
