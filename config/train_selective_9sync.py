"""Selective: 9 syncs; layers 3, 7 and 11 have none and share the next layer's.

    AM| AM| AM AM| AM| AM| AM AM| AM| AM| AM AM|

124M parameters, 12 layers, n_shard 2; everything not named here is a default of train_reduced_sync.py (--help).
12 sequences x 1024 tokens x 40 micro-steps = 491,520 tokens per step; 20,000 steps = 9.83 B tokens.

$ torchrun --standalone --nproc_per_node=8 train_reduced_sync.py config/train_selective_9sync.py
"""

out_dir = "out-selective-9sync"
wandb_run_name = "selective-9sync"
sync = "110111011101"
device = "cuda"  # never by mistake on the CPU
