"""The layout of a run: device, number type, process groups (data parallel x tensor parallel), gradients over them."""

import contextlib
import ctypes
import datetime
import gc
import importlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # its functions keep the group that there is at its import for good: here none

from reduced_sync.cli import StopSignal, one_line, stop_signals

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h

# what torch says on a CPU; of a GPU it raises OutOfMemoryError
NO_MEMORY = "can't allocate memory|Storage size calculation overflowed|integer multiplication overflow"
NO_COMPILER = "InvalidCxxCompiler|CppCompileError|TritonMissing|Failed to find C compiler"

DTYPE_HELP = "float32, bfloat16 or float16; None: bfloat16 on GPUs that have it, float16 on others, float32 on a CPU"
ERROR_FILE = "REDUCED_SYNC_ERROR_FILE"  # the environment variable with which study.py asks for it

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD_SIZE))
RESTART_COUNT = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


@dataclass
class Layout:
    """Where this process stands. TP ranks are neighbors, so that a TP group stays within a node."""

    device: torch.device
    dtype: torch.dtype
    dp_size: int = 1
    dp_rank: int = 0
    tp_size: int = 1
    dp_group: dist.ProcessGroup | None = None
    tp_group: dist.ProcessGroup | None = None

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of a forward pass: none in float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def choose_device(
    device: str | None = None, dtype: str | None = None, backend: str | None = None
) -> tuple[str, torch.dtype, str]:
    """Device type, torch dtype and backend, each chosen where it is None. Raises ValueError for what is not there."""
    has_cuda = torch.cuda.is_available()
    if device is None and not has_cuda and torch.version.cuda and RANK == 0:
        print(f"no GPU is used, though torch is built for CUDA {torch.version.cuda}: {_no_cuda()}", file=sys.stderr)
    device = ("cuda" if has_cuda else "cpu") if device is None else device
    if not (match := re.fullmatch(r"cpu|cuda(:\d+)?", device)):
        raise ValueError(f"device={device!r}: allowed are cuda, cuda:N and cpu")
    on_cuda = device.startswith("cuda")
    if on_cuda and not has_cuda:
        raise ValueError(f"device={device!r}: torch can use no GPU here ({_no_cuda()}); try --device=cpu")
    if on_cuda and match[1] and LOCAL_WORLD_SIZE > 1:
        raise ValueError(f"device={device!r} is one GPU for {LOCAL_WORLD_SIZE} processes; cuda gives each its own")
    needed = int(match[1][1:]) + 1 if match[1] else LOCAL_WORLD_SIZE
    if on_cuda and needed > (count := torch.cuda.device_count()):
        raise ValueError(f"device={device!r} with {LOCAL_WORLD_SIZE} processes needs {needed} GPUs; here are {count}")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is None:  # a GPU that emulates bfloat16 is slow at it
        has_bfloat16 = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if has_bfloat16 else "float16" if on_cuda else "float32"
    if dtype not in dtypes:
        raise ValueError(f"dtype={dtype!r}: allowed are {', '.join(dtypes)}")
    backend = ("nccl" if on_cuda else "gloo") if backend is None else backend
    if backend not in ("nccl", "gloo") or (backend == "nccl" and not on_cuda):
        raise ValueError(f"backend={backend!r}: allowed are nccl (on CUDA) and gloo")
    return device, dtypes[dtype], backend


def check_tp_size(tp_size: int) -> None:
    """Raise ValueError unless this run's processes, and those of each node, can be divided into TP groups."""
    if WORLD_SIZE % tp_size:
        raise ValueError(f"the world size, {WORLD_SIZE} processes, is not divisible by tp_size={tp_size}")
    if LOCAL_WORLD_SIZE % tp_size:
        raise ValueError(
            f"tp_size={tp_size} does not divide the {LOCAL_WORLD_SIZE} processes of a node: a TP group would span nodes"
        )


