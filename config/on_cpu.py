"""Overlay: shrinks any of the 12-layer configs to a size for two CPU cores, on the Shakespeare characters.

8 micro-steps x 2 sequences x 64 tokens = 1,024 tokens per step; 8 micro-steps divide over 1, 2, 4 or 8 processes. 500
steps show that training works. They are too few to compare variants: config/study_demo.py does that.

$ python data/shakespeare_char/prepare.py
$ torchrun --standalone --nproc_per_node=2 train_reduced_sync.py config/train_spd_12sync.py config/on_cpu.py
"""

out_dir = out_dir + "-cpu"
device = "cpu"
dataset = "shakespeare_char"
n_head = 4
n_embd = 64
block_size = 64
batch_size = 2
gradient_accumulation_steps = 8
learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 50
max_iters = 500
eval_interval = 100
eval_iters = 100
log_interval = 10
