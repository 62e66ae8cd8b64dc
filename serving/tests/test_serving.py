"""Exported folders in vLLM: greedy ids as sample.py and transformers have them, probabilities, mistakes, server.

With DROPPED=FOLDER, of a dropped SmolLM2 that export.py has made, it is served as well.
"""

import contextlib
import functools
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from launch import load_script, run_script, succeeded  # noqa: E402

import export  # noqa: E402
import sample  # noqa: E402
import train_reduced_sync  # noqa: E402
from reduced_sync.hf.export import our_config, write_weights  # noqa: E402
from reduced_sync.hf.weights import from_pretrained  # noqa: E402
from reduced_sync_model import SyncRule  # noqa: E402

quantize = load_script(ROOT / "serving" / "quantize.py")

torch.set_num_threads(1)
GENERATE = Path(__file__).with_name("generate.py")
TINY = dict(n_layer=4, n_embd=128, n_head=4, block_size=64, batch_size=8, gradient_accumulation_steps=1)
TINY |= dict(dataset="shakespeare_char", device="cpu", dtype="float32", eval_iters=2, eval_interval=60)
TINY |= dict(max_iters=60, lr_decay_iters=60, warmup_iters=5, learning_rate=3e-3)
GPT2 = dict(bias=True)
LLAMA = dict(norm="rmsnorm", position="rope", mlp="swiglu", n_hidden=384, n_kv_head=2)
MODELS = {
    "baseline": dict(GPT2, n_shard=2),
    "baseline-llama": dict(LLAMA, n_shard=2),
    "spd": dict(GPT2, n_shard=2, sync="spd"),
    "grouped": dict(GPT2, n_shard=4, sync="grouped-2"),
    "grouped-llama": dict(LLAMA, n_shard=4, sync="grouped-2"),  # copies of KV heads
    "attention-llama": dict(LLAMA, n_shard=2, sync="a001"),
    "selective-qwen2": dict(init_from="qwen2", n_shard=2, sync="a021"),
    "parallel": dict(GPT2, n_shard=2, sync="1011+parallel"),
    "desync-qwen3": dict(init_from="qwen3", n_shard=2, sync="0a01+desync"),
    "tracks": dict(GPT2, n_shard=2, sync="0101+tracks"),
    # as a dropped SmolLM2
    "spd-llama": dict(LLAMA, n_shard=3, n_embd=96, n_head=3, n_kv_head=3, n_hidden=264, sync="spd"),
}
SYNCS = {"baseline": 8, "baseline-llama": 8, "spd": 4, "grouped": 2, "grouped-llama": 2, "selective-qwen2": 4}
SYNCS |= {"attention-llama": 2, "parallel": 3, "tracks": 2, "desync-qwen3": 2, "spd-llama": 4}
WITH_CODE = [name for name in MODELS if not name.startswith("baseline")]
SERVED = [(name, n) for n in (1, 2, 3) for name in MODELS if MODELS[name]["n_shard"] % n == 0]
QUANTIZED = {1: [("sharded", "int8"), ("sharded", "fp8"), ("spd", "int8")]}
QUANTIZED[2] = [*QUANTIZED[1], ("baseline-llama", "int8"), ("baseline-llama", "fp8")]
NEW_TOKENS = 16
ENVIRONMENT = {
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'serving'}",  # the plugin beside this file, wherever one is installed
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two ranks do not need two NUMA nodes
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model is in the process that asks
    "TORCHDYNAMO_DISABLE": "1",  # vLLM compiles a part of the embedding even when it is told not to compile
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """ENVIRONMENT, with vLLM's caches in one folder: what it finds out of a model class, 10 s long, is among them."""
    folder = tmp_path_factory.mktemp("caches")
    names = ("VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "TORCHINDUCTOR_CACHE_DIR", "HF_HOME")
    return ENVIRONMENT | {name: str(folder / name) for name in names}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Every one of MODELS, trained and exported: name -> folder, beside which is its out_dir, out-NAME.

    And what of them is quantized, as NAME-KIND.
    """
    home, found = tmp_path_factory.mktemp("models"), {}
    for name, keys in MODELS.items():
        found[name], out = home / name, home / f"out-{name}"
        if "init_from" in keys:  # what only pretrained models have
            keys = keys | dict(init_from=untrained(keys["init_from"], home / f"untrained-{name}"))
        train_reduced_sync.main([f"--{key}={value}" for key, value in (TINY | keys | {"out_dir": out}).items()])
        export.main([str(out), f"--to={found[name]}"])
    # the plain Llama in the form of a folder with its code, of the same weights and with all syncs
    found["sharded"] = home / "sharded"
    shutil.copytree(found["baseline-llama"], found["sharded"])
    (found["sharded"] / "generation_config.json").unlink()  # vLLM's own does not know of ids that are no tokens
    model = from_pretrained(str(found["baseline-llama"]), n_shard=2, sync="baseline")
    keys = our_config(model.config)
    del keys["qkv_bias"], keys["qk_norm"]  # as in older exports
    (found["sharded"] / "config.json").write_text(json.dumps(keys))
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    write_weights(state, found["sharded"] / "model.safetensors")
    for name in ("baseline-llama", "sharded", "spd"):
        for kind in quantize.KINDS:
            found[f"{name}-{kind}"] = home / f"{name}-{kind}"
            quantize.quantize(found[name], found[f"{name}-{kind}"], kind)
    return found


def untrained(family, folder):
    """A model of transformers' `family`, of TINY's shape, in `folder`, which is returned."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = dict(vocab_size=128, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4)
    shape |= dict(max_position_embeddings=64)
    shape |= {
        "qwen2": dict(num_key_value_heads=1),  # each shard has a copy of it
        "qwen3": dict(num_key_value_heads=2, head_dim=64, tie_word_embeddings=True),
    }[family]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).save_pretrained(folder)
    return folder


