"""On a GPU, against a CPU: `pytest -m gpu`, the most important first, some minutes in all. With two GPUs NCCL, too."""

import copy
import dataclasses
import re

import pytest
import torch
from launch import ROOT, TRAIN, run_script, succeeded, timeless
from variants import SMALL, VARIANTS, batch, rough

from reduced_sync import decoding
from reduced_sync_model import GPT

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(200)]
LLAMA = dict(sync="1111", norm="rmsnorm", position="rope", mlp="swiglu", bias=False, n_kv_head=2, qk_norm=True)
CASES = [*(dict(sync=sync) for sync in VARIANTS), LLAMA]
SHAPE = dict(n_layer=2, n_head=4, n_embd=64, block_size=64, batch_size=2, gradient_accumulation_steps=8, n_shard=4)


@pytest.fixture
def gpus():
    """How many there are; none: skipped."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    return torch.cuda.device_count()


def assert_near(found, expected, tolerance):
    """All numbers together: which are off by rounding alone."""
    error = torch.linalg.vector_norm(found.cpu().float() - expected) / torch.linalg.vector_norm(expected)
    assert error < tolerance, error.item()


def gradients(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("keys", CASES, ids=lambda keys: "llama" if keys is LLAMA else keys["sync"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_variant_trains_and_decodes_as_on_a_cpu(gpus, keys, compiled):
    """Loss, gradients, and each decode step, a CUDA graph's, but for bfloat16's rounding."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = rough(GPT(dataclasses.replace(SMALL, n_shard=2, **keys)))
    ours = copy.deepcopy(model).cuda()
    x, y = batch(T=16)
    expected, loss = model(x, y)
    loss.backward()
    x, y = x.cuda(), y.cuda()
    loss_of = torch.compile(lambda x, y: ours(x, y)[1]) if compiled else lambda x, y: ours(x, y)[1]
    with torch.autocast("cuda", torch.bfloat16):
        found = loss_of(x, y)
    found.backward()
    assert found.item() == pytest.approx(loss.item(), rel=2e-2)
    assert_near(gradients(ours), gradients(model), 6e-2)

    decoding.cast_matrices(ours.eval(), torch.bfloat16)
    decoding.for_decoding(ours, compiled)
    decoder = decoding.Decoder(ours, len(x), 16)
    decoder.SHORTEST = 8  # two graphs
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        logits = [decoder.prefill(x[:, :5]).clone(), *(decoder.step(x[:, t]).clone() for t in range(5, 16))]
    assert list(decoder.steps) == [8, 16]
    assert_near(torch.cat(logits, 1), expected.detach()[:, 4:], 6e-2)


def train(dataset, out_dir, nproc=None, **keys):
    """Train; returns the losses and norms that were printed, {what of which step: number}."""
    keys = dict(dataset=dataset, out_dir=out_dir, max_iters=8, eval_interval=4, eval_iters=2, log_interval=1) | keys
    keys = SHAPE | dict(warmup_iters=1, sync="11", device="cuda", compile=False) | keys
    lines = succeeded(run_script([TRAIN, *(f"--{key}={value}" for key, value in keys.items())], nproc)).splitlines()
    found = (re.findall(r"^(\w+ \d+)|((?:\w+ )?(?:loss|norm)) ([\d.]+)", line) for line in timeless(lines))
    return {f"{step}, {name}": float(number) for (step, *_), *rest in found if step for _, name, number in rest}


@pytest.fixture(scope="session")
def trained(small_dataset, tmp_path_factory):
    """An out_dir of a baseline."""
    out = tmp_path_factory.mktemp("gpu") / "out"
    train(small_dataset, out, sync="baseline", max_iters=40)
    return out


def test_a_resumed_run_in_float16_is_the_uninterrupted_one(gpus, small_dataset, tmp_path):
    """With its scaler of losses."""
    whole = train(small_dataset, tmp_path / "whole", dtype="float16")
    keys = dict(out_dir=tmp_path / "parts", dtype="float16", lr_decay_iters=8)
    parts = train(small_dataset, **keys, max_iters=4) | train(small_dataset, **keys, init_from="resume")
    assert len(whole) > 15 and {name: parts[name] for name in whole} == pytest.approx(whole, rel=1e-3)


def test_sampling_and_export(gpus, trained, tmp_path):
    argv = ["--start=a", "--max_new_tokens=80", "--temperature=0"]
    text = succeeded(run_script([ROOT / "sample.py", f"--out_dir={trained}", *argv]))
    succeeded(run_script([ROOT / "export.py", trained, f"--to={tmp_path / 'exported'}"]))
    assert text == succeeded(run_script([ROOT / "sample.py", f"--init_from={tmp_path / 'exported'}", *argv]))
    assert len(text) > 80


def test_dropping_syncs(gpus, trained, tmp_path):
    argv = [f"--init_from={trained}", f"--out_dir={tmp_path}", "--n_shard=4", "--block_size=32", "--batch_size=4"]
    argv += ["--distil_tokens=1024", "--finetune_tokens=2048", "--evaluation_tokens=1024", "--calibration_windows=8"]
    out = succeeded(run_script([ROOT / "drop_syncs.py", *argv]))
    dropped, distilled, finetuned = map(float, re.findall(r"ed: 2 of 4 syncs, \S+ (\S+)", out))
    assert finetuned < dropped and distilled < dropped


@pytest.mark.parametrize("sync", ["baseline", "11", "22+ladder"])
def test_two_ranks_train_and_write_as_one(gpus, small_dataset, tmp_path, sync):
    """Over NCCL."""
    if gpus < 2:
        pytest.skip("one GPU")
    one = train(small_dataset, tmp_path / "one", sync=sync, dtype="float32")
    two = train(small_dataset, tmp_path / "two", 2, sync=sync, dtype="float32", tp_size=2)
    assert two == pytest.approx(one, rel=1e-2)
    argv = ["--", ROOT / "sample.py", f"--out_dir={tmp_path / 'two'}", "--start=a", "--max_new_tokens=80"]
    text = succeeded(run_script(argv, nproc=2))
    assert text == succeeded(run_script(argv[1:])) and len(text) > 80
