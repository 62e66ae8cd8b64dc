"""The demo: how few syncs do four layers need? Shakespeare by characters, on two CPU cores or one GPU, in minutes.

    python data/shakespeare_char/prepare.py
    python study.py config/study_demo.py

0.06 M parameters, Llama's kind of block. 32 sequences x 64 characters = 2,048 tokens per step; 320 steps = 0.66 M
tokens, 11 per parameter.
"""

out_dir = "out-demo"
seeds = 3
runs_per_gpu = 8

common = dict(dataset="shakespeare_char", block_size=64, batch_size=32, gradient_accumulation_steps=1)
common |= dict(norm="rmsnorm", position="rope", mlp="swiglu", compile=False)
common |= dict(warmup_iters=40, eval_interval=160, eval_iters=16, log_interval=40)
sizes = {"4x32": dict(n_layer=4, n_embd=32, n_head=4, n_shard=4, max_iters=320, learning_rate=1e-2)}
arms = {sync: dict(sync=sync) for sync in ("baseline", "spd", "grouped-2", "grouped-1")}
