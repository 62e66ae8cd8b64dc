"""Exported folders in vLLM: greedy ids and their probabilities as transformers has them, mistakes, server."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from launch import TRAIN, run_script, succeeded  # noqa: E402

import export  # noqa: E402

torch.set_num_threads(1)
GENERATE = Path(__file__).with_name("generate.py")
TINY = dict(n_layer=4, n_embd=128, n_head=4, block_size=64, batch_size=8, gradient_accumulation_steps=1)
TINY |= dict(dataset="shakespeare_char", device="cpu", dtype="float32", eval_iters=2, eval_interval=60)
TINY |= dict(max_iters=60, lr_decay_iters=60, warmup_iters=5, learning_rate=3e-3)
GPT2 = dict(bias=True)
LLAMA = dict(norm="rmsnorm", position="rope", mlp="swiglu", n_hidden=352, n_kv_head=2)
MODELS = {
    "baseline": dict(GPT2, n_shard=2),
    "baseline-llama": dict(LLAMA, n_shard=2),
    "spd": dict(GPT2, n_shard=2, architecture="spd"),
    "grouped": dict(GPT2, n_shard=4, architecture="grouped", layers_per_group=2),
    "grouped-llama": dict(LLAMA, n_shard=4, architecture="grouped", layers_per_group=2),  # copies of KV heads
    "selective-llama": dict(LLAMA, n_shard=2, architecture="selective", sync_pattern="a021", tie_embeddings=False),
    "parallel": dict(GPT2, n_shard=2, architecture="selective", sync_pattern="1011", parallel_block=True),
    "desync-llama": dict(LLAMA, n_shard=2, architecture="selective", sync_pattern="0a01", merge="desync"),
}
SYNCS = {"baseline": 8, "baseline-llama": 8, "spd": 4, "grouped": 2, "grouped-llama": 2, "selective-llama": 4}
SYNCS |= {"parallel": 3, "desync-llama": 2}
WITH_CODE = [name for name in MODELS if not name.startswith("baseline")]
NEW_TOKENS = 16
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two ranks do not need two NUMA nodes
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model is in the process that asks
    "TORCHDYNAMO_DISABLE": "1",  # vLLM compiles a part of the embedding even when it is told not to compile
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


def environment(folder, **more):
    """ENVIRONMENT, with vLLM's caches in `folder`."""
    names = ("VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "TORCHINDUCTOR_CACHE_DIR", "HF_HOME")
    return ENVIRONMENT | {name: str(folder / name) for name in names} | more


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Every one of MODELS, trained and exported: name -> folder."""
    home, found = tmp_path_factory.mktemp("models"), {}
    for name, keys in MODELS.items():
        found[name], out = home / name, home / f"out-{name}"
        succeeded(run_script([TRAIN, *(f"--{key}={value}" for key, value in (TINY | keys | {"out_dir": out}).items())]))
        export.main([str(out), f"--to={found[name]}"])
    return found


def prompts():
    """Texts of validation as ids: six of different length, two of which start alike."""
    import numpy as np

    data = np.memmap(ROOT / "data" / "shakespeare_char" / "val.bin", dtype=np.uint16).astype(int).tolist()
    lengths = {0: 40, 100: 3, 200: 23, 300: 1, 400: 17}
    return [data[first : first + length] for first, length in lengths.items()] + [data[:33] + data[500:505]]


@pytest.fixture(scope="session")
def expected(folders):
    """name -> ids and logprobs of each of prompts() by transformers, one at a time."""
    from transformers import AutoModelForCausalLM

    found = {}
    for name, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        # vLLM's own models do not know what generation_config.json suppresses
        rows, suppressed = [], model.generation_config.suppress_tokens if name in WITH_CODE else []
        for prompt in prompts():
            keys = dict(max_new_tokens=NEW_TOKENS, do_sample=False)
            ids = model.generate(torch.tensor([prompt]), **keys, attention_mask=torch.ones(1, len(prompt)))[0]
            with torch.no_grad():
                logits = model(ids[None]).logits[0, len(prompt) - 1 : -1]
            logits[:, suppressed] = float("-inf")
            new = ids[len(prompt) :]
            rows.append((new.tolist(), logits.log_softmax(-1).gather(1, new[:, None])[:, 0]))
        found[name] = rows
    return found


def served(folders, names, tp_size, folder, env, **options):
    """name -> what generate.py finds, of the folders of `names` in tp_size processes."""
    request, result = folder / "request.json", folder / "result.json"
    keys = dict(folders=[str(folders[name]) for name in names], prompts=prompts(), new_tokens=NEW_TOKENS)
    request.write_text(json.dumps(keys | dict(options=options)))
    succeeded(run_script([GENERATE, request, result], nproc=tp_size, env=env, timeout=280))
    return dict(zip(names, json.loads(result.read_text()), strict=True))


@pytest.fixture(scope="session", params=[1, 2], ids="tp{}".format)
def eager(request, folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eager")
    return request.param, served(folders, list(folders), request.param, folder, environment(folder))


def check(name, found, expected, tp_size):
    """What generate.py has `found` of one folder is what transformers says, with the all-reduces of its pattern."""
    assert name not in WITH_CODE or found["model"] == "ReducedSyncForCausalLM"
    for ids, logprobs, (their_ids, their_logprobs) in zip(found["ids"], found["logprobs"], expected[name], strict=True):
        assert ids == their_ids
        torch.testing.assert_close(torch.tensor(logprobs), their_logprobs, rtol=0, atol=2e-5)
    assert found["forwards"] > 2
    # one more of vLLM's own: the embedding is cut by its rows
    assert found["all_reduces"] == found["forwards"] * (SYNCS[name] + 1 if tp_size > 1 else 0)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_ids_are_transformers_and_all_reduces_are_the_patterns(eager, expected, name):
    tp_size, found = eager
    check(name, found[name], expected, tp_size)


def test_the_baseline_is_vllms_own_model(eager):
    _, found = eager
    assert [found[name]["model"] for name in ("baseline", "baseline-llama")] == ["GPT2LMHeadModel", "LlamaForCausalLM"]


def test_a_shard_a_rank(folders, expected, tmp_path):
    """Four ranks, each with its copy of one of two KV heads."""
    found = served(folders, ["grouped-llama"], 4, tmp_path, environment(tmp_path))
    check("grouped-llama", found["grouped-llama"], expected, 4)


def test_compiled(folders, expected, tmp_path):
    names = ["spd", "grouped-llama"]
    env = environment(tmp_path, TORCHDYNAMO_DISABLE="0")
    for name, found in served(folders, names, 2, tmp_path, env, enforce_eager=False).items():
        check(name, found, expected, 2)


# --- mistakes: one clear line, before any worker starts


REFUSED = [  # changes of config.json, options of vLLM, words
    (dict(), dict(tensor_parallel_size=4), "tensor_parallel_size=4 does not divide n_shard=2; allowed: [1, 2]"),
    (dict(overlap="ladder"), dict(), "overlap='ladder' cannot be served: vLLM's all-reduce waits"),
    (dict(), dict(quantization="fp8"), "quantization='fp8'"),
]
REFUSE = """
import json, sys
from vllm import EngineArgs
for options in json.loads(sys.argv[1]):
    try:
        EngineArgs(**options).create_engine_config()
    except ValueError as error:
        print(json.dumps(str(error)))
"""


def test_what_cannot_be_served(folders, tmp_path):
    options = []
    for i, (change, more, _) in enumerate(REFUSED):
        folder = tmp_path / str(i)
        shutil.copytree(folders["spd"], folder)
        keys = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(keys | change))
        options.append(dict(more, model=str(folder), trust_remote_code=bool(i % 2)))
    process = run_script(["-c", REFUSE, json.dumps(options)], env=environment(tmp_path))
    said = [json.loads(line) for line in succeeded(process).splitlines() if line.startswith('"')]
    for (_, _, words), text in zip(REFUSED, said, strict=True):
        assert [line for line in text.splitlines() if words in line], text


# --- the server


def ask(port, path, body=None, timeout=60):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return response.read().decode()


@contextlib.contextmanager
def running(argv, env, log):
    """A process that writes to the file `log`; it and its own are gone afterwards."""
    with log.open("w") as file:
        options = dict(stdout=file, stderr=file, start_new_session=True)
        process = subprocess.Popen(argv, env=os.environ | env, **options)
        try:
            yield process
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_the_server(folders, expected, tmp_path):
    """As `make serve` starts it, on two workers of its own; text in, text out, several clients at once."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders["spd"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folders["spd"], "--port", port]
    argv += ["--tensor-parallel-size", 2, "--dtype", "float32", "--kv-cache-memory-bytes", 64 << 20, "--enforce-eager"]

    def completion(prompt):
        body = dict(prompt=tokenizer.decode(prompt), max_tokens=NEW_TOKENS, temperature=0)
        return json.loads(ask(port, "/v1/completions", body))["choices"][0]["text"]

    with running([*map(str, argv)], environment(tmp_path, OMP_NUM_THREADS="1"), tmp_path / "log") as server:
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            try:
                ask(port, "/health")
                break
            except OSError:
                time.sleep(0.5)
        with ThreadPoolExecutor(6) as clients:
            texts = list(clients.map(completion, prompts()))
    assert texts == [tokenizer.decode(ids) for ids, _ in expected["spd"]]
