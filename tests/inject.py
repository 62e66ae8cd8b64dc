"""The training script with faults in it; not a test itself. Under torchrun or alone:

torchrun --standalone --nproc_per_node=2 tests/inject.py RANK:MOMENT:COUNT:FAULT[,...] ARGUMENTS...

On rank RANK, the COUNT-th time that it comes to MOMENT, it meets FAULT; once only, also after a restart, which goes on
with the next fault of the list. COUNT may be a range as in 3-5. Moments are places in the run that a fault may hit,
faults are what happens there.
"""

import builtins
import glob
import os
import signal
import sys
import time

import torch

import train_reduced_sync as script
from reduced_sync.train.log import RunLog

faults = sys.argv[1].split(",")
number = min(sum(bool(glob.glob(f"struck-{i}-*")) for i in range(len(faults))), len(faults) - 1)
rank, moment, count, fault = faults[number].split(":")
first, last = (int(n) for n in (count.split("-") * 2)[:2])
calls = 0


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(1000)


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def crash():
    raise RuntimeError("a mistake somewhere")


def full():
    raise OSError(28, "No space left on device")


def strike():
    """Meet the fault if it is time; returns whether it is."""
    global calls
    calls += 1
    if script.RANK != int(rank) or not first <= calls <= last or os.path.exists(f"struck-{number}-{calls}"):
        return False
    builtins.open(f"struck-{number}-{calls}", "w").close()
    if fault != "nan":
        {"kill": kill, "hang": hang, "stop": stop, "crash": crash, "full": full}[fault]()
    return True


def striking(owner, name):
    """Let the fault strike just before the function `name` of `owner` is called."""
    function = getattr(owner, name)

    def wrapper(*arguments, **keys):
        strike()
        return function(*arguments, **keys)

    setattr(owner, name, wrapper)


def nan_in_gradients(model, *arguments):
    if strike():
        next(model.parameters()).grad.view(-1)[0] = float("nan")
    return average_gradients(model, *arguments)


def half_written(checkpoint, file):
    """Write the first half of a checkpoint before the fault strikes."""
    begin = file.tell()
    save(checkpoint, file)
    file.truncate((begin + file.tell()) // 2)
    strike()
    file.seek(begin)
    save(checkpoint, file)


average_gradients, save = script.distributed.average_gradients, torch.save
if moment == "update":  # the gradients of all micro-steps are there, those of other ranks not
    script.distributed.average_gradients = nan_in_gradients
elif moment == "evaluation":  # before a batch
    striking(script.Corpus, "_cut")
elif moment == "gather":  # all ranks send their shards to be saved
    striking(script.ckpt, "gather")
elif moment == "write":
    torch.save = half_written
elif moment == "log":
    striking(RunLog, "line")
elif moment == "start":
    striking(script.distributed, "start")
else:  # fsync, link or replace, in the middle of a save
    striking(os, moment)

if __name__ == "__main__":
    script.main(sys.argv[2:])
