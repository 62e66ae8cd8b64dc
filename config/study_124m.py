"""The answer for 124M parameters: the fewest syncs within 2 % of the baseline, on OpenWebText, with eight GPUs.

    python data/openwebtext/prepare.py
    python study.py config/study_124m.py

A run is 5,000 steps x 491,520 tokens = 2.46 B tokens, 20 per parameter: 1.9 to 2.3 GPU-hours at the speeds measured on
one H100 (results/h100). Six arms at three learning rates, and a second seed at the best: 24 runs, about 48 GPU-hours,
six hours on eight GPUs; each rate beyond the first three that an arm needs adds two GPU-hours.
"""

out_dir = "out-124m"
seeds = 2
processes = 8  # all GPUs per run, each a data-parallel replica; 1: eight runs at once

common = dict(warmup_iters=500, eval_interval=1000, eval_iters=0, device="cuda", n_shard=2, learning_rate=6e-4)
sizes = {"12x768": dict(n_layer=12, n_head=12, n_embd=768, max_iters=5000)}
arms = {
    "baseline": dict(),
    "spd": dict(sync="spd"),
    "4sync": dict(sync="grouped-4"),
    "6sync": dict(sync="grouped-6"),
    "3sync": dict(sync="grouped-3"),
    # dense, all 6 syncs made, as many parameters within 2 %
    "control-3x1280": dict(n_layer=3, n_embd=1280, n_head=20, n_shard=1),
}
