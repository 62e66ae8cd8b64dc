"""Overlay for config/spd_smollm2.py: 20 of 30 blocks, fewer windows and steps."""

out_dir = out_dir + "-in-minutes"
arrange_windows = 8
sensitivity_windows = 8
evaluation_tokens = 8192
drop = 20
calibration_windows = 64
finetune_steps = 60
curve = ()
