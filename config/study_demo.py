"""The demo: how few syncs do four layers need? Shakespeare by characters, on two CPU cores or one GPU, in minutes.

    python data/shakespeare_char/prepare.py
    python study.py config/study_demo.py

0.06 M parameters. 32 sequences x 64 characters = 2,048 tokens a step; 1,200 steps = 2.46 M tokens, 44 a parameter.
"""

out_dir = "out-demo"

_BASE = dict(dataset="shakespeare_char", n_layer=4, n_embd=32, n_head=4, n_shard=4, block_size=64, batch_size=32)
_BASE |= dict(gradient_accumulation_steps=1, learning_rate=1e-2, min_lr=1e-3, warmup_iters=100, max_iters=1200)
_BASE |= dict(eval_interval=300, eval_iters=50, log_interval=50, compile=False)
runs = [_BASE | dict(name=sync, sync=sync) for sync in ("baseline", "spd", "grouped-2", "grouped-1")]
