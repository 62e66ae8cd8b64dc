"""Measure what reduced syncs cost and save, and predict it for other machines.

$ python bench.py train                          # training steps against transformers' GPT-2, at the 124M shape
$ python bench.py decode --png=decode.png        # TTFT and TPOT for every sync pattern, tensor-parallel and not
$ python bench.py decode baseline baseline+ladder grouped-4 3x1280 --tp_sizes 2 --added_delay_us 0 1000  # on a CPU
$ python bench.py predict --n_shard=8            # the cost model of cost_model.py with public figures of links

A candidate is RULE[@N_SHARD]; train needs the @N_SHARD, and also takes gpt2. RULE is a sync rule as everywhere
(baseline, spd, grouped-4, 110111011101, spd+ladder), or LAYERSxWIDTH, a dense control with standard TP. Candidates take
turns (in train, each in its own processes; in decode, all of one tp_size in the same), and figures are medians over all
rounds.

decode prints, with times in milliseconds:
    TTFT        the time to the first token
    TPOT        the time of each token after it
    syncs       blocking syncs; with hidden ones both, as in 1+23
    run, bytes  the all-reduces that really ran in a decode step, and the size of each
    in-syncs    the time spent in them; on a GPU, where they are part of a CUDA graph, TPOT less no-syncs
    no-syncs    TPOT of the same model if its all-reduces send nothing: the bound without communication
    bound/TPOT  bound: the time to read a rank's weights and cache once, at the speed measured for summing them
                (on a GPU, for one large read)
    line        the error of compute + syncs x all_reduce, which are no-syncs and in-syncs, averaged over candidates of
                the first one's size that have no hidden syncs
    model       the error of cost_model.py
    exposed     what a hidden sync still costs: TPOT less no-syncs and the blocking syncs, and the model's figure

With --added_delay_us every all-reduce takes at least that long from its start until its result is used: real ranks and
real all-reduces on a slower link. Each delay has its own tables. The last table has the slopes of TPOT from each delay
to the next, measured and by the cost model: the number of exposed syncs. A delay shorter than a real all-reduce adds
nothing; a longer one exposes all blocking syncs, and one longer than a sublayer exposes the hidden ones too.
"""

from reduced_sync.cli import set_up

if __name__ == "__main__":  # before the imports that take seconds: Ctrl-C ends them in silence
    set_up()

import argparse
import contextlib
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

import reduced_sync_model as rsm
from reduced_sync import distributed
from reduced_sync.bench import cost_model
from reduced_sync.bench.candidates import Candidate, build, keys_of, measure, synchronize
from reduced_sync.bench.figures import draw_decoding
from reduced_sync.bench.results import Case, Prediction, Row, Times, Training, describe
from reduced_sync.bench.timing import Condition, Constants, Decoding, Round, Workload
from reduced_sync.cli import check_distinct, check_figure, check_target, one_line_errors
from reduced_sync.configurator import option, parse
from reduced_sync.files import replace_file
from reduced_sync.hardware import GPUS, LINKS, Accelerator, Link
from reduced_sync.train.experiment import MODERN, model_keys


