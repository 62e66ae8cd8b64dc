"""The full study: 124M parameters on OpenWebText, for eight GPUs.

    python data/openwebtext/prepare.py
    python study.py config/study_124m.py

A run is 20,000 steps x 491,520 tokens = 9.83 B tokens, 79 a parameter. One H100 trains on 366,000 tokens/s of the
baseline, 337,000 of SPD at n_shard 2 and 292,000 at n_shard 4 (measured: results/h100), so a run takes 7.5 to 9.4
GPU-hours, about an hour on eight; their all-reduce of gradients comes on top and was not measured. It is
evaluated 41 times, on the whole of val (4.4 M tokens) and as many of train: 0.36 B tokens, forward alone a third of
their training, 1.2 % on top. The 39 full runs and the 9 of a quarter of the steps below: about 340 GPU-hours, 43 hours
of an eight-GPU machine.
The learning rates come first: stop there, look, and set _base for what follows.
"""

out_dir = "out-124m"
processes = 8  # all GPUs a run, each a data-parallel replica; 1: eight runs at once

_base = dict(max_iters=20000, n_layer=12, n_head=12, n_embd=768, n_shard=2, eval_iters=0, seed=1, device="cuda")
_grouped = {f"grouped-{n}sync": dict(sync=f"grouped-{n}") for n in (6, 4, 3, 2, 1)}
_headline = dict(
    baseline=dict(sync="baseline"),
    spd=dict(sync="spd"),
    parallel=dict(sync="spd+parallel"),
    **_grouped,
)
_controls = {  # dense, all syncs made, the parameters of 12 x 768 within 2 %
    "6x1008": dict(n_layer=6, n_embd=1008, n_head=14),
    "3x1280": dict(n_layer=3, n_embd=1280, n_head=20),
    "2x1440": dict(n_layer=2, n_embd=1440, n_head=20),
    "1x1728": dict(n_layer=1, n_embd=1728, n_head=24),
}
_rivals = {
    "ladder": dict(sync="baseline+ladder"),
    "delayed": dict(sync="baseline+delayed"),
    "grouped-6sync-desync": dict(sync="grouped-6+desync"),
    "grouped-4sync-desync": dict(sync="grouped-4+desync"),
}
_selective = {  # where twelve, nine, six and four syncs go
    "9-even": "110111011101",
    "9-late": "000111111111",
    "9-early": "111111110001",
    "6-early": "111110000001",
    "6-late": "000000111111",
    "4-early": "111000000001",
    "4-late": "000000001111",
    "12-after-attention": "aaaaaaaaaaa1",
}


def _runs(variants, suffix="", **keys):
    return [dict(_base, **keys | variant, name=name + suffix) for name, variant in variants.items()]


runs = [
    # a learning rate for the baseline, the most desynced and a control, at a quarter of the steps
    *(
        run
        for lr in (3e-4, 6e-4, 1.2e-3)
        for run in _runs(
            {"baseline": {}, "grouped-1sync": _grouped["grouped-1sync"], "2x1440": _controls["2x1440"]},
            f"-lr{lr:g}",
            learning_rate=lr,
            min_lr=lr / 10,
            max_iters=5000,
        )
    ),
    *_runs(_headline),
    *_runs(_controls, "-control"),
    *_runs(_headline, "-nshard4", n_shard=4),
    *(
        run
        for seed in (2, 3)
        for run in _runs({"baseline": {}, "grouped-4sync": _grouped["grouped-4sync"]}, f"-seed{seed}", seed=seed)
    ),
    *_runs(_rivals),
    *_runs({f"selective-{name}": dict(sync=p) for name, p in _selective.items()}),
    *_runs({name: _headline[name] for name in ("baseline", "spd", "grouped-4sync")}, "-nshard8", n_shard=8, n_head=16),
]
