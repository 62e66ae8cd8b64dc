"""CUDA without a GPU: how a device is chosen, and the real training and sampling on fake cuda tensors (rehearsal.py).

tests/test_gpu.py needs a GPU.
"""

import json
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from launch import ROOT, run_script, succeeded
from torch.nn import functional as F

import reduced_sync_model as rsm
from reduced_sync import distributed
from reduced_sync.bench import timing

COMPILER = shutil.which("g++")
VARIANTS = [
    dict(sync="baseline"),
    dict(sync="spd"),
    dict(sync="grouped-1"),
    dict(sync="a1"),
    dict(sync="spd+parallel"),
    dict(sync="grouped-1+desync"),
    dict(sync="baseline+ladder"),
    dict(sync="baseline+delayed"),
    dict(sync="spd", norm="rmsnorm", position="rope", mlp="swiglu", n_kv_head=2),
]


# --- a rehearsal on fake tensors


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """fake_cuda.cpp, compiled against the installed torch."""
    if torch.version.cuda:
        pytest.skip("this torch is built for CUDA and has its hooks: nothing to pretend")
    if COMPILER is None:
        pytest.skip("no C++ compiler (g++) for fake_cuda.cpp")
    torch_folder = Path(torch.__file__).parent
    path = tmp_path_factory.mktemp("fake_cuda") / "fake_cuda.so"
    command = [COMPILER, "-shared", "-fPIC", "-std=c++20", f"-I{torch_folder}/include", ROOT / "tests/fake_cuda.cpp"]
    command += [f"-I{sysconfig.get_path('include')}", "-o", path, f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run([*command, f"-Wl,-rpath,{torch_folder}/lib"], check=True, timeout=100)
    return path


def rehearse(library, cases, world_size=1):
    """What rehearsal.py finds of each case, as rank 0 of `world_size`."""
    environment = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    argv = [ROOT / "tests/rehearsal.py", library, *map(json.dumps, cases)]
    lines = succeeded(run_script(argv, env=environment, timeout=250)).splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(found) == len(cases)
    return found


@pytest.mark.parametrize("tp_size, n_shard, variants", [(1, 1, VARIANTS[:1]), (1, 2, VARIANTS), (2, 4, VARIANTS)])
def test_every_variant_trains_saves_and_samples_on_fake_cuda(library, small_dataset, tp_size, n_shard, variants):
    """No wrong device or type; one graph to train and one to evaluate; the host waits for loss and norm alone.

    With several ranks it waits once more, for what they agree on. Of 16 places three lengths are decoded in, a CUDA
    graph each, in which the host waits for nothing.
    """
    cases = [variant | dict(n_shard=n_shard, tp_size=tp_size, dataset=str(small_dataset)) for variant in variants]
    if tp_size == 2:
        cases += [cases[0] | dict(tp_size=1), cases[1] | dict(n_shard=2)]  # two replicas; one shard a rank
    for case, found in zip(cases, rehearse(library, cases, tp_size), strict=True):
        waits = 2 if tp_size == 1 else 3
        expected = {"host_waits": [waits] * 2, "graphs": [1, 1], "on_cpu": True, "tokens": 40, "decoding": [3, 0]}
        assert found == expected, case


def test_the_memory_table_says_what_a_step_holds(library):
    """Cells of the table in docs/memory.md, computed anew."""
    text = (ROOT / "docs/memory.md").read_text()
    table = {row[0]: row[1:] for row in re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", text, re.M)}
    keys = dict(n_embd=768, sync="grouped-4")
    cases = [dict(n_embd=768, n_shard=1), dict(n_embd=768, sync="spd", n_shard=2), keys | dict(n_shard=4)]
    peaks = [f"{found['peak'] / 1e9:.1f}" for found in rehearse(library, cases)]
    assert peaks == [table["baseline"][0], table["spd"][1], table["grouped-4"][2]]


def test_dropping_syncs_of_a_large_llama_on_fake_cuda(library):
    """Every stage, as one of eight ranks: weights, gradients, moments and teacher, and not much besides."""
    (peaks,) = rehearse(library, [dict(drop=2, tp_size=8, n_layer=2)], world_size=8)
    assert list(peaks) == ["dense", "drop", "distil", "finetune", "report"]
    embeddings, layers = 2 * 128256 * 4096, 2 * 4096 * (6144 + 4096 + 3 * 14336)
    held = (16 + 4) * embeddings + (16 + 2) * layers / 8  # float32; the teacher's matrices in bfloat16
    assert held / 1e9 < peaks["finetune"] < held / 1e9 + 10
    trained = (4 + 4) * embeddings + (16 + 2) * layers / 8
    assert trained / 1e9 < peaks["distil"] < trained / 1e9 + 3


def test_bench_decodes_in_graphs_on_fake_cuda(library):
    """A graph a candidate, whether its all-reduces are sent or not; two of the model's constants, two of the link's."""
    (found,) = rehearse(library, [dict(candidates=["baseline", "spd", "baseline+ladder"])], world_size=2)
    counts = {"baseline": 4, "spd": 2, "baseline+ladder": 4}
    assert found == {"all_reduces": counts, "timed": [None] * 3, "graphs": 3 * 2 + 2 + 2}


# --- choosing a device


def pretend(monkeypatch, count=0, cuda="13.0", reason="The NVIDIA driver on your system is too old (found version 1)."):
    """Have torch find `count` GPUs, or say for what `reason` it finds none."""

    def init():
        if not count:
            raise RuntimeError(reason + " Please update it.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", cuda)


def test_a_cuda_build_that_finds_no_gpu_says_so_once(monkeypatch, capsys):
    pretend(monkeypatch)
    assert distributed.choose_device() == ("cpu", torch.float32, "gloo")
    (line,) = capsys.readouterr().err.splitlines()
    assert "built for CUDA 13.0" in line and line.endswith("driver on your system is too old (found version 1)")
    assert distributed.choose_device("cpu")[0] == "cpu" and capsys.readouterr().err == ""
    monkeypatch.setattr(distributed, "RANK", 1)
    distributed.choose_device()
    assert capsys.readouterr().err == ""
    pretend(monkeypatch, cuda=None)  # a build for CPUs
    monkeypatch.setattr(distributed, "RANK", 0)
    distributed.choose_device()
    assert capsys.readouterr().err == ""


def test_a_gpu_that_is_not_there_is_refused_with_the_reason(monkeypatch):
    pretend(monkeypatch)
    with pytest.raises(ValueError, match=r"device='cuda': torch can use no GPU here \(The NVIDIA driver .* 1\)\); try"):
        distributed.choose_device("cuda")
    pretend(monkeypatch, count=2)
    with pytest.raises(ValueError, match="needs 4 GPUs; here are 2"):
        distributed.choose_device("cuda:3", "float32")
    monkeypatch.setattr(distributed, "LOCAL_WORLD_SIZE", 8)
    with pytest.raises(ValueError, match="8 processes needs 8 GPUs; here are 2"):
        distributed.choose_device("cuda", "float32")
    with pytest.raises(ValueError, match="one GPU for 8 processes"):
        distributed.choose_device("cuda:0", "float32")


def test_a_gpu_that_emulates_bfloat16_takes_float16(monkeypatch):
    pretend(monkeypatch, count=1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert distributed.choose_device() == ("cuda", torch.float16, "nccl")


@pytest.mark.parametrize("name, index", [("cuda", 3), ("cuda:1", 1)])
def test_a_device_without_a_number_is_that_of_the_rank(monkeypatch, name, index):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert distributed.set_device(name, 3) == torch.device("cuda", index)
    assert current == [torch.device("cuda", index)]


# --- what needs no GPU to be right


def test_the_loss_is_computed_in_float32_under_autocast():
    torch.manual_seed(0)
    model = rsm.GPT(rsm.GPTConfig(block_size=16, vocab_size=512, n_layer=1, n_head=2, n_embd=32))
    model.lm_head.weight.data *= 100  # far from uniform
    x, y = torch.randint(512, (2, 2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(x, y)
        assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    exact = F.cross_entropy(logits.double().flatten(0, 1), y.flatten())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


def test_events_are_read_after_the_gpu_has_come_to_them(monkeypatch):
    """AllReduceMeter on a made-up device that is done with its work only when asked to be."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.clear()

        def elapsed_time(self, other):
            assert done, "an event was read that has not happened"
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", done.append)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    meter = timing.AllReduceMeter(torch.device("cuda", 0))
    with meter:
        torch.distributed.all_reduce(torch.zeros(3))
    assert meter.take() == [(12, 0.002)] and meter.take() == []


def test_losing_contact_keeps_what_nccl_says_last(monkeypatch, capsys):
    text = "NCCL error in: ProcessGroupNCCL.cpp:77, remote process exited or there was a network error\n"
    text += "ncclRemoteError: A call failed possibly due to a network error.\n"
    text += "Last error:\nsocketProgress: Connection closed"
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(distributed.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit), distributed.report_errors():
        raise torch.distributed.DistBackendError(text)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rank 0: lost contact with another rank: NCCL error in: ProcessGroupNCCL.cpp:77, remote")
    assert line.endswith("(socketProgress: Connection closed)")