def prompts():
    """Texts of validation as ids: six of different length, two of which start alike."""
    import numpy as np

    data = np.memmap(ROOT / "data" / "shakespeare_char" / "val.bin", dtype=np.uint16).astype(int).tolist()
    lengths = {0: 40, 100: 3, 200: 23, 300: 1, 400: 17}
    return [data[first : first + length] for first, length in lengths.items()] + [data[:33] + data[500:505]]


def sampled(source, prompt):
    """The text that sample.py makes of a prompt, which it starts with, by its argument `source`."""
    keys = [source, f"--start={prompt}", f"--max_new_tokens={NEW_TOKENS}", "--temperature=0", "--device=cpu"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        sample.main(keys)
    return said.getvalue().removesuffix("\n---------------\n")


@pytest.fixture(scope="session")
def expected(folders):
    """name -> ids and logprobs of each of prompts() by transformers, one at a time; the ids are sample.py's, too."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = {}
    for name, folder in ((name, folders[name]) for name in MODELS):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
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
            ours = sampled(f"--out_dir={folder.with_name(f'out-{name}')}", tokenizer.decode(prompt))
            assert tokenizer(ours).input_ids == ids.tolist()  # a character is a token
        found[name] = rows
    return found


def served(models, ids, tp_size, folder, env, **options):
    """What generate.py finds, an entry a model, of the folders `models` in tp_size processes."""
    request, result = folder / "request.json", folder / "result.json"
    keys = dict(folders=list(map(str, models)), prompts=ids, new_tokens=NEW_TOKENS, options=options)
    request.write_text(json.dumps(keys))
    for shared in Path("/dev/shm").glob("-tp:*-cpushm_*"):  # a killed run's: under torchrun all runs take one name
        shared.unlink()
    succeeded(run_script([GENERATE, request, result], nproc=tp_size, env=env, timeout=400))
    return json.loads(result.read_text())


@pytest.fixture(scope="session")
def eager(folders, environment, tmp_path_factory):
    """A function of the tensor-parallel size: name -> what generate.py finds, of SERVED and QUANTIZED, in one go."""

    @functools.cache
    def found(tp_size):
        names = [name for name, n in SERVED if n == tp_size]
        names += [f"{name}-{kind}" for name, kind in QUANTIZED.get(tp_size, [])]
        folder, models = tmp_path_factory.mktemp("eager"), [folders[name] for name in names]
        return dict(zip(names, served(models, prompts(), tp_size, folder, environment), strict=True))

    return found


def check_syncs(found, syncs, tp_size):
    """generate.py has `found` the all-reduces of the pattern."""
    assert found["forwards"] > 2
    # one more of vLLM's own: the embedding is cut by its rows
    assert found["all_reduces"] == found["forwards"] * (syncs + 1 if tp_size > 1 else 0)


def check(name, found, expected, tp_size):
    """What generate.py has `found` of one folder is what transformers says, with the all-reduces of its pattern."""
    assert name not in WITH_CODE or found["model"] == "ReducedSyncForCausalLM"
    for ids, logprobs, (their_ids, their_logprobs) in zip(found["ids"], found["logprobs"], expected[name], strict=True):
        assert ids == their_ids
        torch.testing.assert_close(torch.tensor(logprobs), their_logprobs, rtol=0, atol=2e-5)
    check_syncs(found, SYNCS[name], tp_size)


@pytest.mark.parametrize("name, tp_size", SERVED)
def test_greedy_ids_are_ours_and_transformers_and_all_reduces_are_the_patterns(eager, expected, name, tp_size):
    check(name, eager(tp_size)[name], expected, tp_size)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_the_baseline_is_vllms_own_model(eager, tp_size):
    models = [eager(tp_size)[name]["model"] for name in ("baseline", "baseline-llama")]
    assert models == ["GPT2LMHeadModel", "LlamaForCausalLM"]


def agree(one, other):
    """Two finds of generate.py are of the same model."""
    assert one["ids"] == other["ids"]
    torch.testing.assert_close(*(torch.tensor(found["logprobs"]) for found in (one, other)), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantized_weights_are_those_of_vllms_own_llama(eager, kind):
    """On two ranks each multiplies its shard. On one, too: a shard's activations have scales of their own."""
    theirs, ours, on_one_rank = (eager(2)[f"baseline-llama-{kind}"], *(eager(n)[f"sharded-{kind}"] for n in (2, 1)))
    assert [found["model"] for found in (theirs, ours)] == ["LlamaForCausalLM", "ReducedSyncForCausalLM"]
    assert theirs["logprobs"] != eager(2)["baseline-llama"]["logprobs"]  # quantized it is
    agree(theirs, ours)
    agree(theirs, on_one_rank)
    check_syncs(ours, SYNCS["baseline-llama"], 2)


def test_quantized_with_fewer_syncs(eager):
    agree(eager(1)["spd-int8"], eager(2)["spd-int8"])
    check_syncs(eager(2)["spd-int8"], SYNCS["spd"], 2)


def test_four_bits_but_for_layers_that_the_config_names(folders, environment, tmp_path):
    """By the names of the file, of which vLLM has two in one layer."""
    models = []
    for source, mlp, names in (
        ("baseline-llama", "model.layers.0.mlp", ("gate_proj", "up_proj")),
        ("sharded", "model.transformer.h.0.mlp", ("c_gate", "c_fc")),
    ):
        models.append(tmp_path / source)
        shutil.copytree(folders[f"{source}-int4"], models[-1])
        names = [f"{mlp}.{name}" for name in names]
        keys = json.loads((models[-1] / "config.json").read_text())
        keys["quantization_config"]["ignore"] += names
        (models[-1] / "config.json").write_text(json.dumps(keys))
        state, floats = (load_file(folder / "model.safetensors") for folder in (models[-1], folders[source]))
        state = {name: tensor for name, tensor in state.items() if not name.startswith(tuple(names))}
        write_weights(
            state | {f"{name}.weight": floats[f"{name}.weight"] for name in names}, models[-1] / "model.safetensors"
        )
    agree(*served(models, prompts(), 2, tmp_path, environment, dtype="bfloat16"))


@pytest.mark.parametrize("name, tp_size", [("grouped-llama", 2), ("attention-llama", 1)])
def test_compiled(folders, expected, environment, tmp_path, name, tp_size):
    """The second was NaN on a CPU where Inductor fuses past onednn_mm: config.py."""
    env = environment | dict(TORCHDYNAMO_DISABLE="0")
    (found,) = served([folders[name]], prompts(), tp_size, tmp_path, env, enforce_eager=False)
    check(name, found, expected, tp_size)


@pytest.mark.skipif("DROPPED" not in os.environ, reason="DROPPED must name the exported folder of a dropped SmolLM2")
@pytest.mark.parametrize("tp_size", [1, 3])
def test_a_dropped_smollm2(environment, tmp_path, tp_size):
    """Its greedy text is sample.py's, with the all-reduces of its pattern."""
    from transformers import AutoTokenizer

    folder = Path(os.environ["DROPPED"]).resolve()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    texts = ["The workshop on electronic texts was", "A view function, or view for short, is", "In the year"]
    ids = [tokenizer(text).input_ids for text in texts]
    (found,) = served([folder], ids, tp_size, tmp_path, environment, max_model_len=64)
    new = [tokenizer.decode(prompt + more) for prompt, more in zip(ids, found["ids"], strict=True)]
    assert new == [sampled(f"--init_from={folder}", text) for text in texts]
    config = json.loads((folder / "config.json").read_text())
    check_syncs(found, SyncRule.parse(config["sync"], config["n_layer"]).syncs, tp_size)


# --- mistakes: one clear line, before any worker starts


REFUSED = [  # whether vLLM has the plugin, changes of config.json, options of vLLM, words
    (False, dict(), dict(), "contains custom code"),
    (False, dict(), dict(trust_remote_code=True), "vLLM serves this model by the plugin in serving/"),
    (True, dict(), dict(tensor_parallel_size=4), "tensor_parallel_size=4 does not divide n_shard=2; allowed: [1, 2]"),
    (
        True,
        dict(sync="baseline+ladder"),
        dict(trust_remote_code=True),
        "sync='baseline+ladder' cannot be served; allowed after the pattern: parallel, desync, tracks",
    ),
    (
        True,
        dict(),
        dict(quantization="fp8"),
        "quantization='fp8' cannot be served; allowed: a folder of serving/quantize",
    ),
    (
        True,
        dict(quantization_config=quantize.quantization_config("int4")),
        dict(dtype="float32"),
        "weights of 4 bits cannot be served on a CPU in float32: use --dtype bfloat16",
    ),
    (True, dict(head_size=16), dict(), "head_size=16 cannot be served on a CPU; vLLM has [32, 64, "),
]
REFUSE = """
import json, sys
from vllm import EngineArgs
from vllm_reduced_sync import register
for has_plugin, options in json.loads(sys.argv[1]):
    if has_plugin:
        register()
    try:
        EngineArgs(**options).create_engine_config()
    except ValueError as error:
        print(json.dumps(str(error)))
"""


def test_what_cannot_be_served(folders, environment, tmp_path):
    asked = []
    for i, (has_plugin, change, options, _) in enumerate(REFUSED):
        folder = tmp_path / str(i)
        shutil.copytree(folders["spd"], folder)
        keys = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(keys | change))
        asked.append((has_plugin, dict(options, model=str(folder))))
    process = run_script(["-c", REFUSE, json.dumps(asked)], env=environment | dict(VLLM_PLUGINS=""))
    said = [json.loads(line) for line in succeeded(process).splitlines() if line.startswith('"')]
    for (*_, words), text in zip(REFUSED, said, strict=True):
        assert [line for line in text.splitlines() if words in line], text


