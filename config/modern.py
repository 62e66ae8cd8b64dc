"""Overlay: any training config with the block of Llama's family: RMSNorm, rotary positions, SwiGLU, grouped queries.

A third or a half of the heads have keys and values of their own. The MLP is as wide as makes the parameters those of
GPT-2's block: that is what n_hidden=0 means.

$ torchrun --standalone --nproc_per_node=8 train_reduced_sync.py config/train_spd_12sync.py config/modern.py
"""

out_dir = out_dir + "-modern"
norm = "rmsnorm"
position = "rope"
mlp = "swiglu"
n_kv_head = n_head // 3 if n_head % 3 == 0 else n_head // 2 if n_head % 2 == 0 else n_head
