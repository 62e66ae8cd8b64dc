"""Overlay: any training config with the block of Llama's family: RMSNorm, rotary positions, SwiGLU, grouped queries.

Name it last: a third of the heads, or half of them, have keys and values of their own (all of them if n_head divides by
neither 3 nor 2). The MLP's width is chosen so that the block has as many parameters as GPT-2's; that is what n_hidden=0
means.

$ torchrun --standalone --nproc_per_node=8 train_reduced_sync.py config/train_spd_12sync.py config/modern.py
"""

out_dir = out_dir + "-modern"
norm = "rmsnorm"
position = "rope"
mlp = "swiglu"
n_kv_head = n_head // 3 if n_head % 3 == 0 else n_head // 2 if n_head % 2 == 0 else n_head
