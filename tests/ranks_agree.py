"""The training script's main, run after run in the same processes; not a test itself. Under torchrun or alone:

torchrun --standalone --nproc_per_node=4 tests/ranks_agree.py ARGUMENTS [next ARGUMENTS]...

Starting Python and torch costs more than a tiny run. After each run, before the process group ends, it checks on every
rank that replicated parameters are bit-equal everywhere and sharded ones on the replicas of a shard, and says so.
At the end no thread of gloo may be left: in the interpreter's tear-down it can abort the process.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.fsdp.sharded_grad_scaler  # before the group, as the first run of float16 would

import train_reduced_sync as script

models = []
configure_optimizers = script.rsm.GPT.configure_optimizers
init_process_group, destroy_process_group = dist.init_process_group, dist.destroy_process_group


def remember(model, *arguments):
    models.append(model)
    return configure_optimizers(model, *arguments)


def compare():
    """Raise where this rank's parameters are not what they should be beside another rank's."""
    model = models[-1]
    for name, parameter in model.named_parameters():
        copies = [torch.empty_like(parameter) for _ in range(dist.get_world_size())]
        dist.all_gather(copies, parameter.detach().contiguous())
        for rank, copy in enumerate(copies):
            same = not script.rsm.is_sharded(name) or (rank - dist.get_rank()) % model.tp_size == 0
            if same or name.endswith("c_fc.weight"):  # other shards' matrices are other numbers
                assert torch.equal(copy, parameter) == same, f"{name} on ranks {dist.get_rank()} and {rank}"
    if model.tp_group is not None:  # gloo's own default is 30 minutes
        waits = model.tp_group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        assert waits == script.Config().timeout_s, f"ranks of a TP group wait for {waits} s"
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks agree", flush=True)


def init_once(*arguments, **keys):
    """One process group for all runs: a second one finds the first one's addresses in torchrun's store."""
    if not dist.is_initialized():
        init_process_group(*arguments, **keys)


script.rsm.GPT.configure_optimizers = remember
script.distributed.share_replicated = lambda *_: None  # they agree without
dist.init_process_group, dist.destroy_process_group = init_once, compare
runs = [[]]
for argument in sys.argv[1:]:
    if argument == "next":
        runs.append([])
    else:
        runs[-1].append(argument)
for run in runs:
    script.main(run)
if dist.is_initialized():
    models.clear()
    destroy_process_group()
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name], threads
