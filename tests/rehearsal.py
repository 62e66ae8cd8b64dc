"""Rehearse runs on CUDA without a GPU: the real train() and sample() on fake tensors that say they are on cuda:0.

    python tests/rehearsal.py LIBRARY 'CASE' ...    a case is JSON: keys of the training script
    python tests/rehearsal.py LIBRARY memory        the memory table of docs/memory.md, in three minutes
    python tests/rehearsal.py LIBRARY '{"drop": 24, "tp_size": 1}'     drop_syncs.py's keys: an 8 B Llama

LIBRARY is fake_cuda.cpp, compiled as below; it has to be loaded before torch. Fake tensors have shapes, types and
devices but no numbers: what shows are wrong devices and types, graph breaks, recompilations, host synchronizations and
memory. The process group is torch's "fake" one, of WORLD_SIZE ranks of which this is rank 0. A case prints a line of
JSON:

    host_waits  of each update: how often Python waits for a number on the GPU
    graphs      [graphs compiled for training, graphs compiled for evaluation]
    on_cpu      whether all tensors of the checkpoint were on the CPU
    tokens      how many tokens sample.py's prefill and decode gave
    decoding    [CUDA graphs of its decode steps, how often Python waits for a number while they are captured]

or, where it has `candidates`, the all-reduces that bench.py decode counts in a decode step of each, and the graphs that
it makes; where it has `drop`, the most GB that a GPU holds in each stage of drop_syncs.py; or, where it has n_embd, of
the 124M model with these keys and no compilation:

    peak        bytes that the GPU holds at most: parameters, gradients, moments, activations, and an evaluation's

    T=$(python -c "import torch; print(torch.__path__[0])")
    P=$(python -c "import sysconfig; print(sysconfig.get_path('include'))")
    L="-L$T/lib -lc10 -ltorch_cpu -Wl,-rpath,$T/lib"
    g++ -shared -fPIC -std=c++20 -I$T/include -I$P tests/fake_cuda.cpp -o LIBRARY $L
"""

import contextlib
import ctypes
import dataclasses
import io
import json
import sys
import tempfile
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

ctypes.CDLL(sys.argv[1])

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench
import drop_syncs
import reduced_sync_model as rsm
import sample
import train_reduced_sync as script
from reduced_sync import checkpoint, distributed, preparing
from reduced_sync.bench import timing
from reduced_sync.bench.candidates import Candidate
from reduced_sync.configurator import configure
from reduced_sync.decoding import Decoder

host_waits = 0
SHAPE = dict(n_layer=2, n_head=4, n_embd=32, block_size=16, batch_size=2, gradient_accumulation_steps=4)
SHAPE |= dict(max_iters=3, eval_interval=10, eval_iters=2, warmup_iters=1, log_interval=1, device="cuda")


def answering(answer):
    """A method of fake tensors that asks for a number: gives `answer`, and counts where the GPU has the number."""

    def method(tensor):
        global host_waits
        host_waits += tensor.device.type == "cuda"
        return answer(tensor)

    return method


def pretend_cuda():
    """Have torch's Python side believe in eight GPUs."""
    answers = dict(is_available=True, is_bf16_supported=True, device_count=8, current_device=0, init=None)
    answers |= dict(get_device_name="NVIDIA H100 80GB HBM3", get_device_capability=(9, 0), _lazy_init=None)
    answers |= dict(get_rng_state=None, set_rng_state=None)
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch._C._cuda_setDevice = lambda index: None
    FakeTensorMode.avoid_device_init = True  # torch.tensor(numbers, device="cuda") asks no driver
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.Tensor.pin_memory = lambda tensor: tensor
    FakeTensor.item = answering(lambda tensor: 1.0 if tensor.is_floating_point() else 1)
    FakeTensor.tolist = answering(lambda tensor: [1] * len(tensor))
    for name, answer in dict(__bool__=True, __int__=1, __float__=1.0, __index__=1).items():
        setattr(FakeTensor, name, answering(lambda tensor, answer=answer: answer))

    # the kernel that a GPU takes; fake tensors would take the one that makes the whole matrix of scores
    def attention(q, k, v, attn_mask=None, is_causal=False, dropout_p=0.0, enable_gqa=False):
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16, (q.dtype, k.dtype, v.dtype)
        assert enable_gqa == (q.size(1) > k.size(1))
        if attn_mask is not None:  # the flash kernel takes none: only a decode step has one
            assert not is_causal and attn_mask.shape == (1, 1, 1, k.size(2)) and q.size(2) == 1
            return torch.empty_like(q)
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]

    F.scaled_dot_product_attention = attention
    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, capture


class Graph:
    """A CUDAGraph."""

    captured = waits = 0

    def replay(self):
        """Nothing: the numbers of fake tensors are always there."""


@contextlib.contextmanager
def capture(graph, capture_error_mode):
    """torch.cuda.graph, in which nothing may be copied from the host."""

    def tensor(*_, **__):
        raise AssertionError("torch.tensor in a CUDA graph")

    before = host_waits
    with replaced(torch, tensor=tensor):
        yield
    Graph.captured += 1
    Graph.waits += host_waits - before


