"""Loss against time: what bench.py measured, what the cost model predicts, and which arms are on the frontier."""

import dataclasses
import json
import re

import pytest
from launch import ROOT, status
from make_runs import UNTUNED, load, make, row, write_latency

import compare
from reduced_sync.bench.cost_model import Forward, forward_seconds
from reduced_sync.compare.frontier import add_measured, add_predicted, on_frontier
from reduced_sync.compare.report import fastest, table, warnings
from reduced_sync.compare.runs import load_runs
from reduced_sync.hardware import GPUS, LINKS
from reduced_sync.train.experiment import MODERN, model_keys
from reduced_sync_model import GPT, GPTConfig

BY_LOSS = "warning: the frontier at 12x64 goes by losses alone, as the noise is not known"


@pytest.fixture
def timed(runs):
    """Runs, a control and +ladder, all with times. The control beats SPD, +ladder and spd both beat grouped-6."""
    make(runs, "out-control", "2" * 8, [4.0, 3.0, 2.005], n_params=615000, n_embd=80, n_shard=1)
    make(runs, "out-ladder", "2" * 12 + "+ladder", [4.0, 3.0, 2.03])
    rows = [row(0.010, "2" * 12), row(0.008, "1" * 12), row(0.009, "01" * 6), row(0.005, "000100010001")]
    write_latency(runs, *rows, row(0.007, "2" * 8, n_embd=80), row(0.006, "2" * 12 + "+ladder"))
    return runs


def test_the_frontier_and_the_fastest_within_the_tolerance(timed):
    arms = load(timed)
    add_measured(arms, timed / "decode.json", None, None)
    (setting,) = arms[0].tpots
    assert setting == "tp_size 2, batch 1, prompt 128" and warnings(arms) == [BY_LOSS]
    found = {arm.names[0]: (arm.tpots[setting], on_frontier(arm, arms, setting)) for arm in arms}
    best = {"out-base": (0.010, True), "out-control": (0.007, True), "out-ladder": (0.006, True)}
    assert found == best | {"out-spd": (0.008, False), "out-g6": (0.009, False), "out-g3": (0.005, True)}
    lines = [line.split() for line in table(arms, 2).splitlines()]
    assert lines[0][-2:] == ["ms/token", "frontier"]
    assert {line[0]: line[-2:] for line in lines[1:-1]} == {
        name: [f"{1000 * seconds:.3f}", "yes" if best else "dominated"] for name, (seconds, best) in found.items()
    }
    start = f"{setting}: {UNTUNED}the fastest within"
    rest = "of the baseline: 7.000 ms/token, 1.43x as fast as the baseline (control 8x80, +0.25%, out-control)"
    assert fastest(arms, 0.6) == f"{start} 0.6% {rest}"
    rest = "of the baseline: 6.000 ms/token, 1.67x as fast as the baseline (baseline+ladder, n_shard 2, +1.49%, "
    assert fastest(arms, 2) == f"{start} 2% {rest}out-ladder)"
    rest = "of the baseline: 10.000 ms/token, the baseline itself (baseline, n_shard 2, +0.00%, out-base)"
    assert fastest(arms, 0.1) == f"{start} 0.1% {rest}"
    assert fastest(arms, -1) == f"{setting}: {UNTUNED}no run with a time per token is within -1% of the baseline"


def test_equal_arms_are_both_on_the_frontier_and_unfinished_ones_on_none(runs):
    make(runs, "out-twin", "1" * 12 + "+parallel", [4.0, 3.1, 2.01])
    make(runs, "out-new", "000000000001", [4.0, 1.0])
    path = write_latency(runs, *(row(0.01, p) for p in ("1" * 12, "01" * 6)), row(0.01, "1" * 12 + "+parallel"))
    write_latency(runs, row(0.001, "000000000001"))  # the same case again: another launch
    arms = load(runs)
    add_measured(arms, path, None, None)
    found = {arm.names[0]: on_frontier(arm, arms, "tp_size 2, batch 1, prompt 128") for arm in arms}
    expected = {"out-spd": True, "out-twin": True, "out-g6": False, "out-new": None, "out-base": None, "out-g3": None}
    assert found == expected
    assert "10.000 ms/token, its baseline has no time (spd, +0.50%, out-spd)" in fastest(arms, 2)
    assert warnings(arms) == [BY_LOSS, "warning: no time per token of out-base, out-g3"]


