"""SPD on SmolLM2-135M-Instruct in three shards: all 30 layers lose the sync after their attention.

131,072 tokens to distil and 262,144 to finetune on, 8 x 256 a step (64 and 128 steps), from the calibration parts of
three texts; perplexities on their evaluation parts, 20,480 tokens each. --drop=40 drops 10 syncs after MLPs as well.

$ python models/smollm2/prepare.py && python data/prose/prepare.py
$ python drop_syncs.py config/spd_smollm2.py
"""

from pathlib import Path

import torch

from reduced_sync.distributed import cpu_has_bfloat16

_root, _cpu = Path(__file__).parents[1], torch.cpu.get_capabilities()
out_dir = "out-spd-smollm2"
init_from = str(_root / "models/smollm2/SmolLM2-135M-Instruct")
n_shard = 3
# bfloat16 is four times as fast as float32, the default, on an AMD EPYC, but slower on an Intel Xeon without AMX
_is_fast = "Intel" not in _cpu.get("cpu_name", "") or _cpu.get("amx_bf16", False)
if not torch.cuda.is_available() and cpu_has_bfloat16() and _is_fast:
    dtype = "bfloat16"
calibration = str(_root / "data/prose/*.calibration.txt")
evaluation = str(_root / "data/prose/*.evaluation.txt")
