"""Grouped, 6 layers a group: 2 syncs.

    AM AM AM AM AM AM| AM AM AM AM AM AM|

124M parameters, 12 layers, n_shard 2; everything not named here is a default of train_reduced_sync.py (--help).
12 sequences x 1024 tokens x 40 micro-steps = 491,520 tokens per step; 20,000 steps = 9.83 B tokens.

$ torchrun --standalone --nproc_per_node=8 train_reduced_sync.py config/train_grouped_2sync.py
"""

out_dir = "out-grouped-2sync"
wandb_run_name = "grouped-2sync"
sync = "grouped-2"
device = "cuda"  # never by mistake on the CPU
