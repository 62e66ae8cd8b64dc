"""Baseline: standard tensor parallelism, 24 syncs a forward pass.

    A|M| A|M| A|M| A|M| A|M| A|M| A|M| A|M| A|M| A|M| A|M| A|M|

Everything not set here keeps the default of train_reduced_sync.py: 124M parameters, 20,000 steps of 491,520 tokens.

$ torchrun --standalone --nproc_per_node=8 train_reduced_sync.py config/train_baseline_24sync.py
"""

out_dir = "out-baseline-24sync"
sync = "baseline"
device = "cuda"  # never by mistake on the CPU
