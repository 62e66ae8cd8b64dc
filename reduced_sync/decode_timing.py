"""What one rank measures of decoding: the times of tokens, of all-reduces, and of what they are made of."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

import reduced_sync_model as rsm
from reduced_sync import decoding, latency
from reduced_sync.candidates import build, parse_candidate, synchronize
from reduced_sync.parallel import Layout


def patterns_of(args: Any) -> dict[str, str]:
    """{name: sync pattern} of the variants to decode with."""
    return {name: parse_candidate(f"{name}@{args.n_shard}", args.n_layer).pattern for name in args.patterns}


class AllReduceMeter:
    """Inside it, every dist.all_reduce is counted and timed, on the device where it runs."""

    def __init__(self, device):
        self.device, self.calls = device, []

    def mark(self) -> float | torch.cuda.Event:
        """This moment: seconds on a CPU, an event in a GPU's queue."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def all_reduce(self, tensor: torch.Tensor, *arguments, **keys) -> dist.Work | None:
        """dist.all_reduce, timed."""
        begin = self.mark()
        work = self.original(tensor, *arguments, **keys)
        self.calls.append((tensor.nbytes, begin, self.mark()))
        return work

    def __enter__(self):
        self.original, dist.all_reduce = dist.all_reduce, self.all_reduce
        return self

    def __exit__(self, *_):
        dist.all_reduce = self.original

    def take(self) -> list[tuple[int, float]]:
        """[(bytes, seconds)] of the calls since the last take, after they have ended."""
        synchronize(self.device)  # an event has no time before the GPU has come to it
        on_cpu = self.device.type == "cpu"
        taken = [(size, b - a if on_cpu else a.elapsed_time(b) / 1000) for size, a, b in self.calls]
        self.calls = []
        return taken


def sharing(base: rsm.GPT, pattern: str, group: dist.ProcessGroup | None) -> rsm.GPT:
    """A model with the weights of `base`, another sync pattern and another TP group."""
    config = dataclasses.replace(base.config, sync_pattern=pattern)
    with torch.device("meta"):
        model = rsm.GPT(config, group)
    model.load_state_dict(base.state_dict(), assign=True)
    return model.eval()


def tensor_parallel_gpt2(model: torch.nn.Module, tp_size: int, device_type: str) -> torch.nn.Module:
    """transformers' GPT-2 cut by PyTorch's own tensor parallelism (torch.distributed.tensor.parallel), in place.

    That cuts nn.Linear, so the Conv1D layers become such; Q, K and V are reordered so that equal chunks are heads.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = dist.init_device_mesh(device_type, (tp_size,))
    for block in model.transformer.h:
        for owner, names in ((block.attn, ("c_attn", "c_proj")), (block.mlp, ("c_fc", "c_proj"))):
            for name in names:
                conv = getattr(owner, name)
                weight, bias = conv.weight.t(), conv.bias
                if name == "c_attn":
                    weight, bias = (
                        t.unflatten(0, (3, tp_size, -1)).transpose(0, 1).flatten(0, 2) for t in (weight, bias)
                    )
                linear = torch.nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
                linear.weight = torch.nn.Parameter(weight.detach().contiguous())
                linear.bias = torch.nn.Parameter(bias.detach().clone())
                setattr(owner, name, linear)
        block.attn.num_heads //= tp_size
        block.attn.split_size //= tp_size
        plan = {"attn.c_attn": ColwiseParallel(), "attn.c_proj": RowwiseParallel()}
        parallelize_module(block, mesh, plan | {"mlp.c_fc": ColwiseParallel(), "mlp.c_proj": RowwiseParallel()})
    return model


def gpt2_times(model: torch.nn.Module, idx: torch.Tensor, n_tokens: int) -> list[float]:
    """The moments at which transformers' generate has each of n_tokens tokens."""
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        def __init__(self):
            self.times = []

        def put(self, value):
            self.times.append(time.perf_counter())

        def end(self):
            pass

    clock = Clock()
    keys = dict(do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0, streamer=clock)
    model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n_tokens, **keys)
    return clock.times[1:]  # the first is the prompt's


def our_times(model: torch.nn.Module, idx: torch.Tensor, n_tokens: int, layout: Layout) -> list[float]:
    """The same of our generate, which sample.py uses, too."""
    times = []
    for new in decoding.generate(model, idx, n_tokens, lambda logits: logits.argmax(-1), layout.autocast):
        new.tolist()  # as somebody who reads them
        times.append(time.perf_counter())
    return times


def seconds_of(function: Callable, device: torch.device, repeats: int = 5) -> float:
    """Median seconds of a call."""
    taken = []
    for _ in range(repeats):
        synchronize(device)
        begin = time.perf_counter()
        function()
        synchronize(device)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


