"""The demo: how few syncs do four layers need? Shakespeare by characters, on two CPU cores or one GPU, in minutes.

    python data/shakespeare_char/prepare.py
    python study.py config/study_demo.py

0.06 M parameters. 32 sequences x 64 characters = 2,048 tokens per step; 400 steps = 0.8 M tokens, 15 per parameter.
"""

out_dir = "out-demo"
seeds = 2
runs_per_gpu = 8

common = dict(dataset="shakespeare_char", block_size=64, batch_size=32, gradient_accumulation_steps=1)
common |= dict(warmup_iters=40, eval_interval=200, eval_iters=25, log_interval=50, compile=False)
sizes = {"4x32": dict(n_layer=4, n_embd=32, n_head=4, n_shard=4, max_iters=400, learning_rate=2e-2)}
arms = {sync: dict(sync=sync) for sync in ("baseline", "spd", "grouped-2", "grouped-1")}