def test_a_row_is_that_of_the_same_model_alone(runs):
    """Another n_shard, width or block is another model; for a dense one n_shard and heads make no difference."""
    others = [dict(n_shard=4), dict(n_embd=128), dict(n_head=8), dict(mlp="swiglu"), dict(n_kv_head=2)]
    rows = [row(1.0, "1" * 12, **other) for other in [*others, dict(norm="rmsnorm")]]
    rows += [row(1.0, "1" * 12 + method) for method in ("+parallel", "+desync", "+delayed")]
    path = write_latency(runs, *rows)
    with pytest.raises(ValueError, match="none of the runs' models was measured at tp_size 2, batch 1"):
        add_measured(load(runs), path, None, None)
    dense = [row(0.6, "2" * 12, n_kv_head=2), row(0.7, "2" * 12, n_shard=4, n_head=8, n_kv_head=8)]
    write_latency(runs, *rows, row(0.5, "1" * 12), *dense)
    arms = load(runs)
    add_measured(arms, path, None, None)
    assert [list(arm.tpots.values()) for arm in arms] == [[0.7], [0.5], [], []]


def test_which_of_several_cases(runs):
    """The largest tp_size and the smallest batch unless they are given; a column for each prompt and added delay."""
    sizes = [(1, 1, 0.1), (4, 8, 0.2), (4, 2, 0.3), (2, 1, 0.4)]
    for tp_size, batch_size, seconds in sizes:
        path = write_latency(runs, row(seconds, "1" * 12), tp_size=tp_size, batch_size=batch_size)
    for choice, expected in {(None, None): 0.3, (4, 8): 0.2, (None, 1): 0.4, (1, None): 0.1}.items():
        arms = load(runs)
        add_measured(arms, path, *choice)
        assert list(arms[1].tpots.values()) == [expected]
    write_latency(runs, row(0.9, "1" * 12), tp_size=4, batch_size=2, added_delay_s=3e-5)
    arms = load(runs)
    add_measured(arms, path, None, None)
    common = "tp_size 4, batch 2, prompt 128"
    assert arms[1].tpots == {common: 0.3, f"{common}, 30 us added": 0.9}
    assert "ms/token  frontier  ms/token, 30 us added  frontier, 30 us added" in table(arms, 2)
    assert [line.partition(": ")[0] for line in fastest(arms, 2).splitlines()] == [common, f"{common}, 30 us added"]
    with pytest.raises(ValueError, match="there are tp_size 1 with 1, 2 with 1, 4 with 2, 4 with 8"):
        add_measured(load(runs), path, 2, 2)


def test_a_row_of_another_vocabulary_is_another_model(runs):
    """Times measured with GPT-2's 50304 tokens were those of runs with 128."""
    make(runs, "out-other", "0" * 11 + "1", [4.0, 3.0, 2.0], sizes=dict(vocab_size=192))
    path = write_latency(runs, row(0.3, "1" * 12, vocab_size=50304), row(0.4, "2" * 12, vocab_size=64))
    line = "decode.json: none of the runs' models was measured at tp_size 2, batch 1, but 12x64 with vocab_size 50304, "
    line += "12x64 with vocab_size 64; the runs have 12x64 with vocab_size 128, 12x64 with vocab_size 192"
    with pytest.raises(ValueError, match=re.escape(line)):
        add_measured(load(runs), path, None, None)
    patterns = ("1" * 12, "2" * 12, "01" * 6, "000100010001", "0" * 11 + "1")
    write_latency(runs, *(row(0.1, pattern) for pattern in patterns))
    arms = load(runs)
    add_measured(arms, path, None, None)
    assert [list(arm.tpots.values()) for arm in arms] == [[0.1]] * 4 + [[]]
    assert "warning: no time per token of out-other" in warnings(arms)


