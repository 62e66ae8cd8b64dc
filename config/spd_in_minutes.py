"""Overlay for config/spd_smollm2.py: 20 of the 30 syncs after attention, 24 steps of 4 x 256 tokens in either stage."""

out_dir = out_dir + "-in-minutes"
measure_windows = 8
evaluation_tokens = 4096
drop = 20
step_windows = 4
distil_tokens = finetune_tokens = 24576
batch_size = 4
