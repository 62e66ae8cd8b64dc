"""Models to be timed against each other, each in processes of its own, one per tensor-parallel rank.

Candidates take turns, a round each, so that a slow moment of the machine hits all alike, and all can be launched anew
several times in another order, since the memory that a process gets can be slow.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import reduced_sync_model as rsm
from reduced_sync import distributed
from reduced_sync.cli import sigint_blocked

CANDIDATE = re.compile(r"(?:([1-9][0-9]*)x([1-9][0-9]*)|[^+@]+)(\+[a-z-]+)?(?:@([1-9][0-9]*))?")


@dataclass
class Candidate:
    """What is measured, on tp_size ranks: one of our models, or transformers' GPT-2 of the same sizes."""

    name: str
    config: rsm.GPTConfig
    is_gpt2: bool = False
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

    RULE is that of SyncRule.parse, or LAYERSxWIDTH, a dense control: a baseline of that size, with a +METHOD if one
    follows. Its head size is even, makes heads divisible by n_shard, is a multiple of 8 where one does, and of those
    the nearest to 64, the larger of two. `n_shard` counts where the text has none.
    """
    match = CANDIDATE.fullmatch(text)
    n_shard = int(match[4] or n_shard or 0) if match else 0
    if not n_shard:
        wanted = "RULE@N_SHARD, such as grouped-4@2, spd+delayed@2 or 3x1280@2, or of train gpt2"
        raise ValueError(f"{text!r}: a candidate is {wanted}")
    if not match[1]:
        return dict(n_shard=n_shard, sync=str(rsm.SyncRule.parse(text.partition("@")[0], n_layer)))
    n_layer, n_embd = int(match[1]), int(match[2])
    if n_layer > rsm.MOST_LAYERS or n_embd > 2**20:
        raise ValueError(f"{text!r}: at most {rsm.MOST_LAYERS} layers and a width of {2**20} are allowed")
    sizes = [size for size in range(2, n_embd + 1, 2) if n_embd % size == 0 and n_embd // size % n_shard == 0]
    if not sizes:
        raise ValueError(f"{text!r}: no even head size makes heads divisible by n_shard={n_shard}")
    n_head = n_embd // min(sizes, key=lambda size: (size % 8 > 0, abs(size - 64), -size))
    sync = str(rsm.SyncRule.parse("baseline" + (match[3] or ""), n_layer))
    return dict(n_shard=n_shard, n_layer=n_layer, n_embd=n_embd, n_head=n_head, sync=sync)


def measure(
    candidates: list[Candidate],
    job: Callable,
    device: str | None = None,
    dtype: str | None = None,
    rounds: int = 1,
    launches: int = 1,
) -> list[list[list]]:
    """What `job` measures of the candidates in alternating rounds: [candidate][round][rank].

    job(candidate, layout), on each rank, returns the function that measures once; its first result is left out: there
    code is compiled and memory allocated. Raises ValueError for a device that is not there, ChildProcessError if a
    process ends before its time.
    """
    place = distributed.choose_device(device, dtype)
    for candidate in candidates:
        gpus = 1 if ":" in place[0] else torch.cuda.device_count()
        if place[0].startswith("cuda") and candidate.tp_size > gpus:
            raise ValueError(f"{candidate.label} needs {candidate.tp_size} GPUs; device={place[0]!r} has {gpus}")
    results = [[] for _ in candidates]
    for launch in range(launches):
        order = [(i + launch) % len(candidates) for i in range(len(candidates))]
        with tempfile.TemporaryDirectory() as folder:
            launched = {i: start(candidates[i], job, place, f"{folder}/{i}") for i in order}
            for i in order:
                answers(launched[i], "measure")
            for _ in range(rounds):
                for i in order:
                    results[i].append(answers(launched[i], "measure"))
            for ranks in launched.values():
                answers(ranks, "end")
            for process in mp.active_children():  # killed in its tear-down, it would leave semaphores to the system
                process.join()
    return results


def start(candidate: Candidate, job: Callable, place: tuple[str, torch.dtype, str], store: str) -> list[Connection]:
    """Start a candidate's processes, which build what they measure; returns a pipe for each rank.

    place: device, dtype and backend. store: a file in which the ranks meet.
    """
    context = mp.get_context("spawn")
    ranks = []
    for rank in range(candidate.tp_size):
        ours, theirs = context.Pipe()
        with sigint_blocked():
            context.Process(target=serve, args=(theirs, rank, candidate, job, place, store), daemon=True).start()
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
        raise ChildProcessError("a worker process died; see its error above") from None


@distributed.report_errors()
def serve(pipe, rank, candidate, job, place, store):
    """A rank's process: build what `job` makes, then measure at each message until the last one."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // candidate.tp_size))
    if place[2] == "gloo":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    layout = distributed.start(*place, candidate.tp_size, timeout_s=1800, spawned=(rank, store))
    measured = job(candidate, layout)
    with contextlib.suppress(EOFError, ConnectionError):  # whoever started it has gone
        while pipe.recv() == "measure":
            pipe.send(measured())
        pipe.send("ended")
    if candidate.tp_size > 1:
        dist.destroy_process_group()


def build(candidate: Candidate, layout: distributed.Layout) -> nn.Module:
    """The model of a candidate with random weights, on its device."""
    torch.manual_seed(0)
    c = candidate.config
    if not candidate.is_gpt2:
        return rsm.GPT(c, layout.tp_group).to(layout.device)
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = dict(vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(GPT2Config(**shape, n_positions=c.block_size, **no_dropout)).to(layout.device)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
