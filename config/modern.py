"""Overlay: any training config with the block of Llama's family: RMSNorm, rotary positions, SwiGLU, grouped queries.

A third or a half of the heads have keys and values of their own, and the MLP is as wide as makes the parameters those
of GPT-2's block, a multiple of 48 so that up to 16 shards divide it.

$ torchrun --standalone --nproc_per_node=8 train_reduced_sync.py config/train_spd_12sync.py config/modern.py
"""

out_dir = out_dir + "-modern"
norm = "rmsnorm"
position = "rope"
mlp = "swiglu"
n_kv_head = n_head // 3 if n_head % 3 == 0 else n_head // 2 if n_head % 2 == 0 else n_head
n_hidden = max(1, round(n_embd * (10 - 2 * n_kv_head / n_head) / 3 / 48)) * 48
