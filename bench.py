"""Measure what reduced syncs cost and buy.

$ python bench.py train                          # the 124M shapes on this machine, against transformers' GPT-2

Every candidate runs in processes of its own, one a tensor-parallel rank. Candidates take turns, a round each, so that a
slow moment of the machine hits all alike, and all are launched anew several times in another order, since a process can
be lucky or not with its memory. Figures are medians over all rounds.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import parallel
import reduced_sync_model as rsm

# ---------------------------------------------------------------------------------------------------------------------
# Candidates


@dataclass
class Candidate:
    """What is measured: `gpt2` (transformers') or one of our patterns with its n_shard and tp_size."""

    name: str
    pattern: str = ""  # empty: transformers' GPT-2
    n_shard: int = 1
    tp_size: int = 1
    compile: bool = False

    @property
    def label(self):
        tp = f" tp {self.tp_size}" if self.tp_size > 1 else ""
        return f"{self.name}{tp}{' compiled' if self.compile else ''}"


def parse(text, n_layer, tp_size=1, compiled=False):
    """`gpt2`, or VARIANT@N_SHARD with VARIANT baseline, spd, grouped:LAYERS or a pattern -> Candidate."""
    if text == "gpt2":
        return Candidate(text, compile=compiled)
    variant, _, n_shard = text.partition("@")
    if not n_shard.isdecimal() or int(n_shard) < 1:
        raise ValueError(f"{text!r}: a candidate is gpt2 or VARIANT@N_SHARD, such as grouped:3@2")
    name, _, layers = variant.partition(":")
    if name == "grouped" and layers.isdecimal():
        pattern = rsm.grouped(n_layer, int(layers))
    elif name in ("baseline", "spd") and not layers:
        pattern = getattr(rsm, name)(n_layer)
    else:
        pattern = rsm.selective(n_layer, variant)
    return Candidate(text, pattern, int(n_shard), tp_size, compiled)


def measure(candidates, job, args):
    """What `job` measures of the candidates in alternating rounds: [candidate][round][rank].

    Raises RuntimeError if a process ends before its time.
    """
    results = [[] for _ in candidates]
    for launch in range(args.launches):
        order = [(i + launch) % len(candidates) for i in range(len(candidates))]
        with tempfile.TemporaryDirectory() as folder:
            launched = {i: start(candidates[i], job, f"{folder}/{i}", args) for i in order}
            for _ in range(args.rounds):
                for i in order:
                    results[i].append(answers(launched[i], "measure"))
            for ranks in launched.values():
                answers(ranks, "end")
    return results


def start(candidate, job, store, args):
    """Start a candidate's processes and let them build and warm up; returns a pipe for each rank."""
    context = mp.get_context("spawn")
    ranks = []
    for rank in range(candidate.tp_size):
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, rank, candidate, job, store, args), daemon=True).start()
        theirs.close()
        ranks.append(ours)
    answers(ranks, "measure")
    return ranks


def answers(ranks, message):
    """Send `message` to all ranks and return their answers. Raises RuntimeError if a process ended instead."""
    for pipe in ranks:
        pipe.send(message)
    try:
        return [pipe.recv() for pipe in ranks]
    except EOFError:
        raise RuntimeError("a process ended; its error stands above") from None


def serve(pipe, rank, candidate, job, store, args):
    """A rank's process: build what `job` makes, then measure at each message until the last one."""
    device, dtype, backend = parallel.choose_device(args.device, args.dtype)
    if device == "cuda":
        device = f"cuda:{rank}"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // candidate.tp_size))
    layout = parallel.Layout(torch.device(device), dtype, tp_size=candidate.tp_size)
    if candidate.tp_size > 1:
        if backend == "gloo":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=candidate.tp_size)
        layout.tp_group = dist.group.WORLD
    measured = job(candidate, layout, args)
    while pipe.recv() == "measure":
        pipe.send(measured())
    if candidate.tp_size > 1:
        dist.destroy_process_group()
    pipe.send("ended")


def build(candidate, layout, args):
    """The model of a candidate with random weights, on its device."""
    torch.manual_seed(0)
    shape = dict(vocab_size=args.vocab_size, n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd)
    if not candidate.pattern:
        from transformers import GPT2Config, GPT2LMHeadModel

        no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        return GPT2LMHeadModel(GPT2Config(**shape, n_positions=args.block_size, **no_dropout)).to(layout.device)
    shape |= dict(block_size=args.block_size, n_shard=candidate.n_shard, sync_pattern=candidate.pattern)
    return rsm.GPT(rsm.GPTConfig(**shape), layout.tp_group).to(layout.device)


def peak_memory(device, reset=False):
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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------------------------------------------------------
# train: a step is forward, backward and AdamW


def training(candidate, layout, args):
    """A function that trains `args.steps` steps and returns (seconds a step, peak bytes)."""
    model = build(candidate, layout, args)
    if candidate.pattern:
        optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), layout.device.type)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    run = torch.compile(model) if candidate.compile else model
    tokens = torch.randint(args.vocab_size, (args.batch_size, args.block_size + 1), device=layout.device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step():
        with layout.autocast():
            loss = run(x, y)[1] if candidate.pattern else run(x, labels=x).loss
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


def train(args):
    """Tokens/s and peak memory a rank of every candidate, eager and compiled, with the ratios to the first."""
    modes = {"eager": [False], "compiled": [True], "both": [False, True]}[args.mode]
    table = []
    for compiled in modes:
        candidates = [parse(text, args.n_layer, args.tp_size, compiled) for text in args.candidates]
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


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help=train.__doc__, description=train.__doc__)
    command.add_argument("candidates", nargs="*", default=["gpt2", "baseline@1", "grouped:3@2", "grouped:3@4"])
    command.add_argument("--mode", choices=["eager", "compiled", "both"], default="both")
    command.add_argument("--tp_size", type=int, default=1, help="ranks of our candidates (default: %(default)s)")
    command.add_argument("--batch_size", type=int, default=4)
    command.add_argument("--steps", type=int, default=1, help="training steps in a round")
    for command in commands.choices.values():
        command.add_argument("--rounds", type=int, default=5, help="of each launch (default: %(default)s)")
        command.add_argument("--launches", type=int, default=3, help="default: %(default)s")
        command.add_argument("--n_layer", type=int, default=12)
        command.add_argument("--n_head", type=int, default=12)
        command.add_argument("--n_embd", type=int, default=768)
        command.add_argument("--vocab_size", type=int, default=50304)
        command.add_argument("--block_size", type=int, default=256)
        command.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
        command.add_argument("--dtype", help="float32, bfloat16 or float16 (default: bfloat16 on CUDA, float32 on CPU)")
        command.add_argument("--json", help="write the results there as well")
    args = parser.parse_args(argv)
    try:
        results = {"train": train}[args.command](args)
        if args.json:
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump({"settings": vars(args), "results": results}, file, indent=1)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