def should_compile(compile: bool | None, device: str) -> bool:
    """Whether torch.compile is used: as the key `compile` says, and where that is None on CUDA."""
    return device.startswith("cuda") if compile is None else compile


def _no_cuda():
    """Why torch can use no CUDA device, in its own words."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).partition(". ")[0].partition("\n")[0]
    return "no device is visible"


def device_name(device: torch.device) -> str:
    """The model of a GPU or a processor; of a processor also whether it has bfloat16 instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = torch.cpu.get_capabilities()
    name = facts.get("cpu_name", facts["architecture"])
    return f"{name}, {'with' if cpu_has_bfloat16() else 'without'} bfloat16 instructions"


def cpu_has_bfloat16() -> bool:
    """Whether the processor has bfloat16 instructions; without them bfloat16 is slower than float32."""
    facts = torch.cpu.get_capabilities()
    return any(facts.get(key) for key in ("avx512_bf16", "amx_bf16", "bf16"))


def cpu_is_fast_in_bfloat16() -> bool:
    """Whether bfloat16 is faster than float32: 4x on an AMD EPYC, 0.65x on an Intel Xeon that has it without AMX."""
    facts = torch.cpu.get_capabilities()
    return cpu_has_bfloat16() and ("Intel" not in facts.get("cpu_name", "") or facts.get("amx_bf16", False))


def set_device(device: str, local_rank: int) -> torch.device:
    """The torch.device of this process, made the current one; of `cuda` without a number the GPU `local_rank`."""
    device = torch.device(device)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    return device