def pretend_ranks():
    """Have torch.distributed join a group in which nothing is sent."""
    join = dist.init_process_group

    def init_process_group(backend, store, device_id, **keys):
        assert backend == "nccl" and device_id == torch.device("cuda:0"), (backend, device_id)
        join("fake", store=store, **keys)

    dist.rendezvous = lambda *_, **__: iter([(FakeStore(), 0, 1)])
    dist.init_process_group = init_process_group
    dist.get_backend = lambda *_: "nccl"
    summed = distributed.sum_over_world

    def sum_over_world(values, device):
        summed(values, device)
        return values

    distributed.sum_over_world = sum_over_world


def pretend_model():
    """Build models on the device instead of moving them there: tied fake weights cannot be moved."""
    build = rsm.GPT.__init__

    def __init__(self, *arguments, **keys):
        with torch.device("cuda:0"):
            build(self, *arguments, **keys)

    rsm.GPT.__init__ = __init__
    rsm.GPT.to = lambda self, device: self


@contextlib.contextmanager
def replaced(owner, **attributes):
    """Inside it, `owner` has these attributes."""
    before = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def train(keys, out_dir):
    """Train with `keys`; returns (the checkpoint last saved, host synchronizations of each update)."""
    config = configure(script.Config, [f"--{key}={value}" for key, value in (keys | {"out_dir": out_dir}).items()])
    step, saved, counts = torch.optim.AdamW.step, [], []

    def counted_step(optimizer):
        global host_waits
        counts.append(host_waits)
        step(optimizer)
        host_waits = 0

    with (
        replaced(torch.optim.AdamW, step=counted_step),
        replaced(checkpoint, save=lambda state, *_: saved.append(state)),
    ):
        script.train(config, script.prepare(config))
    return saved[-1], counts[1:]  # before the first update there is an evaluation