def test_the_vocabulary_of_older_files_and_logs(runs):
    """A file may have it in its settings alone, a log in its number of parameters."""
    older = row(0.1, "1" * 12)
    del older["model"]["vocab_size"], older["model"]["head_size"]
    path = write_latency(runs, older)
    cases = json.loads(path.read_text())
    for settings, tpots in (({"vocab_size": 128}, [0.1]), ({"vocab_size": 64}, None), ({}, None)):
        path.write_text(json.dumps(cases | {"settings": settings}))
        arms = load(runs)
        if tpots:
            add_measured(arms, path, None, None)
            assert list(arms[1].tpots.values()) == tpots
        else:
            line = "but 12x64 with vocab_size 64" if settings else "'vocab_size' is missing; measure again"
            with pytest.raises(ValueError, match=line):
                add_measured(arms, path, None, None)
    n_params = GPT(GPTConfig(8, 192, 12, 4, 64, n_shard=2)).get_num_params(non_embedding=False)
    make(runs, "out-old", "1" * 12, [4.0, 3.0, 2.0], n_params, sizes={}, bias=True)
    path.write_text(json.dumps(cases | {"settings": {"vocab_size": 192}}))
    arms = load(runs)
    add_measured(arms, path, None, None)
    assert {arm.names[0] for arm in arms if arm.tpots} == {"out-old"}


@pytest.mark.parametrize(("runs", "file"), [("pilot/3x192", "pilot/decode"), ("pypi/6x384", "pypi/decode-6x384")])
def test_recorded_times(runs, file):
    arms, _ = load_runs(sorted(path.parent for path in (ROOT / "results").glob(f"{runs}-*/log.txt")))
    add_measured(arms, ROOT / f"results/{file}.json", None, None)
    assert sum(bool(arm.tpots) for arm in arms) >= 4


TIMES = [0, 0.0, -0.1, float("nan"), float("inf"), 10**400, True, "0.1", None, [0.1], {}]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        *((dict(rows=[{"tpot_s": one}]), f"results[1].rows[0].tpot_s is {one!r}, it must be") for one in TIMES),
        (dict(tp_size="2"), "results[1].tp_size is '2', it must be a positive integer"),
        (dict(batch_size=0), "results[1].batch_size is 0, it must be a positive integer"),
        (dict(prompt=1.5), "results[1].prompt is 1.5, it must be a positive integer"),
        (dict(added_delay_s=float("nan")), "results[1].added_delay_s is nan, it must be a number of at least 0"),
        (dict(compiled={"tpot_s": 1, "ttft_s": "1"}), "results[1].compiled.ttft_s is '1', it must be a positive"),
        (dict(rows=[{}]), "results[1].rows[0].tpot_s is missing, it must be a positive number"),
        (dict(rows=[[]]), "not what bench.py writes: 'list' object"),
        (dict(prompt=64, rows=[{"tpot_s": 0.1, "model": 3}]), "not what bench.py decode writes: 'int' object"),
        (dict(rows=[row(0.2, "1" * 12)]), "several times of out-spd's model for tp_size 2, batch 1, prompt 128"),
        (dict(prompt=64, rows=[row(0.2, "1" * 12)] * 2), "several times of out-spd's model for tp_size 2, batch 1"),
        *(
            (dict(prompt=64, rows=[row(0.1, "1" * 12) | {"model": model}]), "not what bench.py decode writes")
            for model in (
                {"n_layer": 10**30, "n_embd": 64, "n_head": 4, "sync": "spd"},
                {"n_layer": 12, "n_embd": 64, "n_head": 4, "sync": 7},
            )
        ),
        (dict(rows=[{"tpot_s": 0.1, "candidate": "grouped:0"}]), "not what bench.py writes: unsupported"),
        (dict(rows={}), "results[1] is not what bench.py writes"),
    ],
    ids=lambda one: str(one)[:60],
)
def test_an_impossible_case_is_refused(runs, changes, line):
    """Also one that is none of the runs'."""
    write_latency(runs, row(0.1, "1" * 12))
    path = write_latency(runs, **{"rows": []} | changes)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {line}")):
        add_measured(load(runs), path, None, None)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[]", "not what bench.py writes: an object with a list of results"),
        ('{"results": {}}', "not what bench.py writes: an object with a list of results"),
        ('{"results": [{}], "settings": {"command": "predict"}}', "results[0] is not what bench.py writes: Prediction"),
        ('{"results": [3]}', "not what bench.py writes: 'int' object"),
        ('{"results": [], "settings": 3}', "not what bench.py writes: an object with a list of results"),
        ('{"results": [' + "9" * 5000 + "]}", "not what bench.py writes: Exceeds the limit"),
        ('{"results": [{"tpot_s": 0.1}', "not what bench.py writes: Expecting"),
        ('{"results": [], "settings": {"command": "predict"}}', "written by bench.py predict, not by bench.py decode"),
        ('{"results": []}', "no case of this tp_size and batch; there are tp_size none"),
    ],
    ids=lambda text: text[:40],
)
def test_what_is_no_file_of_times_is_refused(runs, text, line):
    (runs / "decode.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{runs}/decode.json: {line}")):
        add_measured(load(runs), runs / "decode.json", None, None)