CHECK = """
import json, sys
from types import SimpleNamespace as Named
import torch
from vllm_reduced_sync import model as ours
ours.distributed.get_tensor_model_parallel_world_size = lambda: 2
ours.distributed.get_tensor_model_parallel_rank = lambda: 1
for name, dtype, shape, parameter_dtype in json.loads(sys.argv[1]):
    parameter = torch.nn.Parameter(torch.zeros(2, 3, dtype=getattr(torch, parameter_dtype)), requires_grad=False)
    parameter.weight_loader, parameter.output_dim = lambda to, part, *place: to.data.copy_(part), 0
    layer = "c_fc" if "c_fc" in name else "c_proj"
    model = Named(model=Named(config=Named(tie_embeddings=True, n_shard=2, mlp="swiglu")))
    model.named_parameters = lambda: [(f"model.transformer.h.0.mlp.{layer}.0.weight", parameter)]
    model.parts = lambda *asked: ours.ReducedSyncForCausalLM.parts(model, *asked)
    weights = [(name, torch.ones(shape).cumsum(0).to(getattr(torch, dtype)))] if name else []
    try:
        ours.ReducedSyncForCausalLM.load_weights(model, weights)
        print("taken", parameter.tolist())
    except ValueError as error:
        print("refused", error)
"""
NAME = "model.transformer.h.0.mlp.c_proj.weight"
LOADED = [  # a file's tensor: name, type, shape (n_shard, in, out); type of the parameter (out, in); what is said
    (NAME, "bfloat16", (2, 3, 2), "float32", "taken [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]"),
    (NAME, "int8", (2, 3, 2), "int8", "taken [[2, 2, 2], [2, 2, 2]]"),
    (
        NAME,
        "float8_e4m3fn",
        (2, 3, 2),
        "float32",
        f"refused {NAME} is torch.float8_e4m3fn; allowed are torch.float32, torch.bfloat16, torch.float16",
    ),
    (NAME, "float32", (2, 3, 2), "int8", f"refused {NAME} is torch.float32; allowed are torch.int8"),
    (NAME, "float32", (2, 3, 4), "float32", f"refused {NAME} has (4, 3) a shard: expected (2, 3)"),
    (
        NAME,
        "float32",
        (4, 3, 2),
        "float32",
        f"refused {NAME} is (4, 3, 2); its first dimension must be n_shard=2",
    ),
    (
        NAME + "_scale",
        "float32",
        (2, 2, 1),
        "float32",
        f"refused the file has {NAME}_scale, which is not a tensor of this model",
    ),
    (
        "model.lm_head.weight",
        "float32",
        (2, 2),
        "float32",
        "refused the file has model.lm_head.weight, which config.json ties to the embedding",
    ),
    ("", "float32", (), "float32", "refused the file has no model.transformer.h.0.mlp.c_proj.0.weight"),
    (
        "model.transformer.h.0.mlp.c_fc.weight",
        "float32",
        (2, 1, 3),
        "float32",
        "refused the file has no model.transformer.h.0.mlp.c_gate.weight",
    ),
]


