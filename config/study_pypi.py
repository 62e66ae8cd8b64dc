"""How few syncs does a GPT need, by size? Python code and documentation, 10 tokens per parameter.

    python data/pypi_text/prepare.py
    python study.py config/study_pypi.py

Two cores train the 2x128 runs in hours and the 3x192 ones in days; one GPU trains all. Stop it when you have seen
enough: the important arms come first. Width is 64 x depth, as in GPT-2 small; 12x256 is nearly as large as 6x384 (9.5 M
and 10.8 M parameters). No run makes a full pass over the text. Sequences of 256 characters; every evaluation is on the
same 204,800 validation tokens. float32 suits any processor: some are faster in bfloat16, others 1.7 to 12 times as
slow.
"""

out_dir = "out-pypi"
seeds = 3
runs_per_gpu = 16

common = dict(dataset="pypi_text", block_size=256, gradient_accumulation_steps=1, n_shard=2, warmup_iters=100)
common |= dict(log_interval=100, dtype="float32", compile=True)
sizes = {
    "2x128": dict(n_layer=2, n_embd=128, n_head=4, batch_size=8, max_iters=2200, learning_rate=4e-3),
    "3x192": dict(n_layer=3, n_embd=192, n_head=4, batch_size=8, max_iters=6900, learning_rate=2e-3),
    "4x256": dict(n_layer=4, n_embd=256, n_head=4, batch_size=16, max_iters=8000, learning_rate=2e-3),
    "6x384": dict(n_layer=6, n_embd=384, n_head=8, batch_size=32, max_iters=13200, learning_rate=1e-3),
    "12x256": dict(n_layer=12, n_embd=256, n_head=8, batch_size=32, max_iters=11600, learning_rate=1e-3),
}
for _size in sizes.values():
    _size |= dict(eval_interval=_size["max_iters"] // 2, eval_iters=800 // _size["batch_size"])

arms = {
    "baseline": dict(),
    "spd": dict(sync="spd"),
    "1sync": dict(sync="grouped-1"),
    # dense, all syncs made, equal parameters within 4 %: the syncs of SPD, or of fewer layers
    "control-1x180": dict(n_shard=1, n_layer=1, n_embd=180, sizes=["2x128"]),
    "control-2x236": dict(n_shard=1, n_layer=2, n_embd=236, sizes=["3x192"]),
    "control-1x328": dict(n_shard=1, n_layer=1, n_embd=328, sizes=["3x192"]),
    "control-2x360": dict(n_shard=1, n_layer=2, n_embd=360, sizes=["4x256"]),
    "control-3x544": dict(n_shard=1, n_layer=3, n_embd=544, sizes=["6x384"]),
    "control-6x360": dict(n_shard=1, n_layer=6, n_embd=360, sizes=["12x256"]),
    "spd-nshard4": dict(sync="spd", n_shard=4),
    "1sync-nshard4": dict(sync="grouped-1", n_shard=4),
    "2sync": dict(sync="grouped-2", sizes=["4x256", "6x384", "12x256"]),
    "3sync": dict(sync="grouped-3", sizes=["6x384", "12x256"]),
    "spd-tracks": dict(sync="spd+tracks"),
    "delayed-layer": dict(sync="baseline+delayed-layer", sizes=["3x192", "4x256", "6x384", "12x256"]),
    "delayed": dict(sync="baseline+delayed"),
    "spd-parallel": dict(sync="spd+parallel"),
}