def test_predictions_are_the_cost_models_and_labelled(timed, capsys, monkeypatch):
    """Of the arm's own shape, with its hidden syncs; in table, panel and verdict."""
    from matplotlib.axes import Axes

    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda axes, title, *_, **__: titles.append(title))
    make(timed, "out-spd4", "1" * 12, [4.0, 3.1, 2.01], n_shard=4)
    make(timed, "out-ladder4", "2" * 12 + "+ladder", [4.0, 3.1, 2.01], n_shard=4)
    arms = load(timed)
    add_predicted(arms, "nvlink", "h100", 4, 3)
    times = {arm.names[0]: one for arm in arms for one in arm.tpots.values()}
    assert times.keys() == {"out-spd4", "out-ladder4", "out-base", "out-control"}  # those that 4 ranks can hold
    for name, sync in (("out-spd4", "spd"), ("out-ladder4", "baseline+ladder"), ("out-base", "baseline")):
        model = GPTConfig(8, 128, 12, 4, 64, n_shard=4, sync=sync)
        assert times[name] == forward_seconds(model, GPUS["h100"], LINKS["nvlink"], Forward(4, 3, 1, 8, itemsize=2))
    argv = [*map(str, timed.glob("out*")), "--link=nvlink", "--tp_size=4", f"--png={timed}/figure.png"]
    assert status(compare.main, argv) == 0
    out = capsys.readouterr().out
    assert "ms/token, PREDICTED  frontier, PREDICTED" in out.splitlines()[0]
    assert "\nms/token, PREDICTED: link nvlink, h100, tp_size 4, batch 1\n" in out
    assert "\nPREDICTED, link nvlink, h100, tp_size 4, batch 1: " + UNTUNED + "the fastest within 2% of the" in out
    assert titles[-1].endswith("\nPREDICTED, link nvlink, h100, tp_size 4, batch 1")
    assert "warning: no time per token of out-ladder, out-spd, out-g6, out-g3\n" in out
    with pytest.raises(ValueError, match="tp_size=8 divides the n_shard of none of the runs"):
        add_predicted(load(timed), "nvlink", "h100", 8, 1)


LLAMA = MODERN | dict(n_kv_head=2)
SHAPES = [{}, dict(bias=True), dict(tie_embeddings=False), dict(n_hidden=96), dict(n_kv_head=2), dict(block_size=512)]
SHAPES += [LLAMA, LLAMA | dict(tie_embeddings=False, n_hidden=160), dict(vocab_size=1024), dict(head_size=64)]