def start(
    device: str,
    dtype: torch.dtype,
    backend: str,
    tp_size: int,
    timeout_s: float,
    spawned: tuple[int, str] | None = None,
) -> Layout:
    """This process's Layout; joins the process group that torchrun describes if there is more than one process.

    With `spawned`, (rank, file), torchrun has no part in it: the group is tp_size processes of this machine that meet
    in the file.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    if spawned:
        rank, world_size = local_rank, local_size = spawned[0], tp_size
    else:
        rank, world_size, local_rank, local_size = RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE
    layout = Layout(set_device(device, local_rank), dtype)
    if layout.device.type == "cpu":
        keep_freed_memory()
    if world_size > 1:
        if dtype == torch.float16:  # gradient_scaler's; imported later it would keep the group, too
            importlib.import_module("torch.distributed.fsdp.sharded_grad_scaler")
        store = dist.FileStore(spawned[1], world_size) if spawned else _torchruns_store(timeout)
        keys = dict(store=store, rank=rank, world_size=world_size, timeout=timeout)
        if backend == "nccl":
            keys["device_id"] = layout.device  # connects now: a bad link shows at the start
        dist.init_process_group(backend, **keys)
        if layout.device.type == "cpu":
            bind_to_cores(local_rank, local_size)
        layout.dp_size, layout.dp_rank, layout.tp_size = world_size // tp_size, rank // tp_size, tp_size
        tp_groups = [list(range(first, first + tp_size)) for first in range(0, world_size, tp_size)]
        dp_groups = [list(ranks) for ranks in zip(*tp_groups, strict=True)]
        if layout.dp_size > 1:
            layout.dp_group, _ = dist.new_subgroups_by_enumeration(dp_groups, timeout=timeout)
        if layout.tp_size > 1:
            layout.tp_group, _ = dist.new_subgroups_by_enumeration(tp_groups, timeout=timeout)
    return layout


def _torchruns_store(timeout):
    """The store in which the ranks of this attempt find each other."""
    store, *_ = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps its store over restarts: a new group would find the addresses of the dead one there
        # (pytorch#135712). Several nodes do not count restarts alike; docs/faults.md says what to do.
        store = dist.PrefixStore(f"restart {RESTART_COUNT}", store)
    return store


def keep_freed_memory() -> None:
    """Have glibc, where it is the C library, keep the memory of freed tensors for the next ones.

    By itself it hands every large tensor's pages back and takes new ones, at each step: a tenth of a step at 124 M.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def bind_to_cores(local_rank: int, local_size: int) -> None:
    """Give this rank's main thread cores of its own, and gloo's threads, which stay free, precedence over it.

    Left to the scheduler they wait behind a main thread for up to a tick of its clock, 4 ms: 5x an all-reduce. Call it
    once the process group exists; it does nothing where there are fewer cores than ranks, or no way to bind.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if share := len(cores) // local_size:
        os.sched_setaffinity(0, cores[local_rank * share : (local_rank + 1) * share])
        os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) + 5)


def end() -> None:
    """Leave the process group where there is one, and let none of its threads outlive it (they can abort the exit)."""
    gc.collect()  # an error that torch catches while it imports holds the frames of that moment, and so the group
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_world(values: list[float], device: torch.device | str) -> list[float]:
    """The sums over all ranks of a list of numbers."""
    if not dist.is_initialized():
        return values
    # float64: counts of tokens and sums of losses stay exact
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def until_stopped(batches: Iterable, n_windows: int, batch_size: int, layout: Layout, stop: StopSignal) -> Iterator:
    """Yield this replica's batches of n_windows that all replicas share, until a rank is asked to stop: then all end.

    They ask one another before each batch that every replica has. `stop.agreed` says that they have ended early.
    """
    least = -(-(n_windows // layout.dp_size) // batch_size)
    for i, batch in enumerate(batches):
        if i < least and agree([], [stop.asked is not None], layout.device)[1][0]:
            stop.agreed = True
            return
        yield batch


def from_rank_0(value: Any) -> Any:
    """What rank 0 has, on every rank: any value that can be pickled."""
    answer = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    return answer[0]


def agree(numbers: list[float], questions: list[bool], device: torch.device | str) -> tuple[list[float], list[bool]]:
    """The means over all ranks of the numbers, and whether any rank says yes to each question: one all-reduce."""
    n = dist.get_world_size() if dist.is_initialized() else 1
    sums = sum_over_world([*(x / n for x in numbers), *map(float, questions)], device)
    return sums[: len(numbers)], [votes > 0 for votes in sums[len(numbers) :]]


def check_same(start: object, device: torch.device) -> None:
    """Raise ErrorOnAllRanks unless all ranks start from the same keys and checkpoint."""
    if agree([], [repr(start) != repr(from_rank_0(start))], device)[1][0]:
        raise ErrorOnAllRanks("ranks found different checkpoints or were given different keys: start all of them alike")


def share_replicated(
    model: torch.nn.Module, is_sharded: Callable[[str], bool], group: dist.ProcessGroup | None
) -> None:
    """Give every rank of the TP `group` the replicated parameters of its first one.

    They are equal on a CPU. On a GPU some kernels add in varying order, so ranks drift apart by rounding errors.
    """
    for name, parameter in model.named_parameters() if group is not None else ():
        if not is_sharded(name):
            dist.broadcast(parameter.detach(), group=group, group_src=0)


def average_gradients(model: torch.nn.Module, group: dist.ProcessGroup | None, bucket_bytes: int = 64 * 2**20) -> None:
    """Replace every gradient by its mean over the data-parallel `group` (None: nothing to do), a bucket at a time.

    Not DDP: on the default group it would overwrite other TP ranks' shards, and its hooks split a compiled graph.
    """
    if group is None:
        return
    bucket, size = [], 0
    gradients = [p.grad for p in model.parameters()]
    for i, gradient in enumerate(gradients):
        bucket.append(gradient)
        size += gradient.numel() * gradient.element_size()
        if size >= bucket_bytes or i + 1 == len(gradients):
            flat = torch.cat([g.reshape(-1) for g in bucket])
            dist.all_reduce(flat, group=group)
            flat /= group.size()
            for g, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(mean.view_as(g))
            bucket, size = [], 0


def clip_gradients(
    model: torch.nn.Module, max_norm: float, is_sharded: Callable[[str], bool], group: dist.ProcessGroup | None
) -> float:
    """Scale all gradients so that their global norm is at most max_norm (0: leave them); returns the norm before.

    Sharded parameters' squares are summed over the TP `group`, replicated ones are counted once.
    """
    named = [(name, p.grad) for name, p in model.named_parameters()]
    sharded = torch.nn.utils.get_total_norm([g for name, g in named if is_sharded(name)]) ** 2
    replicated = torch.nn.utils.get_total_norm([g for name, g in named if not is_sharded(name)]) ** 2
    if group is not None:
        dist.all_reduce(sharded, group=group)
    norm = (sharded + replicated).sqrt()
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm.item()


def gradient_scaler(layout: Layout) -> torch.amp.GradScaler:
    """A GradScaler for float16, one that does nothing otherwise. All ranks see the same overflow."""
    enabled = layout.dtype == torch.float16
    if enabled and dist.is_initialized():
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler  # half a second, rarely needed

        return ShardedGradScaler(layout.device.type, process_group=dist.group.WORLD)
    return torch.amp.GradScaler(layout.device.type, enabled=enabled)


def step_optimizer(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, learning_rate: float, is_finite: bool
) -> None:
    """Update the weights by their unscaled gradients, or not where all ranks agree that one is not finite."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    if is_finite:
        optimizer.step()  # scaler.step would look for what all ranks have just agreed on
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def seed_of(*numbers: int) -> int:
    """One seed from several numbers, as different for neighbors as for strangers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def write_error_file(line: str) -> None:
    """Write an error to the file that ERROR_FILE names, if any: the first one, since others may follow from it."""
    if path := os.environ.get(ERROR_FILE):
        with contextlib.suppress(OSError), open(path, "x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line)


class ErrorOnAllRanks(ValueError):
    """An error that every rank raises at the same point, so one of them says it."""


def raise_together(error: str) -> None:
    """Raise ErrorOnAllRanks on every rank if `error` is not empty on any."""
    device = "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"
    _, [failed] = agree([], [bool(error)], device)
    if failed:
        raise ErrorOnAllRanks(error or "another rank failed")


@contextlib.contextmanager
def report_errors() -> Iterator[None]:
    """End the process with one line on stderr and status 1 for what users and their machines do wrong.

    Errors before the process group exists are the same on every rank, so rank 0 says them; later ones name their rank.
    """
    try:
        yield
        print(end="", flush=True)  # whose error is one line, too
        return
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        line = one_line(error)
        shared = isinstance(error, ErrorOnAllRanks) or not dist.is_initialized()
        lost = False
        if isinstance(error, MemoryError) or re.search(NO_MEMORY, str(error)):
            line = f"not enough memory: {line}"
        elif re.search(NO_COMPILER, str(error)):
            line = f"torch.compile finds no compiler that works: install one, or use --compile=False ({line})"
        elif isinstance(error, RuntimeError):
            lost = WORLD_SIZE > 1 and re.search(
                r"gloo|NCCL|socket|connection|timeout|timed out", str(error), re.IGNORECASE
            )
            if lost:
                # NCCL says first where, and on a line of its own what
                reason = re.search(r"Last error:\s*(.+)", str(error))
                line = f"lost contact with another rank: {line}{f' ({reason[1]})' if reason else ''}"
            elif not isinstance(error, torch.OutOfMemoryError | dist.DistError):
                write_error_file(f"{type(error).__name__}: {line}")
                raise  # a mistake of ours: its traceback is wanted
    except Exception as error:  # as well
        write_error_file(f"{type(error).__name__}: {one_line(error)}")
        raise
    waits = RANK > 0 if shared else lost
    if waits:
        # The rank at fault says the line, and then torchrun ends this process; on another node local rank 0 says it.
        for number in stop_signals():
            signal.signal(number, signal.SIG_DFL)
        time.sleep(20 if LOCAL_RANK == 0 else 30)
    write_error_file(line if shared else f"rank {RANK}: {line}")
    print(f"rank {RANK}: {line}" if not shared else f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(1)
