"""Selective: 9 syncs; layers 3, 7 and 11 have none and share the next layer's.

    AM| AM| AM AM| AM| AM| AM AM| AM| AM| AM AM|

Everything not set here keeps the default of train_reduced_sync.py: 124M parameters, 20,000 steps of 491,520 tokens.

$ torchrun --standalone --nproc_per_node=8 train_reduced_sync.py config/train_selective_9sync.py
"""

out_dir = "out-selective-9sync"
sync = "110111011101"
device = "cuda"  # never by mistake on the CPU
