"""Run a function on several gloo processes of this machine, with a time limit."""

import os
import tempfile
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _entry(rank, world_size, store, function, arguments):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=limit)
    function(rank, *arguments)
    dist.destroy_process_group()


def run_ranks(world_size, function, *arguments, limit=180):
    """Call function(rank, *arguments) on every rank. Raises what a rank raised; TimeoutError after `limit` s."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, f"{folder}/store", function, arguments)
        context = mp.start_processes(_entry, arguments, nprocs=world_size, join=False, start_method="spawn")
        end = time.monotonic() + limit
        while not context.join(timeout=1):
            if time.monotonic() > end:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"{function.__name__} on {world_size} ranks took over {limit} s")
