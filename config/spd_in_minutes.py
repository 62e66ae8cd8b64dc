"""Overlay for config/spd_smollm2.py: 20 of the 30 syncs after attention, and a quarter of its tokens to finetune on."""

out_dir = out_dir + "-in-minutes"
calibration_windows = 8
evaluation_tokens = 4096
drop = 20
distil_tokens = 8192
finetune_tokens = 32768
batch_size = 4
