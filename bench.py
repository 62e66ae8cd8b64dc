"""Measure what reduced syncs cost and save, and predict it for other machines.

$ python bench.py train                          # training steps against transformers' GPT-2, at the 124M shape
$ python bench.py decode --png=decode.png        # TTFT and TPOT for every sync pattern, tensor-parallel and not
$ python bench.py decode baseline baseline+ladder grouped-4 3x1280 --tp_sizes 2 --added_delay_us 0 1000 2000
$ python bench.py predict --n_shard=8            # the cost model of cost_model.py with public figures of links

A candidate is RULE[@N_SHARD]. RULE is a sync rule as everywhere (baseline, spd, grouped-4, 110111011101, spd+ladder),
or LAYERSxWIDTH, a dense control with standard TP. Candidates take turns, each in its own processes, and figures are
medians over all rounds.

decode prints, with times in milliseconds:
    TTFT        the time to the first token
    TPOT        the time of each token after it
    syncs       blocking syncs; with hidden ones both, as in 1+23
    run, bytes  the all-reduces that really ran in a decode step, and the size of each
    in-syncs    the time spent in them
    no-syncs    TPOT of the same model if its all-reduces send nothing: the bound without communication
    bound/TPOT  bound: the time a rank needs to read its weights and cache once, at the bandwidth at which it sums them
    residual    of the least-squares fit TPOT = compute + syncs x all_reduce, over the models of the first one's size
                without hidden syncs
    measured    how far that line is off with both constants measured, as no-syncs and in-syncs
    model       how far cost_model.py is off
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

import torch

import reduced_sync_model as rsm
from reduced_sync import distributed
from reduced_sync.bench import cost_model
from reduced_sync.bench.candidates import (
    Candidate,
    build,
    configs_of,
    describe,
    measure,
    parse_candidate,
    synchronize,
)
from reduced_sync.bench.timing import Decoding
from reduced_sync.cli import check_figure, check_target, one_line_errors
from reduced_sync.compare.figures import draw_decoding
from reduced_sync.configurator import option, parse
from reduced_sync.hardware import LINKS, NAMED, Accelerator, Link


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

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---------------------------------------------------------------------------------------------------------------------
# train: a step is forward, backward and AdamW


def training(candidate: Candidate, layout: distributed.Layout, args: "Train") -> Callable[[], tuple[float, int]]:
    """A function that trains `args.steps` steps and returns (seconds a step, peak bytes)."""
    model = build(candidate, layout, args)
    if candidate.keys:
        optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), layout.device.type)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(args.vocab_size, (args.batch_size, args.block_size + 1), device=layout.device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def loss_of(x, y):  # as train_reduced_sync.py compiles it
        return model(x, y)[1] if candidate.keys else model(x, labels=x).loss

    if candidate.compile:
        loss_of = torch.compile(loss_of)

    def step():
        with layout.autocast():
            loss = loss_of(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # compiles, and makes the optimizer's state

    def measured():
        peak_memory(layout.device, reset=True)
        synchronize(layout.device)
        begin = time.perf_counter()
        for _ in range(args.steps):
            step()
        synchronize(layout.device)
        return (time.perf_counter() - begin) / args.steps, peak_memory(layout.device)

    return measured


def train(args: "Train") -> list[dict]:
    """Tokens/s and peak memory a rank of every candidate, eager and compiled, with the ratios to the first."""
    modes = {"eager": [False], "compiled": [True], "both": [False, True]}[args.mode]
    table = []
    for compiled in modes:
        candidates = [parse_candidate(text, args.n_layer, args.tp_size, compiled) for text in args.candidates]
        results = measure(candidates, training, args)
        rounds = [[max(s for s, _ in ranks) for ranks in one] for one in results]
        peaks = [max(peak for ranks in one for _, peak in ranks) for one in results]
        medians = [statistics.median(one) for one in rounds]
        for candidate, seconds, median, peak in zip(candidates, rounds, medians, peaks, strict=True):
            speed, ratio, memory = args.batch_size * args.block_size / median, medians[0] / median, peak / peaks[0]
            print(
                f"{candidate.label:28} {speed:10.0f} tok/s {ratio:6.3f}x {peak / 2**20:8.0f} MiB {memory:6.3f}x",
                flush=True,
            )
            one = {"candidate": candidate.label, "tokens_per_s": speed, "speed_ratio": ratio, "rounds_s": seconds}
            table.append(one | {"peak_bytes": peak, "memory_ratio": memory})
    return table


# ---------------------------------------------------------------------------------------------------------------------
# decode: time to the first token (TTFT) and per token after it (TPOT)


def summarize(rounds: list, case: tuple, n_forwards: int) -> dict:
    """One case in figures: medians over tokens and rounds, of the slowest rank; all-reduces over all ranks."""
    ranks = [[one[rank][0][case] for one in rounds] for rank in range(len(rounds[0]))]
    calls = [calls for rank in ranks for _, _, calls in rank]
    count = len(calls[0]) // n_forwards
    per_token = [sum(s for _, s in one[i : i + count]) for one in calls for i in range(count, len(one), count or 1)]
    return {
        "ttft_s": max(statistics.median(ttft for ttft, _, _ in rank) for rank in ranks),
        "tpot_s": max(statistics.median(step for _, steps, _ in rank for step in steps) for rank in ranks),
        "all_reduces": count,
        "bytes": calls[0][-1][0] if count else 0,
        "prefill_bytes": calls[0][0][0] if count else 0,
        "in_all_reduces_s": statistics.median(per_token) if count else 0.0,
    }


def constants_of(rounds: list, B: int, T: int, args: "Decode") -> tuple[float, Accelerator, Link | None]:
    """(bytes/s that a rank streams, Accelerator, Link or None): medians of what all ranks measured."""
    found = [constants for one in rounds for _, constants in one]
    middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
    accelerator = Accelerator(middle["bandwidth", B], middle["peak", B, T], middle["overhead", B], "measured")
    link, n = None, len(rounds[0])
    if n > 1:
        sizes = [4 * B * t * args.n_embd for t in (1, T)]
        base, per_byte, _ = cost_model.fit(sizes, [middle["all_reduce", B, t] for t in (1, T)])
        link = Link(base, 0.0, 2 * (n - 1) / n / per_byte, "measured")
    return middle["stream"], accelerator, link


def decode(args: "Decode") -> list[dict]:
    """TTFT and TPOT of every candidate at every tp_size, its all-reduces, and what bounds it; against rivals."""
    configs = configs_of(args)
    for tp_size, (name, config) in itertools.product(args.tp_sizes, configs.items()):
        if config.n_shard % tp_size:
            raise ValueError(f"tp_size={tp_size} must divide n_shard={config.n_shard} of {name}")
    if max(args.prompts) + args.new_tokens >= args.block_size:
        raise ValueError(f"prompts of {max(args.prompts)} and {args.new_tokens} new tokens exceed --block_size")
    if args.png and max(args.tp_sizes) < 2:
        raise ValueError("--png draws TPOT against sync count at tp_size 2 or more; --tp_sizes names none")
    if args.png:
        check_figure(args.png)
    device, dtype, _ = distributed.choose_device(args.device, args.dtype)
    args.added_delay_us = tuple(sorted(set(args.added_delay_us)))
    if any(args.added_delay_us) and (device != "cpu" or max(args.tp_sizes) < 2):
        raise ValueError("--added_delay_us holds up all-reduces on a CPU: it needs --device=cpu and tp_size 2 or more")
    setups = {}  # tp_size: ours eager, the rival, ours compiled, and that without communication
    for tp_size in args.tp_sizes:
        ours = partial(Candidate, "ours", dict(n_shard=args.n_shard), tp_size)
        rival = Candidate("PyTorch's tensor parallelism" if tp_size > 1 else "transformers' generate", tp_size=tp_size)
        silences = ([False, True] if tp_size > 1 else [False]) if args.compile else []
        compiled = [ours(compile=True, silent=silent) for silent in silences]
        setups[tp_size] = [ours(), rival, *compiled]
    results = iter(measure([one for setup in setups.values() for one in setup], Decoding, args))
    table = []
    for tp_size, setup in setups.items():
        measured = [next(results) for _ in setup]
        for B, T in itertools.product(args.batch_sizes, args.prompts):
            cases = []
            for delay in args.added_delay_us if tp_size > 1 else (0,):
                cases.append(figures_of(setup, measured, configs, B, T, delay, dtype.itemsize, args))
                print_case(cases[-1])
            for before, after in itertools.pairwise(cases):
                added = after["added_delay_s"] - before["added_delay_s"]
                for a, b in zip(before["patterns"], after["patterns"], strict=True):
                    for key in ("", "model_"):
                        b[f"{key}exposed_syncs"] = (b[f"{key}tpot_s"] - a[f"{key}tpot_s"]) / added
            if len(cases) > 1:
                print_exposed(cases)
            table += cases
    if args.png:
        draw_decoding(table, args.png)
    return table


def figures_of(
    setup: list[Candidate],
    measured: list,
    configs: dict[str, rsm.GPTConfig],
    B: int,
    T: int,
    delay: int,
    itemsize: int,
    args: "Decode",
) -> dict:
    """The figures of one tp_size, batch size, prompt length and added delay in microseconds."""
    figures, tp_size = partial(summarize, n_forwards=args.new_tokens + 1), setup[0].tp_size
    stream, accelerator, link = constants_of(measured[0], B, T, args)
    middle = T + args.new_tokens // 2  # a token in the middle of those decoded
    case = {"tp_size": tp_size, "batch_size": B, "prompt": T, "added_delay_s": delay / 1e6, "stream": stream}
    case |= {"rival": setup[1].name, "accelerator": vars(accelerator), "link": link and vars(link)}
    first = next(iter(configs.values()))
    case["bound_s"] = cost_model.bytes_read(first, tp_size, B, middle, itemsize) / stream
    rival = figures(measured[1], (setup[1].name, True, B, T, delay))
    case |= {f"rival_{key}": value for key, value in rival.items()}
    for candidate, rounds in zip(setup[2:], measured[2:], strict=True):
        if delay:
            continue  # a compiled all-reduce is not held up
        kind = "compiled_silent" if candidate.silent else "compiled"
        compiled = figures(rounds, (next(iter(configs)), not candidate.silent, B, T, 0))
        case |= {f"{kind}_{key}": value for key, value in compiled.items()}
        theirs = statistics.median(constants["stream"] for one in rounds for _, constants in one)
        case[f"{kind}_bound_s"] = case["bound_s"] * stream / theirs
    case["patterns"] = rows = []
    for variant, config in configs.items():
        row = {"variant": variant} | describe(config)
        row |= figures(measured[0], (variant, True, B, T, delay))
        row["bound_s"] = cost_model.bytes_read(config, tp_size, B, middle, itemsize) / stream
        model = partial(cost_model.forward_seconds, config, accelerator, itemsize=itemsize, added_delay=delay / 1e6)
        row |= {"model_ttft_s": model(link, tp_size, B, T, T), "model_tpot_s": model(link, tp_size, B, 1, middle)}
        if tp_size > 1:
            silent = figures(measured[0], (variant, False, B, T, 0))
            row |= {"silent_ttft_s": silent["ttft_s"], "silent_tpot_s": silent["tpot_s"]}
            row["exposed_s"] = row["tpot_s"] - row["silent_tpot_s"]
            row["model_exposed_s"] = row["model_tpot_s"] - model(None, tp_size, B, 1, middle)
        if tp_size > 1 and row["hidden"]:
            blocking = max(link.all_reduce(4 * B * config.n_embd, tp_size), delay / 1e6)  # the last one
            for key in ("exposed_s", "model_exposed_s"):
                row[f"hidden_{key}"] = (row[key] - blocking) / row["hidden"]
        rows.append(row)
    size = (first.n_layer, first.n_embd)
    alike = [row for row in rows if not row["hidden"] and (row["model"]["n_layer"], row["model"]["n_embd"]) == size]
    counts, tpots = [row["syncs"] for row in alike], [row["tpot_s"] for row in alike]
    if tp_size > 1 and len(set(counts)) > 1:
        case["fit_compute_s"], case["fit_all_reduce_s"], residuals = cost_model.fit(counts, tpots)
        case["compute_s"] = statistics.median(row["silent_tpot_s"] for row in alike)
        case["all_reduce_s"] = sum(row["in_all_reduces_s"] for row in alike) / sum(counts)
        for row, residual in zip(alike, residuals, strict=True):
            row["residual_s"] = residual
            row["line_s"] = case["compute_s"] + row["syncs"] * case["all_reduce_s"]
    return case


def count_of(row: dict) -> str:
    """A row's all-reduces, with those that are hidden apart."""
    return f"{row['syncs'] - row['hidden']}+{row['hidden']}" if row.get("hidden") else str(row["syncs"])