def generate(state, n_tokens):
    """Prefill and decode with the model of a checkpoint, over all ranks; returns the number of tokens printed."""
    config = sample.Config(start="ab", max_new_tokens=n_tokens, num_samples=2, device="cuda")
    layout = distributed.start(*distributed.choose_device("cuda"), tp_size=distributed.WORLD_SIZE, timeout_s=60)
    gpt = rsm.GPTConfig(**state["model_args"])
    if gpt.position == "rope":  # as Llama 3 has it
        gpt = dataclasses.replace(gpt, rope_inv_freq=(1.0,) * (gpt.head_size // 2))
    model = sample.build(config, state, gpt, layout)
    dtypes = {p.dtype for name, p in model.named_parameters() if ".ln_" not in name}
    assert dtypes == {torch.bfloat16}, dtypes
    cpu_generator = torch.Generator()
    with (
        replaced(torch, Generator=lambda device: cpu_generator),
        replaced(Decoder, SHORTEST=4),
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        sample.sample(config, model, sample.Tokens(state["data"]), state["data"]["vocab_size"], layout)
    return printed.getvalue().count(state["data"]["chars"][1])


def rehearse(keys):
    """Train, save and sample with `keys` on top of SHAPE; returns what the top of this file says, but the peak."""
    graphs = {True: 0, False: 0}

    def counting(graph, inputs):
        graphs[torch.is_grad_enabled()] += 1
        return graph.forward

    with tempfile.TemporaryDirectory() as out_dir, replaced(torch, compile=partial(torch.compile, backend=counting)):
        state, counts = train(SHAPE | keys, out_dir)
    torch._dynamo.reset()
    tensors = [*state["model"].values(), *(t for one in state["optimizer"].values() for t in one.values())]
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    if dist.is_initialized():
        dist.destroy_process_group()
    Graph.captured = Graph.waits = 0
    tokens, decoding = generate(state, SHAPE["block_size"] + 4), [Graph.captured, Graph.waits]
    if dist.is_initialized():
        dist.destroy_process_group()
    found = {"host_waits": counts, "graphs": [graphs[True], graphs[False]], "on_cpu": on_cpu}
    return found | {"tokens": tokens, "decoding": decoding}


class Memory(TorchDispatchMode):
    """Inside it, the bytes of all storages on the GPU are added up while they live: `now`, and at `most`."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.living = set()

    def __torch_dispatch__(self, operator, types, arguments=(), keys=None):
        result = operator(*arguments, **keys or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.living:
                    self.living.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def freed(self, identity, nbytes):
        self.living.discard(identity)
        self.now -= nbytes


def peak(keys):
    """Bytes held at most in uncompiled updates of the 124M model with `keys`, evaluation included."""
    keys = dict(max_iters=2, eval_interval=2, eval_iters=1, gradient_accumulation_steps=2, warmup_iters=0) | keys
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.zeros(2 * 12 * 1024 + 1, "<u2")  # which they are makes no difference
        splits = {split: (len(tokens), [tokens]) for split in ("train", "val")}
        with contextlib.redirect_stdout(sys.stderr):
            preparing.write_dataset(Path(folder), splits, vocab_size=50257, tokenizer="gpt2", source="zeros")
            with Memory() as memory:
                train(keys | dict(device="cuda", compile=False, dataset=folder), folder)
    return memory.most


LLAMA_8B = dict(n_head=32, n_kv_head=8, n_embd=4096, n_hidden=14336, vocab_size=128256, block_size=8192)
LLAMA_8B |= dict(norm="rmsnorm", position="rope", mlp="swiglu", bias=False, tie_embeddings=False)


class Llama:
    """A Source of drop_syncs.py: a Llama whose 32 layers are 8 B parameters."""

    def __init__(self, n_layer):
        self.n_layer = n_layer

    def build(self, n_shard, tp_group):
        return rsm.GPT(rsm.GPTConfig(**LLAMA_8B, n_layer=self.n_layer, n_shard=n_shard), tp_group)


def drop_peaks(keys):
    """GB held at most in each stage of drop_syncs.py, which a Llama in eight shards goes through."""
    llama = Llama(keys.get("n_layer", 32))
    keys = {key: value for key, value in keys.items() if key != "n_layer"}
    keys = dict(n_shard=8, arrange="as_is", block_size=2048, batch_size=1, step_windows=2, device="cuda") | keys
    config = drop_syncs.Config(**dict(distil_tokens=8192, finetune_tokens=8192, compile=False) | keys)
    window = torch.zeros(1, config.block_size, dtype=torch.long)
    prepared = drop_syncs.Prepared(distributed.choose_device("cuda"), llama, None, {}, window, {"text": window}, {})
    peaks = {}

    def noting(run, line):  # at the end of a part of a stage
        peaks[run.progress.stage] = max(peaks.get(run.progress.stage, 0.0), round(memory.most / 1e9, 1))
        memory.most = memory.now

    no_files = dict(say=noting, save=lambda *_, **__: None)
    drawn = dict(random_windows=lambda texts, n, length, generator: window.expand(n, -1))
    with (
        replaced(drop_syncs, RANK=1),  # rank 0 would write the log and the figure
        replaced(drop_syncs.Run, **no_files),
        replaced(drop_syncs.texts, **drawn),
        replaced(drop_syncs.quality, agreed_length=lambda *_: 0.0),  # autocast's casts of a cache are none of Python's
        Memory() as memory,
    ):
        drop_syncs.drop_syncs(drop_syncs.Run(config, prepared))
    if dist.is_initialized():
        dist.destroy_process_group()
    return peaks


def bench_decode(candidates):
    """What bench.py decode finds of its candidates of two layers, as rank 0 of two."""
    args = bench.Decode(n_layer=2, n_embd=32, n_head=4, vocab_size=64, block_size=32)
    work = timing.Workload({name: args.config(name, 2) for name in candidates}, (1,), (5,), new_tokens=2)
    layout = distributed.start(*distributed.choose_device("cuda"), tp_size=2, timeout_s=60)
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda other: 1.0)
    idle = dict(Event=lambda enable_timing: event, synchronize=lambda *_: None)
    with replaced(torch.cuda, **idle), replaced(dist, barrier=lambda: None):
        found = timing.Decoding(Candidate("ours", args.config("baseline", 2), tp_size=2), layout, work)()
    times = {name: bench.summarize([[found]], timing.Condition(name, True, 1, 5)) for name in candidates}
    counts = {name: one.all_reduces for name, one in times.items()}
    return {"all_reduces": counts, "timed": [one.in_all_reduces_s for one in times.values()], "graphs": Graph.captured}


def memory_table():
    """Peak GB by variant and n_shard, and the largest batches that fit 24 and 80 GB."""
    rows = {
        "baseline": {},
        "spd": dict(sync="spd"),
        "grouped-4": dict(sync="grouped-4"),
        "grouped-2": dict(sync="grouped-2"),
    }
    divisors = [n for n in range(1, 61) if 60 % n == 0]  # of the 480 sequences of a step, on eight GPUs
    for name, keys in rows.items():
        cells = []
        for n_shard in (1, 2, 4, 8):
            keys = keys | dict(n_shard=n_shard, n_head=16 if n_shard == 8 else 12)
            keys |= dict(sync="baseline") if n_shard == 1 else rows[name]  # one shard has no syncs to drop
            at_6, at_12 = (peak(keys | dict(batch_size=n)) / 1e9 for n in (6, 12))
            # 2 GB are CUDA's, NCCL's and lost between blocks
            fits = [max(n for n in divisors if at_12 + (n - 12) / 6 * (at_12 - at_6) < size - 2) for size in (24, 80)]
            cells += [f"{at_12:.1f}", f"{fits[0]}, {fits[1]}"]
        print("| " + " | ".join([name, *cells[::2], *cells[1::2]]) + " |", flush=True)


def main(cases):
    pretend_cuda()
    pretend_ranks()
    pretend_model()
    with FakeTensorMode(allow_non_fake_inputs=True):
        if cases == ["memory"]:
            memory_table()
        else:
            for case in map(json.loads, cases):
                if "candidates" in case:
                    result = bench_decode(**case)
                elif "drop" in case:
                    result = drop_peaks(case)
                else:
                    result = {"peak": peak(case)} if "n_embd" in case else rehearse(case)
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[2:])
