"""SPD (sync-point drop, arXiv 2502.20727): 12 syncs, one per layer, after the MLP.

    AM| AM| AM| AM| AM| AM| AM| AM| AM| AM| AM| AM|

Everything not set here keeps the default of train_reduced_sync.py: 124M parameters, 20,000 steps of 491,520 tokens.

$ torchrun --standalone --nproc_per_node=8 train_reduced_sync.py config/train_spd_12sync.py
"""

out_dir = "out-spd-12sync"
sync = "spd"
device = "cuda"  # never by mistake on the CPU
