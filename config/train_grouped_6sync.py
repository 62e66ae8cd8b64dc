"""Grouped, 2 layers a group: 6 syncs.

    AM AM| AM AM| AM AM| AM AM| AM AM| AM AM|

Everything not set here keeps the default of train_reduced_sync.py: 124M parameters, 20,000 steps of 491,520 tokens.

$ torchrun --standalone --nproc_per_node=8 train_reduced_sync.py config/train_grouped_6sync.py
"""

out_dir = "out-grouped-6sync"
sync = "grouped-6"
device = "cuda"  # never by mistake on the CPU
