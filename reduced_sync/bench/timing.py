"""What one rank measures of decoding: the times of tokens, of all-reduces, and of what they are made of."""

import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

import reduced_sync_model as rsm
from reduced_sync import decoding
from reduced_sync.bench import cost_model
from reduced_sync.bench.candidates import build, configs_of, synchronize
from reduced_sync.distributed import Layout

OPERATORS = torch.ops._c10d_functional  # those of an all-reduce in two halves, start and wait


class AllReduceMeter:
    """Inside it, every all-reduce is counted and timed, on the device where it runs. Of one in two halves both count.

    On a CPU its result is there `added_delay` seconds after its start on this rank at the earliest: a slower link.
    """

    def __init__(self, device):
        self.device, self.calls, self.in_flight, self.added_delay = device, [], {}, 0.0

    def mark(self) -> float | torch.cuda.Event:
        """This moment: seconds on a CPU, an event in a GPU's queue."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def hold(self, begin: float | torch.cuda.Event) -> None:
        """Wait for the added delay of what began then. Not asleep: that could take longer."""
        while self.added_delay and time.perf_counter() < begin + self.added_delay:
            pass

    def all_reduce(self, tensor: torch.Tensor, *arguments, **keys) -> dist.Work | None:
        """dist.all_reduce, timed."""
        begin = self.mark()
        work = self.originals[0](tensor, *arguments, **keys)
        self.hold(begin)
        self.calls.append((tensor.nbytes, [(begin, self.mark())]))
        return work

    def start(self, tensor: torch.Tensor, *arguments) -> torch.Tensor:
        """The operator that starts an all-reduce, timed."""
        begin = self.mark()
        total = self.originals[1](tensor, *arguments)
        spans = [(begin, self.mark())]
        self.calls.append((tensor.nbytes, spans))
        self.in_flight[id(total)] = total, spans
        return total

    def wait(self, total: torch.Tensor) -> torch.Tensor:
        """The operator that waits for what `start` has started, timed."""
        _, spans = self.in_flight.pop(id(total))
        begin = self.mark()
        arrived = self.originals[2](total)
        self.hold(spans[0][0])
        spans.append((begin, self.mark()))
        return arrived

    def __enter__(self):
        self.originals = dist.all_reduce, OPERATORS.all_reduce, OPERATORS.wait_tensor
        dist.all_reduce, OPERATORS.all_reduce, OPERATORS.wait_tensor = self.all_reduce, self.start, self.wait
        return self

    def __exit__(self, *_):
        dist.all_reduce, OPERATORS.all_reduce, OPERATORS.wait_tensor = self.originals

    def take(self) -> list[tuple[int, float]]:
        """[(bytes, seconds)] of the calls since the last take, after they have ended."""
        synchronize(self.device)  # an event has no time before the GPU has come to it
        on_cpu = self.device.type == "cpu"
        taken = [
            (size, sum(b - a if on_cpu else a.elapsed_time(b) / 1000 for a, b in spans)) for size, spans in self.calls
        ]
        self.calls = []
        return taken


def sharing(base: rsm.GPT, config: rsm.GPTConfig, group: dist.ProcessGroup | None) -> rsm.GPT:
    """A model with the weights of `base`, another TP group, and a config that differs in no tensor's shape."""
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


def shape_of(config: rsm.GPTConfig) -> tuple:
    """What two candidates must have in common to share their weights."""
    return config.n_layer, config.n_embd, config.n_head, config.n_shard