def peak_memory(device: torch.device, reset: bool = False) -> int:
    """The most bytes this process has held since the last reset: of the GPU's memory, or on a CPU of RAM."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if reset:
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # Linux: start VmHWM anew
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    import resource  # not on Windows, where the start says so

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------------------------------------------------------------
# train: a step is forward, backward and AdamW


def training(
    candidate: Candidate, layout: distributed.Layout, batch_size: int, steps: int
) -> Callable[[], tuple[float, int]]:
    """A function that trains so many steps and returns (seconds per step, peak bytes)."""
    model, config = build(candidate, layout), candidate.config
    if candidate.is_gpt2:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    else:
        optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), layout.device.type)
    tokens = torch.randint(config.vocab_size, (batch_size, config.block_size + 1), device=layout.device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def loss_of(x, y):  # as train_reduced_sync.py compiles it
        return model(x, labels=x).loss if candidate.is_gpt2 else model(x, y)[1]

    if candidate.compile:
        loss_of = torch.compile(loss_of)

    def measured():
        peak_memory(layout.device, reset=True)
        synchronize(layout.device)
        begin = time.perf_counter()
        for _ in range(steps):
            with layout.autocast():
                loss = loss_of(x, y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        synchronize(layout.device)
        return (time.perf_counter() - begin) / steps, peak_memory(layout.device)

    return measured


def train(args: "Train") -> list[Training]:
    """Tokens/s and peak memory per rank of every candidate, with the ratios to the first."""
    device, _, _ = distributed.choose_device(args.device, args.dtype)
    compiled = distributed.should_compile(args.compile, device)
    candidates = [
        Candidate(text, args.config("baseline@1"), is_gpt2=True, compile=compiled)
        if text == "gpt2"
        else Candidate(text, args.config(text), tp_size=args.tp_size, compile=compiled)
        for text in args.candidates
    ]
    job = partial(training, batch_size=args.batch_size, steps=args.steps)
    results = measure(candidates, job, args.device, args.dtype, args.rounds, args.launches)
    rounds = [[max(s for s, _ in ranks) for ranks in one] for one in results]
    peaks = [max(peak for ranks in one for _, peak in ranks) for one in results]
    medians = [statistics.median(one) for one in rounds]
    table = []
    for candidate, seconds, median, peak in zip(candidates, rounds, medians, peaks, strict=True):
        speed, ratio, memory = args.batch_size * args.block_size / median, medians[0] / median, peak / peaks[0]
        print(f"{candidate.label:28} {speed:10.0f} tok/s {ratio:6.3f}x {peak / 2**20:8.0f} MiB {memory:6.3f}x")
        table.append(Training(candidate.label, speed, ratio, seconds, peak, memory))
    return table


# ---------------------------------------------------------------------------------------------------------------------
# decode: time to the first token (TTFT) and per token after it (TPOT)


class Machine(NamedTuple):
    """What a rank decodes with, as measured: bytes/s at which it sums its weights, and the cost model's constants."""

    read_rate: float
    accelerator: Accelerator
    link: Link | None


def summarize(rounds: list[list[Round]], condition: Condition) -> Times:
    """One condition in figures, of [round][rank]: medians, of the slowest rank; all-reduces over all ranks."""
    ranks = [[ranks[i].generations[condition] for ranks in rounds] for i in range(len(rounds[0]))]
    calls = [one.all_reduces for rank in ranks for one in rank]
    count = len(calls[0]) // ranks[0][0].n_metered  # the first so many are the prefill's
    per_token = [
        sum(c.seconds for c in one[i : i + count]) for one in calls for i in range(count, len(one), count or 1)
    ]
    return Times(
        ttft_s=max(statistics.median(one.ttft for one in rank) for rank in ranks),
        tpot_s=max(statistics.median(step for one in rank for step in one.steps) for rank in ranks),
        all_reduces=count,
        bytes=calls[0][-1].bytes if count else 0,
        in_all_reduces_s=statistics.median(per_token) if per_token else None if count else 0.0,
    )


def machine_of(rounds: list[list[Round]], prefill: cost_model.Forward, n_embd: int) -> Machine:
    """Medians of what all ranks measured of themselves; the link is the line through two all-reduces' times."""
    ranks, at = [rank for ranks in rounds for rank in ranks], (prefill.batch_size, prefill.tokens)
    middle = Constants(*map(statistics.median, zip(*(rank.constants[at] for rank in ranks), strict=True)))
    accelerator = Accelerator(middle.bandwidth, middle.peak_flops, middle.overhead, "measured")
    link, n = None, len(rounds[0])
    if n > 1:
        small, large = (dataclasses.replace(prefill, tokens=t).payload(n_embd) for t in (1, prefill.tokens))
        more = middle.prompt_all_reduce - middle.token_all_reduce
        per_byte = max(1e-15, more / (large - small) if large > small else 0.0)  # with noise it may be none
        link = Link(middle.token_all_reduce - small * per_byte, 0.0, 2 * (n - 1) / n / per_byte, "measured")
    return Machine(statistics.median(rank.read_rate for rank in ranks), accelerator, link)


def check_decode(args: "Decode", configs: dict[str, rsm.GPTConfig], device: str) -> None:
    """Raise ValueError for what cannot be decoded or drawn."""
    for tp_size, (name, config) in itertools.product(args.tp_sizes, configs.items()):
        config.check_tp_size(tp_size, name)
    if max(args.prompts) + args.new_tokens > args.block_size:
        raise ValueError(f"prompts of {max(args.prompts)} and {args.new_tokens} new tokens exceed --block_size")
    if args.png and max(args.tp_sizes) < 2:
        raise ValueError("--png draws TPOT against sync count at tp_size 2 or more; --tp_sizes names none")
    if args.png:
        check_figure(args.png)
    if any(args.added_delay_us) and (device != "cpu" or max(args.tp_sizes) < 2):
        raise ValueError("--added_delay_us holds up all-reduces on a CPU: it needs --device=cpu and tp_size 2 or more")
    if args.compile and 0 not in args.added_delay_us:
        raise ValueError("--compile is timed without an added delay: name 0 among --added_delay_us as well")
    if device.startswith("cuda") and args.new_tokens < 8:
        raise ValueError(f"--new_tokens={args.new_tokens}: at least 8 on a GPU, where the first ones capture a graph")