class Decoding:
    """A rank of a candidate, ready to decode: every pattern on the same weights, or transformers' GPT-2.

    Called, it generates in every case once and returns ({case: (TTFT, [seconds of each further token], all-reduces)},
    constants). A case is (name, whether all-reduces are sent, batch size, tokens of the prompt).
    """

    def __init__(self, candidate, layout, args):
        self.candidate, self.layout, self.args = candidate, layout, args
        self.device, self.meter = layout.device, AllReduceMeter(layout.device)
        self.lengths = list(itertools.product(args.batch_sizes, args.prompts))
        self.prompts = {(B, T): torch.randint(args.vocab_size, (B, T), device=self.device) for B, T in self.lengths}
        base, self.silent_group = build(candidate, layout, args).eval(), None
        if candidate.tp_size > 1:
            from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend

            self.silent_group = dist.new_group(backend="fake")  # its all-reduces send nothing
        if not candidate.pattern:
            if candidate.tp_size > 1:
                tensor_parallel_gpt2(base, candidate.tp_size, self.device.type)
            self.models = {(candidate.name, True): base.to(layout.dtype)}
            self()
            return
        decoding.cast(base, layout.dtype)
        self.models = {}
        for name, pattern in patterns_of(args).items():
            self.models[name, True] = sharing(base, pattern, layout.tp_group)
            if candidate.tp_size > 1:
                self.models[name, False] = sharing(base, pattern, self.silent_group)
        self.silent = sharing(base, candidate.pattern, self.silent_group)
        if candidate.compile:  # every pattern would take a minute: the first has to do
            self.silent = self.models[args.patterns[0], True]
            self.models = {(args.patterns[0], True): self.silent}
        else:
            decoding.for_decoding(self.silent)
        self.models = {case: decoding.for_decoding(model, candidate.compile) for case, model in self.models.items()}
        small = dataclasses.replace(base.config, n_embd=4 * args.n_head, head_size=0, n_hidden=0, vocab_size=64)
        self.small = decoding.for_decoding(rsm.GPT(small, self.silent_group).to(self.device).eval())
        self()  # what is compiled, allocated or paged in at first

    def __call__(self):
        cases = {}
        first, *others = self.models.items()
        self.models = dict([*others, first])  # each round in another order, since some moments are slow for all
        for (name, sent), model in self.models.items():
            for B, T in self.lengths:
                if self.candidate.tp_size > 1:
                    dist.barrier()
                with torch.inference_mode(), self.meter:
                    begin, n_tokens = time.perf_counter(), self.args.new_tokens + 1
                    if self.candidate.pattern:
                        times = our_times(model, self.prompts[B, T], n_tokens, self.layout)
                    else:
                        times = gpt2_times(model, self.prompts[B, T], n_tokens)
                steps = [b - a for a, b in itertools.pairwise(times)]
                cases[name, sent, B, T] = (times[0] - begin, steps, self.meter.take())
        with torch.inference_mode(), self.layout.autocast():
            return cases, self.constants() if self.candidate.pattern else None

    def constants(self) -> dict:
        """What bounds and cost model need to know of this rank, measured while all ranks measure it."""
        args, tp_size, blocks = self.args, self.candidate.tp_size, self.silent.transformer.h
        weights = [decoding.matrix(m) for m in self.silent.modules() if isinstance(m, decoding.LINEAR)]
        n_bytes = sum(w.nbytes for w in weights)
        # the very memory that is read: how fast that is differs from place to place on a virtual machine
        found = {"stream": n_bytes / seconds_of(lambda: [w.sum() for w in weights], self.device)}
        if self.candidate.compile:
            return found

        def multiply_all(B):
            """The products of a decode step, alone."""
            inputs = {shape: weights[0].new_ones(shape) for shape in {(len(w), B, w.size(2)) for w in weights}}
            few = self.device.type == "cpu" and B <= decoding.FEW
            for w in weights:
                x = inputs[len(w), B, w.size(2)]
                decoding.multiply_few(x, w) if few else torch.bmm(x, w.mT)

        def run_blocks(B, T, group=None):
            """All blocks on T tokens; with a group, a real all-reduce behind each."""
            x = torch.zeros(B, T, args.n_embd, device=self.device)
            config = self.silent.config
            stream = rsm.Stream(x, config, self.silent.tp_group)
            rope = self.silent.rope(0, T) if config.position == "rope" else None
            for block, character in zip(blocks, config.sync_pattern, strict=True):
                block(stream, character, rope)
                if group is not None:
                    with self.meter:
                        dist.all_reduce(x, group=group)

        for B, T in self.lengths:
            found["bandwidth", B] = n_bytes / seconds_of(partial(multiply_all, B), self.device)
            flops = latency.flops(latency.Shape(args.n_layer, args.n_embd, 0), tp_size, B, T, T)
            found["peak", B, T] = flops / seconds_of(partial(run_blocks, B, T), self.device, repeats=3)
            times = our_times(self.small, self.prompts[B, T] % 64, 21, self.layout)
            found["overhead", B] = (times[-1] - times[0]) / 20 / args.n_layer
            for t in (1, T) if tp_size > 1 else ():
                passes = []
                for _ in range(7):
                    run_blocks(B, t, self.layout.tp_group)
                    passes.append(statistics.mean(seconds for _, seconds in self.meter.take()))
                found["all_reduce", B, t] = statistics.median(passes)
        return found
