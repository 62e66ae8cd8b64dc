#!/bin/sh
# On one GPU, in about ten minutes, the most important first: sh results/h100/measure.sh FOLDER
set -e
out=$(realpath "$1")
cd "$(dirname "$0")/../.."

python bench.py decode baseline spd grouped-4 grouped-1 3x1280 --tp_sizes=1 --compile --rounds=3 --block_size=1024 \
    --json="$out/decode.json"
for n in 12 32 60; do
    python bench.py train gpt2 baseline@1 spd@2 grouped-4@2 grouped-4@4 --compile=True --launches=1 --rounds=3 --steps=10 \
        --batch_size=$n --block_size=1024 --json="$out/train-$n.json"
done
python bench.py decode baseline spd grouped-8 --n_layer=24 --n_embd=2048 --n_head=16 --tp_sizes=1 --compile --rounds=2 \
    --block_size=1024 --json="$out/decode-1.3B.json"
python -m pytest -m gpu
