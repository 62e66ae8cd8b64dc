"""Does the penalty grow with depth? Two to six layers on Python code and documentation, 10 tokens a parameter, one GPU.

    python data/pypi_text/prepare.py
    python study.py config/study_pypi.py

Width is 64 x depth, as in GPT-2 small. Less than one pass over the text. Sequences of 256 characters; every
evaluation is on the same 409,600 validation tokens.
"""

out_dir = "out-pypi"

_BASE = dict(dataset="pypi_text", block_size=256, gradient_accumulation_steps=1, n_shard=2, warmup_iters=100)
_BASE |= dict(log_interval=100, device="cuda", dtype="bfloat16", compile=True, seed=1)
_SIZES = {  # layers, heads, sequences a step, steps, learning rate
    "2x128": (2, 4, 8, 2200, 4e-3),
    "3x192": (3, 4, 8, 6900, 4e-3),
    "4x256": (4, 4, 16, 8000, 3e-3),
    "6x384": (6, 8, 32, 13200, 2e-3),
}
_CONTROLS = {  # dense, all syncs made, equal parameters within 3 %
    "2x128": [dict(n_layer=1, n_embd=180)],
    "3x192": [dict(n_layer=2, n_embd=236), dict(n_layer=1, n_embd=328)],
    "4x256": [dict(n_layer=3, n_embd=296), dict(n_layer=2, n_embd=360)],
    "6x384": [dict(n_layer=3, n_embd=544)],
}


def _run(size, name, lr=None, **keys):
    """One run of a size, named by it, its shards, its learning rate and its seed."""
    n_layer, n_head, batch_size, steps, usual_lr = _SIZES[size]
    lr = lr or usual_lr
    run = _BASE | dict(n_layer=n_layer, n_embd=64 * n_layer, n_head=n_head, batch_size=batch_size, max_iters=steps)
    run |= dict(eval_interval=steps // 4, eval_iters=1600 // batch_size, learning_rate=lr, min_lr=lr / 10) | keys
    shards = f"-nshard{run['n_shard']}" if run["n_shard"] > 2 else ""
    return run | dict(name=f"{size}-{name}{shards}-lr{lr:g}-seed{run['seed']}")


def _controls(size, **keys):
    for control in _CONTROLS[size]:
        yield _run(size, "control-{n_layer}x{n_embd}".format(**control), n_shard=1, **control, **keys)


def _grouped(size, syncs, prefix="", **keys):
    """`syncs` in all, each behind as many layers."""
    return _run(size, f"{prefix}{syncs}sync", sync=f"grouped-{syncs}", **keys)


def _after_attention(size, **keys):
    """A sync after every attention, and the last one."""
    return _run(size, "after-attention", sync="a" * (_SIZES[size][0] - 1) + "1", **keys)


def _compared(size, seed):
    """The baseline, half the syncs in two ways, one in all, and dense controls."""
    yield _run(size, "baseline", seed=seed)
    for n_shard in (2, 4):
        yield _run(size, "spd", sync="spd", seed=seed, n_shard=n_shard)
        yield _grouped(size, 1, seed=seed, n_shard=n_shard)
        yield _after_attention(size, seed=seed, n_shard=n_shard)
    yield from _controls(size, seed=seed)


def _delayed(size, seed):
    """One sync that blocks, the others hidden."""
    yield _run(size, "baseline-delayed", sync="baseline+delayed", seed=seed, n_shard=4)
    yield _run(size, "spd-delayed", sync="spd+delayed", seed=seed, n_shard=4)


def _modern():
    """Llama's block, config/modern.py's: does the answer depend on GPT-2's?"""
    block = dict(norm="rmsnorm", position="rope", mlp="swiglu", n_kv_head=2)  # four shards would have four KV heads
    yield _run("3x192", "modern-baseline", **block)
    yield _run("3x192", "modern-spd", sync="spd", **block)
    yield _grouped("3x192", 1, "modern-", **block)
    control = block | dict(n_layer=2, n_embd=236, n_hidden=3 * 236, n_head=2, n_kv_head=1, n_shard=1)
    yield _run("3x192", "modern-control-2x236", **control)


def _tuning(size, lrs):
    """Learning rates for the baseline, the most desynced variant and the controls."""
    for lr in lrs:
        yield _run(size, "baseline", lr)
        yield _grouped(size, 1, lr=lr)
        yield from _controls(size, lr=lr)


_planned = [
    # the deepest first: they take longest
    _run("6x384", "baseline"),
    _grouped("6x384", 1),
    _grouped("6x384", 3),
    _run("6x384", "spd", sync="spd"),
    *_controls("6x384"),
    *_compared("4x256", 1),
    *(_grouped("4x256", 2, n_shard=n_shard) for n_shard in (2, 4)),
    *(run for seed in (1, 2, 3) for run in (*_compared("3x192", seed), *_delayed("3x192", seed))),
    *_modern(),
    *_tuning("3x192", (2e-3, 8e-3)),
    _run("3x192", "baseline", 1e-3),
    _grouped("3x192", 1, lr=1e-3),
    # at the rate that is best there
    *(_run("3x192", "spd", 2e-3, sync="spd", n_shard=n_shard) for n_shard in (2, 4)),
    _grouped("3x192", 1, lr=2e-3, n_shard=4),
    *(run for seed in (1, 2, 3) for run in _compared("2x128", seed)),
]
runs = list({run["name"]: run for run in _planned}.values())  # what two lists have is one run
