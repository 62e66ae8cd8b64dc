"""Logs of runs to compare, made by the training code's own writer, and times per token for them."""

import json
import math

from reduced_sync.compare.runs import load_runs
from reduced_sync.train.log import RunLog, iter_line, step_line
from reduced_sync_model import SyncRule

SIZES = {"vocab_size": 128}
UNTUNED = "no verdict, because the learning rates are not bracketed. So far: "


def make(
    folder, name, pattern, losses, n_params=609344, dtype="float32", data=None, resumed=None, sizes=SIZES, **changes
):
    """A run's folder with the evaluations `losses` at steps 0, 10, 20 ..., of 20 steps of half a million tokens.

    `data` is the sha256 of its data, `resumed` the keys that are other ones from step 10 on, `sizes` those of the model
    that the header has beside its config.
    """
    rule = SyncRule.parse(pattern, len(pattern.partition("+")[0]))
    config = dict(sync=pattern, n_shard=2, n_layer=len(rule.pattern), n_head=4, n_embd=64, dataset="text", seed=1)
    config |= dict(block_size=8, batch_size=16, gradient_accumulation_steps=4000, eval_iters=5)
    config |= dict(max_iters=20, learning_rate=1e-3, min_lr=1e-4, dtype=None)  # the header says what that came to
    config |= changes
    (folder / name).mkdir()
    log = RunLog(folder / name / "log.txt")
    header = {"sync": rule, "parameters": f"0.61M ({n_params})"} | sizes
    header |= {"syncs": f"{rule.syncs} of {2 * len(rule.pattern)}", "dtype": dtype}
    if data is not None:
        header |= {"train data": f"sha256 {data}", "val data": f"sha256 {data}"}
    log.header({"started": "today", **header, "config": config})
    for i, loss in enumerate(losses):
        if i == 1 and resumed is not None:
            log.header({"resumed at step 10": "today", **header, "config": config | resumed})
        log.line(step_line(10 * i, loss, loss))
    log.close()


def tune(folder, name, pattern, losses, **changes):
    """A run as `make` makes it, and two more at half and twice its learning rate, whose losses are higher."""
    rate = changes.pop("learning_rate", 1e-3)
    for factor, suffix, worse in ((1, "", 0), (0.5, "-half", 0.1), (2, "-twice", 0.2)):
        rates = dict(learning_rate=rate * factor, min_lr=rate * factor / 10)
        make(folder, name + suffix, pattern, [loss + worse for loss in losses], **rates, **changes)


def diverge(folder, name, pattern, **changes):
    """A run that ended for losses that are no numbers."""
    make(folder, name, pattern, [4.0], max_bad_steps=2, **changes)
    with open(folder / name / "log.txt", "a") as file:
        file.writelines(iter_line(step, math.nan, 0.1, 1024, math.nan, None, step) + "\n" for step in (3, 4))


def load(folder):
    arms, _ = load_runs(sorted(folder.glob("out*")))
    return arms


def row(seconds, pattern, **changes):
    """A row of what bench.py decode writes: the time per token of a model as `make` makes them."""
    n_layer = len(pattern.partition("+")[0])
    model = {"n_layer": n_layer, "n_embd": 64, "n_head": 4, "n_shard": 2, "sync": pattern}
    model |= {"norm": "layernorm", "position": "learned", "mlp": "gelu", "n_kv_head": 4, "vocab_size": 128} | changes
    worked_out = {"n_hidden": 4 * model["n_embd"], "head_size": model["n_embd"] // model["n_head"]}
    return {"tpot_s": seconds, "model": worked_out | model}


def write_latency(folder, *rows, **others):
    """A file of bench.py decode's with one case more."""
    path = folder / "decode.json"
    cases = json.loads(path.read_text())["results"] if path.exists() else []
    cases.append({"tp_size": 2, "batch_size": 1, "prompt": 128, "rows": rows} | others)
    path.write_text(json.dumps({"results": cases}))
    return path
