"""Models to be timed against each other, each in processes of its own, one a tensor-parallel rank.

Candidates take turns, a round each, so that a slow moment of the machine hits all alike, and all can be launched anew
several times in another order, since the memory that a process gets can be slow.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import reduced_sync_model as rsm
from reduced_sync import distributed
from reduced_sync.cli import ctrl_c_held
from reduced_sync.train.experiment import model_keys

CANDIDATE = re.compile(r"(?:([1-9][0-9]*)x([1-9][0-9]*)|[^+@]+)(\+[a-z]+)?(?:@([1-9][0-9]*))?")


@dataclass
class Candidate:
    """What is measured: `gpt2` (transformers') or one of our models, on tp_size ranks."""

    name: str
    keys: dict = field(default_factory=dict)  # of its GPTConfig, beside the options'; none: transformers' GPT-2
    tp_size: int = 1
    compile: bool = False
    silent: bool = False  # its all-reduces send nothing

    @property
    def label(self) -> str:
        """As it is printed: the name, and what it does not say."""
        tp = f" tp {self.tp_size}" if self.tp_size > 1 else ""
        return f"{self.name}{tp}{' compiled' if self.compile else ''}{' silent' if self.silent else ''}"


def keys_of(text: str, n_layer: int, n_shard: int | None = None) -> dict:
    """The keys of GPTConfig that RULE[@N_SHARD] names. Raises ValueError.

    RULE is that of SyncRule.parse, or LAYERSxWIDTH, a dense control: a baseline of that size, with a +RIVAL if one
    follows. Its head size is even, makes heads divisible by n_shard, is a multiple of 8 where one does, and of those
    the nearest to 64, the larger of two. `n_shard` counts where the text has none.
    """
    found = CANDIDATE.fullmatch(text)
    n_shard = int(found[4] or n_shard or 0) if found else 0
    if not n_shard:
        wanted = "gpt2 or RULE@N_SHARD, such as grouped-4@2, spd+delayed@2 or 3x1280@2"
        raise ValueError(f"{text!r}: a candidate is {wanted}")
    if not found[1]:
        return dict(n_shard=n_shard, sync=str(rsm.SyncRule.parse(text.partition("@")[0], n_layer)))
    n_layer, n_embd = int(found[1]), int(found[2])
    sizes = [size for size in range(2, n_embd + 1, 2) if n_embd % size == 0 and n_embd // size % n_shard == 0]
    if not sizes:
        raise ValueError(f"{text!r}: no even head size makes heads divisible by n_shard={n_shard}")
    n_head = n_embd // min(sizes, key=lambda size: (size % 8 > 0, abs(size - 64), -size))
    sync = str(rsm.SyncRule.parse("baseline" + (found[3] or ""), n_layer))
    return dict(n_shard=n_shard, n_layer=n_layer, n_embd=n_embd, n_head=n_head, sync=sync)


def parse_candidate(text: str, n_layer: int, tp_size: int = 1, compiled: bool = False) -> Candidate:
    """`gpt2`, or one of ours as keys_of takes it, with its @N_SHARD. Raises ValueError."""
    if text == "gpt2":
        return Candidate(text, compile=compiled)
    return Candidate(text, keys_of(text, n_layer), tp_size, compiled)


def configs_of(args: Any) -> dict[str, rsm.GPTConfig]:
    """{name: GPTConfig} of the candidates to decode with. Raises ValueError."""
    return {name: config_of(keys_of(name, args.n_layer, args.n_shard), args) for name in args.candidates}


def describe(config: rsm.GPTConfig) -> dict:
    """What a row of results says of its model: pattern, all-reduces of a forward pass and how many are hidden, keys."""
    rule = config.rule
    names = "n_layer n_embd n_head n_shard sync norm position mlp n_hidden n_kv_head head_size vocab_size".split()
    row = {"pattern": rule.pattern, "syncs": rule.syncs, "hidden": rule.hidden}
    return row | {"model": {name: getattr(config, name) for name in names}}


def measure(candidates: list[Candidate], job: Callable, args: Any) -> list[list[list]]:
    """What `job` measures of the candidates in alternating rounds: [candidate][round][rank].

    job(candidate, layout, args), on each rank, returns the function that measures once. `args` are bench.py's options.
    Raises ValueError for what cannot be built, ChildProcessError if a process ends before its time.
    """
    device, _, _ = distributed.choose_device(args.device, args.dtype)
    for candidate in candidates:
        if device.startswith("cuda") and candidate.tp_size > torch.cuda.device_count():
            raise ValueError(f"{candidate.label} needs {candidate.tp_size} GPUs; here are {torch.cuda.device_count()}")
        config_of(candidate.keys, args)
    results = [[] for _ in candidates]
    for launch in range(args.launches):
        order = [(i + launch) % len(candidates) for i in range(len(candidates))]
        with tempfile.TemporaryDirectory() as folder:
            launched = {i: start(candidates[i], job, f"{folder}/{i}", args) for i in order}
            for i in order:
                answers(launched[i], "measure")  # once built, to warm up
            for _ in range(args.rounds):
                for i in order:
                    results[i].append(answers(launched[i], "measure"))
            for ranks in launched.values():
                answers(ranks, "end")
            for process in mp.active_children():  # killed in its tear-down, it would leave semaphores to the system
                process.join()
    return results


def start(candidate: Candidate, job: Callable, store: str, args: Any) -> list[Connection]:
    """Start a candidate's processes, which build what they measure; returns a pipe for each rank."""
    context = mp.get_context("spawn")
    ranks = []
    for rank in range(candidate.tp_size):
        ours, theirs = context.Pipe()
        with ctrl_c_held():
            context.Process(target=serve, args=(theirs, rank, candidate, job, store, args), daemon=True).start()
        theirs.close()
        ranks.append(ours)
    return ranks


def answers(ranks: list[Connection], message: str) -> list:
    """Send `message` to all ranks and return their answers. Raises ChildProcessError if a process ended instead."""
    try:
        for pipe in ranks:
            pipe.send(message)
        return [pipe.recv() for pipe in ranks]
    except (EOFError, ConnectionError):
        raise ChildProcessError("a process ended; its error stands above") from None


@distributed.clear_errors()
def serve(pipe: Connection, rank: int, candidate: Candidate, job: Callable, store: str, args: Any) -> None:
    """A rank's process: build what `job` makes, then measure at each message until the last one."""
    device, dtype, backend = distributed.choose_device(args.device, args.dtype)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // candidate.tp_size))
    if backend == "gloo":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    layout = distributed.start(device, dtype, backend, candidate.tp_size, timeout_s=1800, spawned=(rank, store))
    measured = job(candidate, layout, args)
    with contextlib.suppress(EOFError, ConnectionError):  # whoever started it has gone
        while pipe.recv() == "measure":
            pipe.send(measured())
        pipe.send("ended")
    if candidate.tp_size > 1:
        dist.destroy_process_group()


def config_of(keys: dict, args: Any) -> rsm.GPTConfig:
    """The GPTConfig of one of our candidates, or the sizes of transformers' in its terms. Raises ValueError."""
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")  # predict has no block_size
    shape = {name: vars(args)[name] for name in names if name in vars(args)}
    if args.modern:
        shape |= dict(norm="rmsnorm", position="rope", mlp="swiglu", n_kv_head=args.n_kv_head, bias=False)
    return rsm.GPTConfig(**model_keys(shape | keys))


def build(candidate: Candidate, layout: distributed.Layout, args: Any) -> nn.Module:
    """The model of a candidate with random weights, on its device."""
    torch.manual_seed(0)
    if candidate.keys:
        return rsm.GPT(config_of(candidate.keys, args), layout.tp_group).to(layout.device)
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = dict(vocab_size=args.vocab_size, n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd)
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(GPT2Config(**shape, n_positions=args.block_size, **no_dropout)).to(layout.device)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