OLD = [(shape, old) for shape in SHAPES for old in (False, True) if not (old and "head_size" in shape)]


@pytest.mark.parametrize("pattern", ["22", "11"])
@pytest.mark.parametrize(("shape", "old"), OLD, ids=str)
def test_a_prediction_is_of_the_models_own_shape(tmp_path, shape, pattern, old):
    """It was of GPT-2's block, tied, with all that this leaves of the parameters as vocabulary.

    An older log does not say the vocabulary, only how many parameters there are.
    """
    small = dict(block_size=8, vocab_size=192, n_layer=2, n_head=4, n_embd=64, bias=False)
    config = GPTConfig(**model_keys(small | shape), n_shard=2)
    n_params = GPT(config).get_num_params(non_embedding=False)
    keys = dict(bias=False, n_hidden=0, n_kv_head=0, tie_embeddings=True) | shape
    sizes = {"vocab_size": keys.pop("vocab_size", 192), "head_size": keys.pop("head_size", 16)}
    make(tmp_path, "out-one", pattern, [4.0, 3.0, 2.0], n_params, sizes={} if old else sizes, **keys)
    for tp_size in (2, 4) if pattern == "22" else (2,):  # a dense model can be cut anew: each rank needs a KV head
        arms = load(tmp_path)
        add_predicted(arms, "nvlink", "h100", tp_size, 3)
        cut = dataclasses.replace(config, n_shard=tp_size, sync=pattern)
        token = Forward(tp_size, 3, 1, cut.block_size, itemsize=2)
        expected = forward_seconds(cut, GPUS["h100"], LINKS["nvlink"], token)
        assert list(arms[0].tpots.values()) == [expected]


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (dict(n_params=609345), "out-one: its log does not say the model's whole shape: add the lines '# vocab_size"),
        (dict(n_params=1000), "out-one: its log does not say the model's whole shape: add the lines '# vocab_size"),
        (dict(init_from="llama"), "out-one: its log does not say the model's whole shape: add the lines '# vocab_size"),
        (dict(n_head=3), "out-one: its config is not that of a model: n_embd=64 is not divisible by n_head=3"),
    ],
    ids=str,
)
def test_a_model_whose_shape_is_not_known_has_no_prediction(tmp_path, keys, line):
    make(tmp_path, "out-one", "2" * 12, [4.0, 3.0, 2.0], sizes={}, **keys)
    with pytest.raises(ValueError, match=re.escape(line)):
        add_predicted(load(tmp_path), "nvlink", "h100", 2, 1)


def test_a_point_is_dominated_beyond_noise_alone(tmp_path):
    for seed, shift in ((1, 0.0), (2, 0.02)):
        make(tmp_path, f"out-base-{seed}", "22", [4.0, 3.0, 2.0], seed=seed)
        make(tmp_path, f"out-spd-{seed}", "11", [4.0, 3.0, 2.0 + shift], seed=seed)
        make(tmp_path, f"out-one-{seed}", "01", [4.0, 3.0, 2.5 + shift], seed=seed)
    arms = load(tmp_path)
    for arm, seconds in zip(arms, (0.1, 0.2, 0.3), strict=True):
        arm.tpots["c"] = seconds
    places = [on_frontier(arm, arms, "c") for arm in arms]
    assert places == [True, True, False]  # is the baseline better than SPD? the seeds do not say
    assert warnings(arms) == []
    make(tmp_path, "out-other", "11+parallel", [4.0, 3.0, 1.9], seed=7)
    other, *arms = sorted(load(tmp_path), key=lambda arm: arm.names[0] != "out-other")
    for arm, seconds in zip([other, *arms], (0.05, 0.1, 0.2, 0.3), strict=True):
        arm.tpots["c"] = seconds
    places = [on_frontier(arm, [other, *arms], "c") for arm in arms]
    assert places == [True, True, False]  # with another seed the loss may be another one
