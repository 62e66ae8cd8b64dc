"""Measure vLLM with and without the plugin: rows of serving/load.py in measured.txt, the tables of `make results`.

$ python -m results.serving.measure                           # an hour, on an idle machine; goes on where it stopped
$ python -m results.serving.measure --rounds 1 --seconds 1 --out=rehearsal.txt

GPT-2's and Llama's block, 12 layers x 768, each by vLLM's own class (`vllm`) and by the plugin with all syncs
(`baseline`, as many shards as ranks), `spd` and `grouped-4` (two shards), of the same weights, which are those of one
training step. On one rank and on two, a thread each, in float32. The servers of a table's rows run at once, all but one
of them stopped by a signal, and take turns of a few seconds, so that a machine that gets slower slows all: with 1, 8
and 32 clients, then with longer prompts. With an added delay (added_delay.py) it is the plugin alone, on two ranks.
"""

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from reduced_sync.hf.export import our_config, write_weights
from reduced_sync.hf.weights import from_pretrained

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "out-serving"
SHAPE = dict(n_layer=12, n_embd=768, n_head=12, block_size=2048, n_shard=2, dataset="shakespeare_char", device="cpu")
SHAPE |= dict(dtype="float32", eval_iters=1, batch_size=1, gradient_accumulation_steps=1, max_iters=1, warmup_iters=0)
FAMILIES = {"gpt2": dict(bias=True), "llama": dict(norm="rmsnorm", position="rope", mlp="swiglu", n_hidden=2048)}
PLUGIN = ("baseline", "spd", "grouped-4")
FOLDERS = [("baseline", 1), ("baseline", 2), ("spd", 2), ("grouped-4", 2)]  # (sync, n_shard)
PORT = 8123


def run(script, *arguments):
    """What a script of ours prints."""
    command = [sys.executable, ROOT / script, *arguments]
    return subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout


def make_models(family):
    """FAMILY-vllm, a plain folder, and of the same weights in shards FAMILY-SYNC-N_SHARD for each of FOLDERS."""
    plain = MODELS / f"{family}-vllm"
    MODELS.mkdir(exist_ok=True)
    keys = SHAPE | FAMILIES[family] | dict(out_dir=MODELS / f"out-{family}")
    for folder in (plain, keys["out_dir"]):
        shutil.rmtree(folder, ignore_errors=True)
    run("train_reduced_sync.py", *(f"--{key}={value}" for key, value in keys.items()))
    run("export.py", keys["out_dir"], f"--to={plain}")
    for sync, n_shard in FOLDERS:
        folder = MODELS / f"{family}-{sync}-{n_shard}"
        shutil.copytree(plain, folder, dirs_exist_ok=True)
        model = from_pretrained(str(plain), n_shard=n_shard, sync=sync)
        (folder / "config.json").write_text(json.dumps(our_config(model.config)))
        state = {f"model.{name}": tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        write_weights(state, folder / "model.safetensors")


@contextlib.contextmanager
def serving(folder, tp_size, delay, port):
    """A server of `folder`, which takes no time of the processors until it is resumed: its process group."""
    plugins = MODELS / "plugins"  # vLLM finds added_delay by this, without an installation
    info = plugins / "added_delay-1.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Name: added_delay\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nadded_delay = added_delay:register\n")
    paths = [str(ROOT / "serving"), str(plugins), str(Path(__file__).parent)]
    env = os.environ | dict(OMP_NUM_THREADS="1", ADDED_DELAY_US=str(delay), PYTHONPATH=os.pathsep.join(paths))
    env |= dict(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind")  # as `make serve`
    command = [ROOT / ".venv-serving/bin/python", "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--tensor-parallel-size", tp_size, "--dtype", "float32", "--port", port]
    with open(MODELS / f"server-{port}.log", "w") as log:
        options = dict(env=env, stdout=log, stderr=log, start_new_session=True)
        server = subprocess.Popen(list(map(str, command)), **options)
        try:
            while True:
                if server.poll() is not None:
                    sys.exit(f"error: no server: see {log.name}")
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(1)
            os.killpg(server.pid, signal.SIGSTOP)
            yield server.pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=4, help="for each row, default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("measured.txt"), help="raw rows")
    args = parser.parse_args()
    for family in FAMILIES:
        if not (MODELS / f"{family}-grouped-4-2").exists():  # the last
            make_models(family)
    done = args.out.read_text() if args.out.exists() else ""
    loads = dict(decode="--clients 1 8 32 --tokens 32", prefill="--clients 1 --prompt_tokens 16 256 1024 --tokens 8")
    setups = [("gpt2", 2, 0), ("llama", 2, 0), *(("gpt2", 2, delay) for delay in (400, 1000, 100))]
    for family, tp_size, delay in [*setups, ("gpt2", 1, 0), ("llama", 1, 0)]:
        setup = f"tp_size={tp_size} added_delay_us={delay} round="
        if any(line.startswith(f"{family} ") and setup in line for line in done.splitlines()):
            continue
        with contextlib.ExitStack() as stack:
            servers = {}
            for port, variant in enumerate(PLUGIN if delay else ("vllm", *PLUGIN), PORT):
                n_shard = dict(vllm="", baseline=f"-{tp_size}").get(variant, "-2")
                folder = MODELS / f"{family}-{variant}{n_shard}"
                servers[variant] = port, stack.enter_context(serving(folder, tp_size, delay, port))
            lines = []
            for number, load, variant in itertools.product(range(args.rounds), loads, servers):
                port, group = servers[variant]
                os.killpg(group, signal.SIGCONT)
                url = f"--url=http://127.0.0.1:{port}"
                rows = run("serving/load.py", url, f"--seconds={args.seconds}", *loads[load].split()).splitlines()[2:]
                os.killpg(group, signal.SIGSTOP)
                lines += [f"{family} {variant} {setup}{number} {load} {row}\n" for row in rows]
                print("".join(lines[-len(rows) :]), end="", flush=True)
        with args.out.open("a") as file:  # all rows of a setup, or none
            file.writelines(lines)


if __name__ == "__main__":
    main()