def print_case(case: dict) -> None:
    """One case as a table, in milliseconds."""
    many, bound = case["tp_size"] > 1, 1000 * case["bound_s"]
    delay = 1e6 * case.get("added_delay_s", 0)
    added = f", every all-reduce at least {delay:.0f} us (added)" if delay else ""
    print(f"\ntp_size {case['tp_size']}, batch {case['batch_size']}, prompt {case['prompt']}{added}")
    print(f"a rank streams {case['stream'] / 1e9:.1f} GB/s: its weights and cache take {bound:.2f} ms a token")
    print(f"{case['rival']}: TTFT {1000 * case['rival_ttft_s']:.2f}, TPOT {1000 * case['rival_tpot_s']:.2f}")
    for kind, words in (("compiled", "compiled"), ("compiled_silent", "compiled, all-reduces send nothing")):
        if f"{kind}_tpot_s" in case:
            share, tpot = case[f"{kind}_bound_s"] / case[f"{kind}_tpot_s"], 1000 * case[f"{kind}_tpot_s"]
            times = f"TTFT {1000 * case[f'{kind}_ttft_s']:.2f}, TPOT {tpot:.2f}, bound/TPOT {share:.2f}"
            print(f"ours, {case['patterns'][0]['variant']} {words}: {times}")
    if "fit_compute_s" in case:
        for kind, key in (("least squares", "fit_"), ("as measured", "")):
            compute, all_reduce = 1000 * case[f"{key}compute_s"], 1000 * case[f"{key}all_reduce_s"]
            print(f"TPOT, {kind}: {compute:.2f} + syncs x {all_reduce:.3f}")
    hidden = many and any(row.get("hidden") for row in case["patterns"])
    width = max(14, *(len(row["variant"]) + 1 for row in case["patterns"]))
    columns = "syncs run bytes TTFT model TPOT model bound/TPOT".split()
    columns += "in-syncs no-syncs residual measured".split() if many else []
    columns += ["exposed", "model"] if hidden else []
    print(f"{'variant':{width}}" + "".join(f"{name:>11}" for name in columns))
    for row in case["patterns"]:
        cells = [count_of(row), row["all_reduces"], row["bytes"]]
        for key in ("ttft", "tpot"):
            cells += [f"{1000 * row[f'{key}_s']:.2f}", f"{100 * (row[f'model_{key}_s'] / row[f'{key}_s'] - 1):+.1f}%"]
        cells.append(f"{row.get('bound_s', case['bound_s']) / row['tpot_s']:.2f}")
        if many:
            keys = ("in_all_reduces_s", "silent_tpot_s", "residual_s")
            cells += [f"{1000 * row[key]:.2f}" if key in row else "" for key in keys]
            cells.append(f"{100 * (row['line_s'] / row['tpot_s'] - 1):+.1f}%" if "line_s" in row else "")
        if hidden and row["hidden"]:
            cells += [f"{1000 * row[f'hidden_{key}']:.2f}" for key in ("exposed_s", "model_exposed_s")]
        print((f"{row['variant']:{width}}" + "".join(f"{cell:>11}" for cell in cells)).rstrip(), flush=True)