def test_weights_that_would_be_read_as_others(environment):
    """Fault 1: codes of eight bits, and a head that config.json ties to the embedding; other shapes and names."""
    process = run_script(["-c", CHECK, json.dumps([case[:4] for case in LOADED])], env=environment)
    said = [line for line in succeeded(process).splitlines() if line.startswith(("taken", "refused"))]
    assert said == [case[4] for case in LOADED]


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


def test_the_server(folders, expected, environment, tmp_path, capsys):
    """As `make serve` starts it, on two workers of its own; several clients at once, what README.md asks, mistakes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders["spd"], trust_remote_code=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folders["spd"], "--port", port]
    argv += ["--tensor-parallel-size", 2, "--dtype", "float32", "--kv-cache-memory-bytes", 64 << 20, "--enforce-eager"]
    argv += ["--served-model-name", "spd"]

    def completion(text, **more):
        body = dict(prompt=text, max_tokens=NEW_TOKENS, temperature=0) | more
        return json.loads(ask(port, "/v1/completions", body))["choices"][0]["text"]

    with running([*map(str, argv)], environment | dict(OMP_NUM_THREADS="1"), tmp_path / "log") as server:
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            try:
                ask(port, "/health")
                break
            except OSError:
                time.sleep(0.5)
        texts = [tokenizer.decode(prompt) for prompt in prompts()]
        with ThreadPoolExecutor(6) as clients:
            answers = list(clients.map(completion, texts))
        assert answers == [tokenizer.decode(ids) for ids, _ in expected["spd"]]

        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        curl = json.loads(re.search(r"localhost:8000/v1/completions .*\n +-d '(.*)'\n", readme)[1])
        (code,) = re.findall(r"```python\n(from openai .*?)```", readme, re.DOTALL)
        exec(code.replace("localhost:8000", f"127.0.0.1:{port}"), {})
        assert capsys.readouterr().out == completion(curl["prompt"], **curl) + "\n"

        assert completion("To € be 🙂") == completion("To  be ")  # characters that the model does not know
        with pytest.raises(urllib.error.HTTPError, match="400"):
            completion("🙂")
