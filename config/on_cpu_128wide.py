"""Overlay: the longer CPU comparison, 12 layers x 128 wide, one process and one thread a run.

8 sequences x 64 tokens = 512 tokens a step; 2,000 steps = 1.02 M tokens.

$ OMP_NUM_THREADS=1 python train_reduced_sync.py config/train_spd_12sync.py config/on_cpu_128wide.py
"""

device = "cpu"
dataset = "shakespeare_char"
n_head = 4
n_embd = 128
block_size = 64
batch_size = 8
gradient_accumulation_steps = 1
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
max_iters = 2000
eval_interval = 400
eval_iters = 100
log_interval = 50
