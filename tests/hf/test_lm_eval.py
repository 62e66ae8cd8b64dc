"""Exported folders under EleutherAI's evaluation harness, by its own command, against the checkpoints themselves.

The harness brings half a gigabyte of packages along and is none of requirements.txt: `make test-lm-eval` installs it
into an environment of its own and runs this file. Tasks and data are local.
"""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from launch import ROOT, run_script, succeeded

from reduced_sync import checkpoint as ckpt
from reduced_sync.hf.tokenizer import Tokens
from reduced_sync_model import GPT

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.timeout(300)
BLOCK = 64
NEWLINE = 0  # the id that stands before a text, of characters that know no end of text
TASKS = {
    "heldout": """
task: heldout
dataset_path: json
dataset_kwargs: {data_files: {test: heldout.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
""",
    "nextwords": """
task: nextwords
dataset_path: json
dataset_kwargs: {data_files: {test: nextwords.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
""",
}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def tasks(small_dataset, tmp_path_factory):
    """(folder of two tasks with their data, the held-out texts, the questions)."""
    folder = tmp_path_factory.mktemp("tasks")
    meta = json.loads((small_dataset / "meta.json").read_text())
    ids = torch.frombuffer(bytearray((small_dataset / "val.bin").read_bytes()), dtype=torch.uint16).tolist()
    text = Tokens(meta).decode(ids)
    lengths = [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 17, 1500, 900]  # also longer than a window
    texts = [text[sum(lengths[:i]) :][:n] for i, n in enumerate(lengths)]
    write_jsonl(folder / "heldout.jsonl", [{"text": text} for text in texts])
    spans = [text[i : i + 50] for i in range(0, len(text) - 50, 50)][:100]
    questions = []
    for i, span in enumerate(spans):
        choices = [spans[(i + 17 * k) % len(spans)][-10 - k :] for k in range(4)]  # of different lengths
        answer = i % 4
        choices[0], choices[answer] = choices[answer], choices[0]
        questions.append({"context": span[:-10], "choices": choices, "answer": answer})
    write_jsonl(folder / "nextwords.jsonl", questions)
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(task)
    return folder, texts, questions


def log_likelihood(model, context, continuation):
    """In nats, of the ids `continuation` behind `context`, windows of BLOCK at a time as the harness cuts them."""
    ids, total = context + continuation, 0.0
    for first in range(0, len(continuation), BLOCK):
        new = continuation[first : first + BLOCK]
        end = len(context) + first + len(new)
        window = ids[max(0, end - BLOCK - 1) : end]
        targets = [-1] * (len(window) - 1 - len(new)) + new
        total -= model(torch.tensor([window[:-1]]), torch.tensor([targets]))[1].item() * len(new)
    return total


@pytest.mark.parametrize("sync", ["baseline", "spd"])
def test_the_harness_finds_our_perplexity(small_dataset, tmp_path, tasks, sync):
    keys = dict(sync=sync, n_shard=2, n_layer=2, n_head=2, n_embd=32, block_size=BLOCK, bias=True)
    keys |= dict(dataset=small_dataset, out_dir=tmp_path / "out", device="cpu", batch_size=8, eval_iters=4)
    keys |= dict(gradient_accumulation_steps=1, max_iters=300, warmup_iters=10, learning_rate=1e-2, min_lr=1e-3)
    succeeded(run_script([ROOT / "train_reduced_sync.py", *(f"--{key}={value}" for key, value in keys.items())]))
    succeeded(run_script([ROOT / "export.py", tmp_path / "out", f"--to={tmp_path / 'export'}"]))
    has_code = sync != "baseline"
    assert (tmp_path / "export" / "modeling_reduced_sync.py").exists() == has_code

    folder, texts, questions = tasks
    arguments = f"pretrained={tmp_path / 'export'},dtype=float32,prefix_token_id={NEWLINE}"
    arguments += ",trust_remote_code=True" if has_code else ""
    command = [sys.executable, "-m", "lm_eval", "--model=hf", f"--model_args={arguments}", "--include_path=."]
    command += ["--tasks=heldout,nextwords", "--device=cpu", "--batch_size=4", f"--output_path={tmp_path / 'results'}"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    succeeded(process)
    (path,) = (tmp_path / "results").rglob("results*.json")
    results = json.loads(path.read_text())["results"]

    saved, config, meta = ckpt.load_with_tokens(tmp_path / "out" / "ckpt.pt")
    model = GPT(config).eval()
    ckpt.restore(saved, model)
    encode = Tokens(meta).encode
    with torch.no_grad():
        total = sum(log_likelihood(model, [NEWLINE], encode(text)) for text in texts)
        right = 0
        for question in questions:
            scores = [log_likelihood(model, encode(question["context"]), encode(c)) for c in question["choices"]]
            right += scores.index(max(scores)) == question["answer"]
    perplexity = math.exp(-total / sum(len(text.encode()) for text in texts))
    assert results["heldout"]["byte_perplexity,none"] == pytest.approx(perplexity, rel=1e-5)
    assert results["nextwords"]["acc,none"] == pytest.approx(right / len(questions))
    assert 2 < perplexity < 25 and 0.3 < right / len(questions)  # it has learned