def decode(args: "Decode") -> list[Case]:
    """TTFT and TPOT of every candidate at every tp_size, its all-reduces, and what bounds it; beside a reference."""
    configs = {name: args.config(name, args.n_shard) for name in args.candidates}
    base = args.config("baseline", args.n_shard)
    device, dtype, _ = distributed.choose_device(args.device, args.dtype)
    check_decode(args, configs | {"the baseline (--n_shard)": base}, device)
    delays = tuple(sorted(set(args.added_delay_us)))
    work = Workload(configs, args.batch_sizes, args.prompts, args.new_tokens, delays)
    setups = {}  # tp_size: {what it is of a Case: what runs}
    for tp_size in args.tp_sizes:
        reference = "PyTorch's tensor parallelism" if tp_size > 1 else "transformers' generate"
        setups[tp_size] = setup = {"rows": Candidate("ours", base, tp_size=tp_size)}
        setup["reference_times"] = Candidate(reference, base, is_gpt2=True, tp_size=tp_size)
        if args.compile:
            setup["compiled"] = Candidate("ours", base, tp_size=tp_size, compile=True)
        if args.compile and tp_size > 1:
            setup["compiled_silent"] = Candidate("ours", base, tp_size=tp_size, compile=True, silent=True)
    launched = [one for setup in setups.values() for one in setup.values()]
    job = partial(Decoding, work=work)
    results = iter(measure(launched, job, args.device, args.dtype, args.rounds, args.launches))
    table = []
    for tp_size, setup in setups.items():
        measured = {kind: next(results) for kind in setup}
        for B, T in itertools.product(args.batch_sizes, args.prompts):
            cases = []
            for delay in delays if tp_size > 1 else (0,):
                condition = Condition(setup["reference_times"].name, True, B, T, delay)
                cases.append(case_of(setup["rows"], measured, work, condition, dtype.itemsize))
                print_case(cases[-1])
            if len(cases) > 1:
                add_exposed(cases)
                print_exposed(cases)
            table += cases
    if args.png:
        draw_decoding(table, args.png)
    return table