def print_exposed(cases: list[dict]) -> None:
    """Exposed syncs of cases that differ in their added delay: by how many times what was added TPOT grew."""
    first, delays = cases[0], [1e6 * case["added_delay_s"] for case in cases]
    setting = f"tp_size {first['tp_size']}, batch {first['batch_size']}, prompt {first['prompt']}"
    print(f"\n{setting}: exposed syncs, measured and by the model, as an all-reduce takes at least so many us")
    width = max(14, *(len(row["variant"]) + 1 for row in first["patterns"]))
    spans = [f"{a:.0f}-{b:.0f}" for a, b in itertools.pairwise(delays)]
    print(f"{'variant':{width}}{'syncs':>11}" + "".join(f"{span:>13}{'model':>8}" for span in spans))
    for rows in zip(*(case["patterns"] for case in cases), strict=True):
        cells = [f"{row['exposed_syncs']:13.2f}{row['model_exposed_syncs']:8.2f}" for row in rows[1:]]
        print(f"{rows[0]['variant']:{width}}{count_of(rows[0]):>11}" + "".join(cells), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# predict: cost_model.py with public figures


def predict(args: "Predict") -> list[dict]:
    """PREDICTED time per token and to the first token on named links, by the cost model of cost_model.py."""
    configs, accelerator = configs_of(args), NAMED[args.accelerator]
    for name, config in configs.items():
        if config.n_shard != args.n_shard:
            raise ValueError(f"{name}: predict has a rank a shard, here n_shard={args.n_shard}")
    setting = f"tp_size {args.n_shard}, batch {args.batch_size}, prompt {args.prompt}"
    print(f"PREDICTED, not measured: {args.accelerator}, {setting}")
    width = max(14, *(len(name) + 1 for name in configs))
    print(f"{'link':16}{'variant':{width}}{'syncs':>6}{'TTFT ms':>10}{'TPOT ms':>10}{'faster':>8}{'bound':>8}")
    table = []
    for name in args.links or LINKS:
        first = None
        for variant, config in configs.items():
            row = {"predicted": True, "link": name, "variant": variant} | describe(config)
            model = partial(cost_model.forward_seconds, config, accelerator, itemsize=args.itemsize)
            sizes, link = (args.n_shard, args.batch_size), LINKS[name]
            ttft = model(link, *sizes, args.prompt, args.prompt)
            tpot, bound = (model(one, *sizes, 1, args.prompt) for one in (link, None))
            first = first or tpot
            line = f"{name:16}{variant:{width}}{count_of(row):>6}{1000 * ttft:10.3f}{1000 * tpot:10.3f}"
            print(f"{line}{first / tpot:7.2f}x{first / bound:7.2f}x")
            table.append(row | {"ttft_s": ttft, "tpot_s": tpot, "no_communication_tpot_s": bound})
    print("faster: than the first variant on this link; bound: the same without any communication. Sources:")
    for name in args.links or LINKS:
        print(f"  {name}: {LINKS[name].source}")
    print(f"  {args.accelerator}: {accelerator.source}")
    return table


# ---------------------------------------------------------------------------------------------------------------------
# options

EVERY = ("baseline", "spd", "110111011101", "grouped-6", "grouped-4", "grouped-3", "grouped-2", "grouped-1")


@dataclass
class Options:
    """Keys of every command: the model, here GPT-2's of 124M parameters, and where results go."""

    n_layer: int = option(12, "layers", least=1)
    n_embd: int = option(768, "width of the residual stream", least=1)
    n_head: int = option(12, "attention heads", least=1)
    vocab_size: int = option(50304, "tokens of the vocabulary", least=1)
    modern: bool = option(False, "give our candidates Llama's block, as config/modern.py does")
    n_kv_head: int = option(0, "with modern: heads of keys and values; 0: n_head", least=0)
    json: str | None = option(None, "also write the results to this file", is_path=True)


@dataclass
class Timed(Options):
    """Keys of the commands that measure."""

    block_size: int = option(256, "tokens of a sequence", least=1)
    rounds: int = option(5, "rounds of each launch", least=1)
    launches: int = option(1, "times that the processes are started", least=1)
    device: str | None = option(None, "cuda or cpu; None: cuda where there is one")
    dtype: str | None = option(None, "float32, bfloat16 or float16; None: bfloat16 on CUDA, float32 on CPU")


@dataclass
class Train(Timed):
    candidates: tuple[str, ...] = option(("gpt2", "baseline@1", "grouped-4@2", "grouped-4@4"), "gpt2, RULE@N_SHARD")
    mode: str = option("both", "with torch.compile or without", allowed=("eager", "compiled", "both"))
    tp_size: int = option(1, "ranks of our candidates", least=1)
    batch_size: int = option(4, "sequences of a step", least=1)
    steps: int = option(1, "training steps in a round", least=1)
    launches: int = option(3, "times that the processes are started", least=1)


@dataclass
class Decode(Timed):
    candidates: tuple[str, ...] = option(EVERY, "RULE[@N_SHARD]")
    n_shard: int = option(2, "shards that the transformer is cut into", least=1)
    tp_sizes: tuple[int, ...] = option((1, 2), "tensor-parallel ranks", least=1)
    batch_sizes: tuple[int, ...] = option((1,), "sequences decoded at once", least=1)
    prompts: tuple[int, ...] = option((128,), "tokens of the prompts", least=1)
    new_tokens: int = option(16, "tokens decoded after the first one", least=1)
    compile: bool = option(False, "also the first candidate compiled; on several ranks without communication, too")
    added_delay_us: tuple[int, ...] = option((0,), "microseconds that an all-reduce takes at least; CPU only", least=0)
    png: str | None = option(None, "file for a figure of TPOT against syncs: .png, .pdf or .svg", is_path=True)


@dataclass
class Predict(Options):
    candidates: tuple[str, ...] = option(("baseline", "spd", *(f"grouped-{n}" for n in (12, 8, 6, 4, 2))), "RULE")
    n_layer: int = option(24, "layers", least=1)
    n_embd: int = option(2048, "width of the residual stream", least=1)
    n_head: int = option(32, "attention heads", least=1)
    n_shard: int = option(8, "shards, and ranks", least=1)
    links: tuple[str, ...] = option((), "links between ranks; default: all", allowed=tuple(LINKS))
    accelerator: str = option("h100", "what a rank computes on", allowed=tuple(NAMED))
    batch_size: int = option(1, "sequences decoded at once", least=1)
    prompt: int = option(512, "tokens of the prompt", least=1)
    itemsize: int = option(2, "bytes of a weight", least=1)


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
        for path in filter(None, (args.json, getattr(args, "png", None))):
            check_target(path)
        results = job(args)
        if args.json:
            with open(args.json, "w", encoding="utf-8") as file:
                settings = {"command": command} | dataclasses.asdict(args)  # vars would have what is no key
                json.dump({"settings": settings, "results": results}, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
