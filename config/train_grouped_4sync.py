"""Grouped, 3 layers a group: 4 syncs.

    AM AM AM| AM AM AM| AM AM AM| AM AM AM|

124M parameters, 12 layers, n_shard 2; everything not named here is a default of train_reduced_sync.py (--help).
12 sequences x 1024 tokens x 40 micro-steps = 491,520 tokens per step; 20,000 steps = 9.83 B tokens.

$ torchrun --standalone --nproc_per_node=8 train_reduced_sync.py config/train_grouped_4sync.py
"""

out_dir = "out-grouped-4sync"
wandb_run_name = "grouped-4sync"
sync = "grouped-4"
device = "cuda"  # never by mistake on the CPU