def case_of(ours: Candidate, measured: dict[str, list], work: Workload, condition: Condition, itemsize: int) -> Case:
    """The figures of one tp_size, and of the batch size, prompt and added delay of `condition`, the reference's."""
    _, _, B, T, delay_us = condition
    delay = delay_us / 1e6
    prefill = cost_model.Forward(ours.tp_size, B, T, T, itemsize)
    # of the tokens decoded one in the middle
    token = dataclasses.replace(prefill, tokens=1, context=T + work.new_tokens // 2)
    machine = machine_of(measured["rows"], prefill, ours.config.n_embd)
    rows = []
    for name, config in work.configs.items():
        times = summarize(measured["rows"], condition._replace(model=name))
        row = Row(candidate=name, **describe(config), **vars(times))
        if ours.tp_size > 1:
            silent = summarize(measured["rows"], Condition(name, False, B, T))
            row.silent_ttft_s, row.silent_tpot_s = silent.ttft_s, silent.tpot_s
            if row.in_all_reduces_s is None:  # inside a graph: what they add
                row.in_all_reduces_s = max(0.0, row.tpot_s - row.silent_tpot_s)
        add_model(row, config, machine, prefill, token, delay)
        rows.append(row)
    case = Case(
        tp_size=ours.tp_size,
        batch_size=B,
        prompt=T,
        rows=rows,
        added_delay_s=delay,
        read_rate=machine.read_rate,
        reference=condition.model,
        accelerator=vars(machine.accelerator),
        link=machine.link and vars(machine.link),
        bound_s=rows[0].bound_s,
        reference_times=summarize(measured["reference_times"], condition),
    )
    for kind, sent in (("compiled", True), ("compiled_silent", False)):
        if kind in measured and not delay:  # a compiled all-reduce is not held up
            times = summarize(measured[kind], Condition(rows[0].candidate, sent, B, T))
            read_rate = statistics.median(rank.read_rate for ranks in measured[kind] for rank in ranks)
            times.bound_s = case.bound_s * case.read_rate / read_rate
            times.all_reduces = times.in_all_reduces_s = times.bytes = None  # a meter would break the graph
            setattr(case, kind, times)
    add_line(case)
    return case


def add_model(
    row: Row,
    config: rsm.GPTConfig,
    machine: Machine,
    prefill: cost_model.Forward,
    token: cost_model.Forward,
    added_delay: float,
) -> None:
    """Give a row the cost model's figures, and what its syncs cost where it has times without communication."""
    model = partial(cost_model.forward_seconds, config, machine.accelerator, added_delay=added_delay)
    row.bound_s = cost_model.bytes_read(config, token) / machine.read_rate
    row.model_ttft_s, row.model_tpot_s = model(machine.link, prefill), model(machine.link, token)
    if row.silent_tpot_s is None:
        return
    row.exposed_s, row.model_exposed_s = row.tpot_s - row.silent_tpot_s, row.model_tpot_s - model(None, token)
    if row.hidden:
        # of the others: the last one, and those of a method's first layers
        one = max(machine.link.all_reduce(token.payload(config.n_embd), token.tp_size), added_delay)
        blocking = (row.syncs - row.hidden) * one
        row.hidden_exposed_s = (row.exposed_s - blocking) / row.hidden
        row.hidden_model_exposed_s = (row.model_exposed_s - blocking) / row.hidden


def add_line(case: Case) -> None:
    """TPOT = compute + syncs x all_reduce, as measured, of the models of the first one's size without hidden syncs."""

    def size(row):
        return row.model["n_layer"], row.model["n_embd"]

    alike = [row for row in case.rows if not row.hidden and size(row) == size(case.rows[0])]
    counts = [row.syncs for row in alike]
    if case.tp_size > 1 and len(set(counts)) > 1:
        case.compute_s = statistics.median(row.silent_tpot_s for row in alike)
        case.all_reduce_s = sum(row.in_all_reduces_s for row in alike) / sum(counts)
        for row in alike:
            row.line_s = case.compute_s + row.syncs * case.all_reduce_s


def add_exposed(cases: list[Case]) -> None:
    """Give the rows of cases that differ in their added delay the slopes of TPOT from each to the next."""
    for before, after in itertools.pairwise(cases):
        added = after.added_delay_s - before.added_delay_s
        for a, b in zip(before.rows, after.rows, strict=True):
            b.exposed_syncs = (b.tpot_s - a.tpot_s) / added
            b.model_exposed_syncs = (b.model_tpot_s - a.model_tpot_s) / added


def print_case(case: Case) -> None:
    """One case as a table, in milliseconds."""
    delay = 1e6 * case.added_delay_s
    added = f", every all-reduce at least {delay:.0f} us (added)" if delay else ""
    print(f"\ntp_size {case.tp_size}, batch {case.batch_size}, prompt {case.prompt}{added}")
    bound = f"its weights and cache take {1000 * case.bound_s:.2f} ms per token"
    print(f"a rank reads {case.read_rate / 1e9:.1f} GB/s: {bound}")
    times = case.reference_times
    print(f"{case.reference}: TTFT {1000 * times.ttft_s:.2f}, TPOT {1000 * times.tpot_s:.2f}")
    kinds = {"compiled": case.compiled, "compiled, all-reduces send nothing": case.compiled_silent}
    for words, times in kinds.items():
        if times is not None:
            line = f"TTFT {1000 * times.ttft_s:.2f}, TPOT {1000 * times.tpot_s:.2f}"
            print(f"ours, {case.rows[0].candidate} {words}: {line}, bound/TPOT {times.bound_s / times.tpot_s:.2f}")
    if case.compute_s is not None:
        print(f"TPOT, as measured: {1000 * case.compute_s:.2f} + syncs x {1000 * case.all_reduce_s:.3f}")
    many = case.tp_size > 1
    width = max(14, *(len(row.candidate) + 1 for row in case.rows))
    columns = "syncs run bytes TTFT model TPOT model bound/TPOT".split()
    columns += "in-syncs no-syncs line".split() if many else []
    columns += ["exposed", "model"] if many and any(row.hidden for row in case.rows) else []
    print(f"{'candidate':{width}}" + "".join(f"{name:>11}" for name in columns))

    def ms(seconds):
        return "" if seconds is None else f"{1000 * seconds:.2f}"

    def off(seconds, measured):
        return "" if seconds is None else f"{100 * (seconds / measured - 1):+.1f}%"

    for row in case.rows:
        cells = [row.count, row.all_reduces, row.bytes]
        cells += [ms(row.ttft_s), off(row.model_ttft_s, row.ttft_s), ms(row.tpot_s), off(row.model_tpot_s, row.tpot_s)]
        cells.append(f"{(case.bound_s if row.bound_s is None else row.bound_s) / row.tpot_s:.2f}")
        if many:
            cells += [ms(row.in_all_reduces_s), ms(row.silent_tpot_s), off(row.line_s, row.tpot_s)]
            cells += [ms(row.hidden_exposed_s), ms(row.hidden_model_exposed_s)]
        print(f"{row.candidate:{width}}{''.join(f'{cell:>11}' for cell in cells)}".rstrip(), flush=True)


def print_exposed(cases: list[Case]) -> None:
    """Exposed syncs of cases that differ in their added delay: by how many times what was added TPOT grew."""
    first, delays = cases[0], [1e6 * case.added_delay_s for case in cases]
    place = f"tp_size {first.tp_size}, batch {first.batch_size}, prompt {first.prompt}"
    print(f"\n{place}: exposed syncs, measured and by the model, as an all-reduce takes at least so many us")
    width = max(14, *(len(row.candidate) + 1 for row in first.rows))
    spans = [f"{a:.0f}-{b:.0f}" for a, b in itertools.pairwise(delays)]
    print(f"{'candidate':{width}}{'syncs':>11}" + "".join(f"{span:>13}{'model':>8}" for span in spans))
    for rows in zip(*(case.rows for case in cases), strict=True):
        cells = [f"{row.exposed_syncs:13.2f}{row.model_exposed_syncs:8.2f}" for row in rows[1:]]
        print(f"{rows[0].candidate:{width}}{rows[0].count:>11}" + "".join(cells), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# predict: cost_model.py with public figures


def predict(args: "Predict") -> list[Prediction]:
    """PREDICTED time per token and to the first one on named links, in bfloat16, by the model of cost_model.py."""
    configs = {name: args.config(name, args.n_shard) for name in args.candidates}
    accelerator = GPUS[args.accelerator]
    for name, config in configs.items():
        if config.n_shard != args.n_shard:
            raise ValueError(f"{name}: predict has a rank a shard, here n_shard={args.n_shard}")
    place = f"tp_size {args.n_shard}, batch {args.batch_size}, prompt {args.prompt}"
    print(f"PREDICTED, not measured: {args.accelerator}, {place}")
    width = max(14, *(len(name) + 1 for name in configs))
    print(f"{'link':16}{'candidate':{width}}{'syncs':>6}{'TTFT ms':>10}{'TPOT ms':>10}{'faster':>8}{'bound':>8}")
    prefill = cost_model.Forward(args.n_shard, args.batch_size, args.prompt, args.prompt, itemsize=2)
    token = dataclasses.replace(prefill, tokens=1)
    table = []
    for name in args.links or LINKS:
        first = None
        for candidate, config in configs.items():
            model = partial(cost_model.forward_seconds, config, accelerator)
            ttft, tpot, bound = model(LINKS[name], prefill), model(LINKS[name], token), model(None, token)
            times = dict(ttft_s=ttft, tpot_s=tpot, no_communication_tpot_s=bound)
            row = Prediction(candidate=candidate, **describe(config), link=name, **times)
            first = first or tpot
            line = f"{name:16}{candidate:{width}}{row.count:>6}{1000 * ttft:10.3f}{1000 * tpot:10.3f}"
            print(f"{line}{first / tpot:7.2f}x{first / bound:7.2f}x")
            table.append(row)
    print("faster: than the first candidate on this link; bound: the same without any communication. Sources:")
    for name in args.links or LINKS:
        print(f"  {name}: {LINKS[name].source}")
    print(f"  {args.accelerator}: {accelerator.source}")
    return table


# ---------------------------------------------------------------------------------------------------------------------
# options


@dataclass
class Options:
    """Keys of every command: the model, here GPT-2's of 124M parameters, and where results go."""

    n_layer: int = option(12, "layers", least=1, below=rsm.MOST_LAYERS + 1)
    n_embd: int = option(768, "width of the residual stream", least=1)
    n_head: int = option(12, "attention heads", least=1)
    vocab_size: int = option(50304, "tokens of the vocabulary", least=1)
    modern: bool = option(False, "give our candidates Llama's block, as config/modern.py does")
    n_kv_head: int = option(0, "heads of our candidates' keys and values; 0: n_head", least=0)
    json: str | None = option(None, "also write the results to this file", is_path=True)

    def config(self, candidate: str, n_shard: int | None = None) -> rsm.GPTConfig:
        """The GPTConfig of a candidate, as keys_of takes it. Raises ValueError."""
        block = MODERN | dict(bias=False) if self.modern else {}
        return rsm.GPTConfig(**model_keys(vars(self) | block | keys_of(candidate, self.n_layer, n_shard)))


@dataclass
class Timed(Options):
    """Keys of the commands that measure."""

    block_size: int = option(256, "tokens of a sequence", least=1)
    rounds: int = option(5, "rounds of each launch", least=1)
    launches: int = option(1, "times that the processes are started", least=1)
    device: str | None = option(None, "cuda or cpu; None: cuda where there is one")
    dtype: str | None = option(None, distributed.DTYPE_HELP)


@dataclass
class Train(Timed):
    candidates: tuple[str, ...] = option(("gpt2", "baseline@1", "grouped-4@2", "grouped-4@4"), "gpt2, RULE@N_SHARD")
    compile: bool | None = option(None, "torch.compile; None: on CUDA")
    tp_size: int = option(1, "ranks of our candidates", least=1)
    batch_size: int = option(4, "sequences per step", least=1)
    steps: int = option(1, "training steps in a round", least=1)
    launches: int = option(3, "times that the processes are started", least=1)


@dataclass
class Decode(Timed):
    candidates: tuple[str, ...] = option((), "RULE[@N_SHARD]; default: baseline, spd and every grouped-N")
    n_shard: int = option(2, "shards that the transformer is cut into", least=1)
    tp_sizes: tuple[int, ...] = option((1, 2), "tensor-parallel ranks", least=1)
    batch_sizes: tuple[int, ...] = option((1,), "sequences decoded at once", least=1)
    prompts: tuple[int, ...] = option((128,), "tokens of the prompts", least=1)
    new_tokens: int = option(16, "tokens decoded after the first one", least=1)
    compile: bool = option(False, "also time the first candidate compiled; on several ranks also without communication")
    added_delay_us: tuple[int, ...] = option((0,), "microseconds that an all-reduce takes at least; CPU only", least=0)
    png: str | None = option(None, "file for a figure of TPOT against syncs: .png, .pdf or .svg", is_path=True)


@dataclass
class Predict(Options):
    candidates: tuple[str, ...] = option((), "RULE; default: baseline, spd and every grouped-N")
    n_layer: int = option(24, "layers", least=1, below=rsm.MOST_LAYERS + 1)
    n_embd: int = option(2048, "width of the residual stream", least=1)
    n_head: int = option(32, "attention heads", least=1)
    n_shard: int = option(8, "shards, and ranks", least=1)
    links: tuple[str, ...] = option((), "links between ranks; default: all", allowed=tuple(LINKS))
    accelerator: str = option("h100", "what a rank computes on", allowed=tuple(GPUS))
    batch_size: int = option(1, "sequences decoded at once", least=1)
    prompt: int = option(512, "tokens of the prompt", least=1)


COMMANDS = {"train": (train, Train), "decode": (decode, Decode), "predict": (predict, Predict)}


def main(argv: list[str]) -> None:
    """Run the command that argv names, and write its results where --json asks for them."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("command", choices=COMMANDS, help="bench.py COMMAND --help lists its keys")
    command = parser.parse_args(argv[:1]).command
    job, options = COMMANDS[command]
    with one_line_errors():
        args = parse(options, argv[1:], "candidates", job.__doc__, f"{parser.prog} {command}")
        fitting = (n for n in range(args.n_layer // 2, 0, -1) if args.n_layer % n == 0)
        args.candidates = args.candidates or ("baseline", "spd", *(f"grouped-{n}" for n in fitting))
        targets = {"json": args.json, "png": getattr(args, "png", None)}
        check_distinct(targets)
        for path in filter(None, targets.values()):
            check_target(path)
        results = job(args)
        if args.json:
            keys = {"command": command} | dataclasses.asdict(args)  # vars would have what is no key
            text = json.dumps({"settings": keys, "results": results}, indent=1, default=dataclasses.asdict)
            replace_file(args.json, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main(sys.argv[1:])
