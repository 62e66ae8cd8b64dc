"""SPD on SmolLM2-135M-Instruct in three shards: all 30 blocks lose the sync after their attention.

128 windows x 256 tokens to distil on, and 200 steps of 4 x 256 tokens of the whole model towards the dense one, both
from the calibration parts of three texts; perplexities on their evaluation parts, 20,480 tokens each. With
--elastic=True the result can be served with any number of blocks dropped, in the order that the log gives.

$ python models/smollm2/prepare.py && python data/prose/prepare.py
$ python drop_syncs.py config/spd_smollm2.py
"""

from pathlib import Path

import torch

from reduced_sync.distributed import cpu_has_bfloat16

_root = Path(__file__).parents[1]
out_dir = "out-spd-smollm2"
init_from = str(_root / "models/smollm2/SmolLM2-135M-Instruct")
n_shard = 3
if not torch.cuda.is_available() and cpu_has_bfloat16():  # the default is float32, four times as slow here
    dtype = "bfloat16"
calibration = str(_root / "data/prose/*.calibration.txt")
evaluation = str(_root / "data/prose/*.evaluation.txt")
sensitivity_windows = 20
distil_epochs = 1
distil_learning_rate = 3e-4
finetune_steps = 200
finetune_learning_rate = 3e-4
curve = (20, 28)
