"""Smoke test: build and check every variant, and print two lines for each, ending in `✓ PASS`, or `✗ FAIL` and why.

$ python test_all_architectures.py            # full size: 12 layers, 768 wide, about 124 M parameters
$ python test_all_architectures.py --small    # 12 layers, 64 wide, in seconds

It needs no GPU and no launcher. For each variant it checks: the number of parameters; that a forward and a backward
pass execute as many all-reduces on a TP rank as the sync pattern says (counted by PyTorch's CommDebugMode on a process
group that sends nothing); that loss and gradients are finite, and the loss is that of an untrained model; and, with a
small copy in two real processes, that tp_size 2 computes the same gradients as tp_size 1.
"""

from reduced_sync.cli import set_up

if __name__ == "__main__":  # before the imports that take seconds: Ctrl-C ends them in silence
    set_up()

import argparse
import math
import os
import sys
import tempfile
import time
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from reduced_sync.cli import one_line_errors, sigint_blocked
from reduced_sync.train.experiment import MODERN, model_keys
from reduced_sync_model import GPT, GPTConfig

VARIANTS = {  # sync rule, of Llama's kind of block where `modern`: syncs
    "baseline": 24,
    "spd": 12,
    "110111011101": 9,
    "grouped-6": 6,
    "grouped-4": 4,
    "grouped-3": 3,
    "grouped-2": 2,
    "spd+parallel": 12,
    "grouped-6+desync": 6,
    "spd+tracks": 12,
    "baseline+ladder": 24,
    "baseline+delayed": 24,
    "baseline+delayed-layer": 23,
    "baseline modern": 24,
    "spd modern": 12,
}
SIZES = {  # GPTConfig fields and the number of parameters, in millions
    "full": (dict(block_size=1024, vocab_size=50304, n_head=12, n_embd=768), (123.0, 126.0)),
    "small": (dict(block_size=128, vocab_size=128, n_head=4, n_embd=64), (0.59, 0.63)),
}


def batch(vocab_size, B=2, T=32):
    idx = torch.randint(0, vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(1))
    return idx[:, :-1], idx[:, 1:]


def config_of(size, name):
    """The GPTConfig of a variant, without biases, in two shards."""
    shape, (sync, _, modern) = SIZES[size][0], name.partition(" ")
    if modern:
        shape = model_keys(shape | MODERN | dict(n_kv_head=shape["n_head"] // (3 if size == "full" else 2)))
    return GPTConfig(**shape, bias=False, n_shard=2, sync=sync)


def check_variant(name, size):
    """Raise AssertionError unless the variant has the right size, makes its all-reduces, and is trainable."""
    (least, most), syncs = SIZES[size][1], VARIANTS[name]
    config = config_of(size, name)
    x, y = batch(config.vocab_size)

    model = GPT(config)
    n_params = model.get_num_params(non_embedding=False) / 1e6
    assert least < n_params < most, f"{n_params:.2f}M parameters, expected {least} to {most}"
    _, loss = model(x, y)
    loss.backward()
    untrained = math.log(config.vocab_size)
    assert abs(loss.item() - untrained) < 0.5, f"loss {loss.item():.2f} untrained, expected about {untrained:.2f}"
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), f"gradient of {name} is not finite"
        assert parameter.grad.any(), f"gradient of {name} is zero"
    del model, loss

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model = GPT(config, dist.group.WORLD)
        with CommDebugMode() as forward:
            _, loss = model(x, y)
        with CommDebugMode() as backward:
            loss.backward()
    finally:
        dist.destroy_process_group()
    executed = forward.get_total_counts(), backward.get_total_counts()
    assert config.rule.syncs == syncs, f"the rule has {config.rule.syncs} syncs, expected {syncs}"
    unread = config.rule.method_name in ("ladder", "delayed")  # no shard reads what arrives behind the last sublayer
    expected = (syncs, syncs - 1 if unread else syncs)
    assert executed == expected, f"all-reduces forward, backward: {executed}, expected {expected}"
    return n_params


def check_tp(rank, folder):
    """On each of two ranks: write to `folder` why a variant differs from tp_size 1, if it does."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name in VARIANTS:
        config = config_of("small", name)
        x, y = batch(config.vocab_size)
        models = []
        for group in (None, dist.group.WORLD):
            torch.manual_seed(0)
            model = GPT(config, group).double()
            model(x, y)[1].backward()
            models.append(model)
        whole, part = models
        for key, parameter in part.named_parameters():
            expected = part.local_part(key, whole.get_parameter(key).grad)
            error = ((parameter.grad - expected).norm() / expected.norm()).item()
            if not error <= 1e-10:
                with open(f"{folder}/{name}", "w") as file:
                    file.write(f"tp_size 2: gradient of {key} differs from tp_size 1 by {error:.1e}")
                break
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="12 layers, 64 wide, instead of full size")
    size = "small" if parser.parse_args().small else "full"
    warnings.filterwarnings("ignore", message=".*[Bb]ackward hook")  # CommDebugMode's own
    failures = 0
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        with sigint_blocked():
            ranks = mp.start_processes(check_tp, (folder,), nprocs=2, join=False, daemon=True, start_method="spawn")
        while not ranks.join():
            pass
        for name in VARIANTS:
            start = time.perf_counter()
            reason, rule = "", config_of(size, name).rule
            try:
                n_params = check_variant(name, size)
                if os.path.exists(f"{folder}/{name}"):
                    with open(f"{folder}/{name}") as file:
                        reason = file.read()
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
            seconds = time.perf_counter() - start
            failures += bool(reason)
            print(f"{name:16} {rule.diagram}")
            end = f", {rule.hidden} of them hidden" if rule.hidden else " forward and backward"
            count = f"{rule.syncs} all-reduces{end}"
            detail = reason or f"{n_params:.2f}M parameters, {count}, tp 2 = tp 1"
            print(f"{'':16} {detail}, {seconds:.1f} s  {'✗ FAIL' if reason else '✓ PASS'}", flush=True)
    print(f"{len(VARIANTS) - failures} of {len(VARIANTS)} variants pass (A attention, M MLP, | all-reduce)")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