class Decoding:
    """A rank of a candidate, ready to decode: all of args.candidates, or transformers' GPT-2.

    Those that differ in no tensor's shape share their weights. Called, it generates in every case once and returns
    ({case: (TTFT, [seconds of each further token], all-reduces)}, constants). A case is (name, whether all-reduces are
    sent, batch size, tokens of the prompt, microseconds that an all-reduce takes at least).
    """

    def __init__(self, candidate, layout, args):
        self.candidate, self.layout, self.args = candidate, layout, args
        self.device, self.meter = layout.device, AllReduceMeter(layout.device)
        self.lengths = list(itertools.product(args.batch_sizes, args.prompts))
        self.prompts = {(B, T): torch.randint(args.vocab_size, (B, T), device=self.device) for B, T in self.lengths}
        base, silent_group = build(candidate, layout, args).eval(), None
        if candidate.tp_size > 1:
            from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend

            silent_group = dist.new_group(backend="fake")  # its all-reduces send nothing
        if not candidate.keys:
            if candidate.tp_size > 1:
                tensor_parallel_gpt2(base, candidate.tp_size, self.device.type)
            self.models = {(candidate.name, True): base.to(layout.dtype)}
            self()
            return
        decoding.cast(base, layout.dtype)
        self.models, bases = {}, {shape_of(base.config): base}
        for name, config in configs_of(args).items():
            shape = shape_of(config)
            if shape not in bases:
                bases[shape] = rsm.GPT(config, layout.tp_group).to(self.device)
                decoding.cast(bases[shape], layout.dtype)
            if candidate.compile:  # all would take a minute each: the first has to do
                group = silent_group if candidate.silent else layout.tp_group
                self.models[name, not candidate.silent] = self.silent = sharing(bases[shape], config, group)
                break
            self.models[name, True] = sharing(bases[shape], config, layout.tp_group)
            if candidate.tp_size > 1:
                self.models[name, False] = sharing(bases[shape], config, silent_group)
        if not candidate.compile:
            self.silent = decoding.for_decoding(sharing(base, base.config, silent_group))
        self.models = {case: decoding.for_decoding(model, candidate.compile) for case, model in self.models.items()}
        small = dataclasses.replace(base.config, n_embd=4 * args.n_head, head_size=0, n_hidden=0, vocab_size=64)
        self.small = decoding.for_decoding(rsm.GPT(small, silent_group).to(self.device).eval())
        self()  # what is compiled, allocated or paged in at first

    def __call__(self):
        cases = {}
        first, *others = self.models.items()
        self.models = dict([*others, first])  # each round in another order, since some moments are slow for all
        for (name, sent), model in self.models.items():
            metered = not self.candidate.compile  # else its graph would break at each all-reduce
            delays = self.args.added_delay_us if metered and sent and self.candidate.tp_size > 1 else (0,)
            for (B, T), delay in itertools.product(self.lengths, delays):
                if self.candidate.tp_size > 1:
                    dist.barrier()
                self.meter.added_delay = delay / 1e6
                with torch.inference_mode(), self.meter if metered else contextlib.nullcontext():
                    begin, n_tokens = time.perf_counter(), self.args.new_tokens + 1
                    if self.candidate.keys:
                        times = our_times(model, self.prompts[B, T], n_tokens, self.layout)
                    else:
                        times = gpt2_times(model, self.prompts[B, T], n_tokens)
                steps = [b - a for a, b in itertools.pairwise(times)]
                cases[name, sent, B, T, delay] = (times[0] - begin, steps, self.meter.take())
        self.meter.added_delay = 0.0
        with torch.inference_mode(), self.layout.autocast():
            return cases, self.constants() if self.candidate.keys else None

    def constants(self) -> dict:
        """What bounds and cost model need to know of this rank, measured while all ranks measure it."""
        args, tp_size = self.args, self.candidate.tp_size
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
            rope = self.silent.rope(0, T) if self.silent.config.position == "rope" else None
            for i in range(args.n_layer):
                x = self.silent.run_blocks(x, rope, range(i, i + 1))
                if group is not None:
                    with self.meter:
                        dist.all_reduce(x, group=group)

        for B, T in self.lengths:
            found["bandwidth", B] = n_bytes / seconds_of(partial(multiply_all, B), self.device)
            flops = args.n_layer * sum(n for _, n in cost_model.sublayers(self.silent.config, tp_size, B, T, T))
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
