"""SPD on SmolLM2-135M-Instruct in three shards: all 30 blocks lose the sync after their attention.

$ python models/smollm2/prepare.py && python data/prose/prepare.py
$ python drop_syncs.py config/spd_smollm2.py
"""

from pathlib import Path

_root = Path(__file__).parents[1]
out_dir = "out-spd-smollm2"
init_from = str(_root / "models/smollm2/SmolLM2-135M-Instruct")
n_shard = 3
calibration = str(_root / "data/prose/manual.calibration.txt")
evaluation = str(_root / "data/prose/*.evaluation.txt")
