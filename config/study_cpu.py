"""The pilot: can models that two CPU cores train tell the variants apart? Shakespeare, 10 tokens a parameter.

    python data/shakespeare_char/prepare.py
    python study.py config/study_cpu.py

Width is 64 x depth, as in GPT-2 small. 16 sequences x 128 characters = 2,048 tokens a step; every evaluation is on the
same 204,800 validation tokens.
"""

out_dir = "out-pilot"

_BASE = dict(dataset="shakespeare_char", block_size=128, batch_size=16, gradient_accumulation_steps=1, n_head=4)
_BASE |= dict(n_shard=2, warmup_iters=100, eval_iters=100, log_interval=100, device="cpu", seed=1)
_BASE |= dict(dtype="bfloat16", compile=True)  # the fastest: see EXPERIMENT_SUMMARY.md
_DEEP = {"2x128": (2, 128), "3x192": (3, 192)}
_STEPS = {"2x128": 2100, "3x192": 6800}  # 10 tokens a parameter: 0.43 M and 1.38 M parameters
_CONTROLS = {  # dense, all syncs made, equal parameters within 2 %
    "2x128": [dict(n_layer=1, n_embd=178, n_head=2)],
    "3x192": [dict(n_layer=2, n_embd=236), dict(n_layer=1, n_embd=328)],
}


def _run(size, name, lr, **keys):
    """One run of a size, named by it, its learning rate and its seed."""
    n_layer, n_embd = _DEEP[size]
    run = _BASE | dict(n_layer=n_layer, n_embd=n_embd, max_iters=_STEPS[size], eval_interval=_STEPS[size] // 4)
    run |= dict(learning_rate=lr, min_lr=lr / 10) | keys
    return run | dict(name=f"{size}-{name}-lr{lr:g}-seed{run['seed']}")


def _grouped(n):
    return dict(architecture="grouped", layers_per_group=n)


def _controls(size, lr):
    return [_run(size, "control-{n_layer}x{n_embd}".format(**keys), lr, n_shard=1, **keys) for keys in _CONTROLS[size]]


def _tuning(size, lrs):
    """A learning rate for the baseline, the most desynced variant and the controls."""
    n_layer = _DEEP[size][0]
    for lr in lrs:
        yield _run(size, "baseline", lr)
        yield from _controls(size, lr)
        yield _run(size, "1sync", lr, **_grouped(n_layer))


runs = [
    *_tuning("2x128", (2e-3, 4e-3, 8e-3)),
    *_tuning("3x192", (2e-3, 4e-3)),
]
