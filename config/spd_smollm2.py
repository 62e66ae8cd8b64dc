"""SPD on SmolLM2-135M-Instruct in three shards: all 30 layers lose the sync after their attention.

16,384 tokens to distil and 131,072 to finetune on, 2 x 256 a step (32 and 256 steps), from the calibration parts of
three texts; perplexities on their evaluation parts, 8,192 tokens each. --drop=40 drops 10 syncs after MLPs as well.

$ python models/smollm2/prepare.py && python data/prose/prepare.py
$ python drop_syncs.py config/spd_smollm2.py
"""

from pathlib import Path

import torch

from reduced_sync.distributed import cpu_is_fast_in_bfloat16

_root = Path(__file__).parents[1]
out_dir = "out-spd-smollm2"
init_from = str(_root / "models/smollm2/SmolLM2-135M-Instruct")
n_shard = 3
if not torch.cuda.is_available() and cpu_is_fast_in_bfloat16():  # the default is float32
    dtype = "bfloat16"
step_windows = 2  # of so few tokens, many small steps make the most
distil_tokens = 16384
finetune_tokens = 131072
evaluation_tokens = 8192
calibration = str(_root / "data/prose/*.calibration.txt")
evaluation = str(_root / "data/prose/*.evaluation.txt")
