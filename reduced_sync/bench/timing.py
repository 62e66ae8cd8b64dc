"""What one rank measures of decoding: the times of tokens, of all-reduces, and of what they are made of."""

import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

import reduced_sync_model as rsm
from reduced_sync import decoding
from reduced_sync.bench import cost_model
from reduced_sync.bench.candidates import Candidate, build, synchronize
from reduced_sync.distributed import Layout

OVERHEAD_TOKENS = 21  # of a small model, whose time per token says what starting its operators takes
OPERATORS = torch.ops._c10d_functional  # those of an all-reduce in two halves, start and wait


class AllReduce(NamedTuple):
    """One that ran."""

    bytes: int
    seconds: float


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

    def take(self) -> list[AllReduce]:
        """The all-reduces since the last take, after they have ended."""
        synchronize(self.device)  # an event has no time before the GPU has come to it
        on_cpu = self.device.type == "cpu"
        taken = [
            AllReduce(size, sum(b - a if on_cpu else a.elapsed_time(b) / 1000 for a, b in spans))
            for size, spans in self.calls
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


@dataclass
class Workload:
    """What is decoded: with every model, every batch size and prompt, while all-reduces take at least each delay."""

    configs: dict[str, rsm.GPTConfig]
    batch_sizes: tuple[int, ...]
    prompts: tuple[int, ...]
    new_tokens: int  # after the first one
    delays_us: tuple[int, ...] = (0,)


class Condition(NamedTuple):
    """One way in which tokens are decoded."""

    model: str
    sent: bool  # or its all-reduces send nothing
    batch_size: int
    prompt: int
    delay_us: int = 0


class Generation(NamedTuple):
    """Seconds to the first token and of each further one, and the all-reduces of n_metered forward passes."""

    ttft: float
    steps: list[float]
    all_reduces: list[AllReduce]
    n_metered: int


class Constants(NamedTuple):
    """What the cost model needs to know of a rank at one batch size and prompt."""

    bandwidth: float  # bytes/s at which the products of a decode step read their weights
    peak_flops: float  # flops/s of a prefill
    overhead: float  # seconds of a layer that moves next to no data
    token_all_reduce: float = 0.0  # seconds of one in a decode step
    prompt_all_reduce: float = 0.0


class Round(NamedTuple):
    """What a rank measures at once."""

    generations: dict[Condition, Generation]
    read_rate: float | None = None  # bytes/s at which it sums its weights, where the model is ours
    constants: dict[tuple[int, int], Constants] | None = None  # by batch size and prompt, where it is not compiled


def our_models(
    candidate: Candidate, base: rsm.GPT, configs: dict[str, rsm.GPTConfig], layout: Layout, silent_group
) -> dict[tuple[str, bool], rsm.GPT]:
    """{(name, whether its all-reduces are sent): model}; those that differ in no tensor's shape share their weights.

    Of a compiled candidate the first one alone: all would take a minute each.
    """

    def shape_of(config):
        return config.n_layer, config.n_embd, config.n_head, config.n_shard

    models, bases = {}, {shape_of(base.config): base}
    if candidate.compile:
        configs = dict(itertools.islice(configs.items(), 1))
        choices = [not candidate.silent]
    else:
        choices = [True, False] if candidate.tp_size > 1 else [True]
    for name, config in configs.items():
        if (shape := shape_of(config)) not in bases:
            bases[shape] = rsm.GPT(config, layout.tp_group).to(layout.device)
            decoding.cast_matrices(bases[shape], layout.dtype)
        for sent in choices:
            models[name, sent] = sharing(bases[shape], config, layout.tp_group if sent else silent_group)
    return models


class Decoding:
    """A rank of a candidate, ready to decode: all models of a Workload, or transformers' GPT-2. Called, it measures."""

    def __init__(self, candidate, layout, work):
        self.candidate, self.layout, self.work = candidate, layout, work
        self.meter = AllReduceMeter(layout.device)
        self.prompts = {
            (B, T): torch.randint(candidate.config.vocab_size, (B, T), device=layout.device)
            for B, T in itertools.product(work.batch_sizes, work.prompts)
        }
        base, silent_group = build(candidate, layout).eval(), None
        if candidate.tp_size > 1:
            from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend

            silent_group = dist.new_group(backend="fake")  # its all-reduces send nothing
        if candidate.is_gpt2:
            if candidate.tp_size > 1:
                tensor_parallel_gpt2(base, candidate.tp_size, layout.device.type)
            self.models = {(candidate.name, True): base.to(layout.dtype)}
            return
        decoding.cast_matrices(base, layout.dtype)
        models = our_models(candidate, base, work.configs, layout, silent_group)
        self.models = {case: decoding.for_decoding(model, candidate.compile) for case, model in models.items()}
        if candidate.compile:
            (self.silent,) = models.values()
            return
        self.silent = decoding.for_decoding(sharing(base, base.config, silent_group))
        c = base.config
        longer = c.block_size + OVERHEAD_TOKENS
        small = dataclasses.replace(c, n_embd=4 * c.n_head, head_size=0, n_hidden=0, vocab_size=64, block_size=longer)
        self.small = rsm.GPT(small, silent_group).to(layout.device).eval()
        decoding.cast_matrices(self.small, layout.dtype)
        decoding.for_decoding(self.small)

    def __call__(self) -> Round:
        """Generate under every condition once, in another order each time, since some moments are slow for all."""
        generations = {}
        first, *others = self.models.items()
        self.models = dict([*others, first])
        on_cuda, compiled = self.layout.device.type == "cuda", self.candidate.compile
        for (name, sent), model in self.models.items():
            metered = not compiled and not on_cuda  # a graph would break, or hold the meter's events
            delays = self.work.delays_us if metered and sent and self.candidate.tp_size > 1 else (0,)
            for (B, T), delay in itertools.product(self.prompts, delays):
                if self.candidate.tp_size > 1:
                    dist.barrier()
                self.meter.added_delay = delay / 1e6
                with torch.inference_mode(), self.meter if metered else contextlib.nullcontext():
                    begin, n_tokens = time.perf_counter(), self.work.new_tokens + 1
                    if self.candidate.is_gpt2:
                        times = gpt2_times(model, self.prompts[B, T], n_tokens)
                    else:
                        times = our_times(model, self.prompts[B, T], n_tokens, self.layout)
                if on_cuda and not compiled:  # in a graph they are not seen: one forward pass without
                    with torch.inference_mode(), self.layout.autocast(), self.meter:
                        model(self.prompts[B, T][:, :1])
                steps = [b - a for a, b in itertools.pairwise(times)]
                condition = Condition(name, sent, B, T, delay)
                n_metered = n_tokens if metered else 1
                generations[condition] = Generation(times[0] - begin, steps, self.meter.take(), n_metered)
        self.meter.added_delay = 0.0
        if self.candidate.is_gpt2:
            return Round(generations)
        with torch.inference_mode(), self.layout.autocast():
            weights = [decoding.matrix(m) for m in self.silent.modules() if isinstance(m, decoding.LINEAR)]
            # the very memory that is read: how fast that is differs from place to place on a virtual machine; not so on
            # a GPU, where many small reads take the time of starting their kernels
            memory = [weights[0].new_zeros(2**30)] if on_cuda else weights
            seconds = seconds_of(lambda: [w.sum() for w in memory], self.layout.device)
            read_rate = sum(w.nbytes for w in memory) / seconds
            if self.candidate.compile:
                return Round(generations, read_rate)
            return Round(generations, read_rate, {(B, T): self.constants(weights, B, T) for B, T in self.prompts})

    def constants(self, weights: list[torch.Tensor], B: int, T: int) -> Constants:
        """Constants of this rank, measured while all ranks measure them. weights: those of the silent model."""
        config, device, tp_size = self.silent.config, self.layout.device, self.candidate.tp_size

        def multiply_all():
            """The products of a decode step, alone."""
            inputs = {shape: weights[0].new_ones(shape) for shape in {(len(w), B, w.size(2)) for w in weights}}
            few = device.type == "cpu" and B <= decoding.FEW_ROWS
            for w in weights:
                x = inputs[len(w), B, w.size(2)]
                decoding.multiply_few(x, w) if few else torch.bmm(x, w.mT)

        bandwidth = sum(w.nbytes for w in weights) / seconds_of(decoding.graphed(multiply_all, device), device)
        flops = sum(n for _, n in cost_model.sublayers(config, cost_model.Forward(tp_size, B, T, T)))
        peak = config.n_layer * flops / seconds_of(partial(self.run_blocks, B, T), device, repeats=3)
        times = our_times(self.small, self.prompts[B, T] % 64, OVERHEAD_TOKENS, self.layout)
        overhead = statistics.median(b - a for a, b in itertools.pairwise(times)) / config.n_layer
        if tp_size == 1:
            return Constants(bandwidth, peak, overhead)
        return Constants(bandwidth, peak, overhead, *(self.all_reduce_seconds(B, t) for t in (1, T)))

    def all_reduce_seconds(self, B: int, t: int) -> float:
        """The median over passes of the mean time of the all-reduces behind blocks that run on t tokens.

        On CUDA of as many in one graph, without blocks between: the meter's events would time their starts.
        """
        device, n_layer = self.layout.device, self.silent.config.n_layer
        if device.type == "cuda":
            x = self.zeros(B, t)
            one = partial(dist.all_reduce, x, group=self.layout.tp_group)
            return seconds_of(decoding.graphed(lambda: [one() for _ in range(n_layer)], device), device) / n_layer
        passes = []
        for _ in range(7):
            self.run_blocks(B, t, self.layout.tp_group)
            passes.append(statistics.mean(one.seconds for one in self.meter.take()))
        return statistics.median(passes)

    def zeros(self, B: int, T: int) -> torch.Tensor:
        """A stream (B, T, C) of the number type that is sent in decoding, the embedding's."""
        return self.silent.transformer.wte.weight.new_zeros(B, T, self.silent.config.n_embd)

    def run_blocks(self, B: int, T: int, group: dist.ProcessGroup | None = None) -> None:
        """All blocks on T tokens; with a group, a real all-reduce behind each."""
        x = self.zeros(B, T)
        for i in range(self.silent.config.n_layer):
            x = self.silent.run_blocks(x, range(i, i + 1))
            if group is not None:
                with self.meter:
                    dist.all_reduce(x, group=group)
