"""The model in one process: patterns, oracles (transformers' GPT-2 and tests/oracle.py), converters, optimizer."""

import dataclasses

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel
from variants import PATTERNS, SMALL, VARIANTS, batch, dense_to_shards, rough

import reduced_sync_model as rsm
from reduced_sync.hf import weights
from reduced_sync.train.recorder import model_flops_utilization
from reduced_sync_model import GPT, GPTConfig, SyncRule, baseline, grouped, selective, spd


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """transformers' GPT-2 with random weights, and the folder it is saved in."""
    torch.manual_seed(3)
    shape = dict(vocab_size=61, n_positions=16, n_embd=32, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0)
    model = rough(GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)))
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    return model, folder


# --- patterns


def test_named_variants():
    assert SyncRule.parse("baseline", 12) == SyncRule(baseline(12)) == SyncRule("2" * 12)
    assert SyncRule.parse("spd", 12) == SyncRule(spd(12)) == SyncRule("1" * 12)
    assert SyncRule.parse("grouped-4", 12) == SyncRule(grouped(12, 4)) == SyncRule("001001001001")
    counts = {"baseline": 24, "spd": 12, "110111011101": 9} | {f"grouped-{n}": n for n in (6, 4, 3, 2, 1)}
    for text, count in counts.items():
        rule = SyncRule.parse(text, 12)
        assert (str(rule), rule.syncs, rule.hidden) == (text, count, 0)
    assert SyncRule.parse("a2a1", 4).syncs == 5 and SyncRule("21a0").diagram == "A|M| AM| A|M AM"
    assert SyncRule.parse("2222", 4) == SyncRule.parse("baseline", 4)
    assert {str(SyncRule.parse(text, 4)) for text in ("1111", "grouped-4", "spd")} == {"spd"}
    assert str(SyncRule.parse("0101+desync", 4)) == "grouped-2+desync" and SyncRule.parse("spd+ladder", 4).hidden == 3


@pytest.mark.parametrize("pattern", ["11", "11111", "1110", "111a", "1x11", "", "111 ", "1111\n"])
def test_bad_patterns_are_refused(pattern):
    for read in (selective, lambda n_layer, text: SyncRule.parse(text, n_layer)):
        with pytest.raises(ValueError, match="sync="):
            read(4, pattern)


@pytest.mark.parametrize(
    "text", ["spdd", "grouped", "grouped-", "grouped:2", "grouped-3", "grouped-0", "grouped-٢", "Spd"]
)
def test_bad_rules_are_refused(text):
    for method in ("", "+desync"):
        with pytest.raises(ValueError, match="grouped-"):
            SyncRule.parse(text + method, 4)


@pytest.mark.parametrize(
    "text", ["spd+", "spd+lader", "spd+ladder+desync", "+ladder", "baseline+parallel", "0001+ladder"]
)
def test_bad_methods_are_refused(text):
    with pytest.raises(ValueError, match="sync="):
        SyncRule.parse(text, 4)


@given(st.text(alphabet="210ax ", max_size=6), st.integers(1, 6))
def test_selective_accepts_exactly_the_valid_patterns(pattern, n_layer):
    valid = len(pattern) == n_layer and set(pattern) <= set("210a") and pattern[-1] in "12"
    if valid:
        assert selective(n_layer, pattern) == pattern
    else:
        with pytest.raises(ValueError):
            selective(n_layer, pattern)


def test_groups_must_fill_the_model():
    for n_syncs in (0, -1, 5, 24):
        with pytest.raises(ValueError, match=r"allowed: grouped-1, grouped-2, .*, grouped-12$"):
            grouped(12, n_syncs)


@pytest.mark.parametrize(
    "change",
    [
        *(
            dict(n_shard=3),
            dict(n_head=3),
            dict(n_shard=0),
            dict(dropout=1.0),
            dict(sync="22"),
            dict(n_layer=0),
        ),
        dict(sync="1a01+parallel"),
        *(dict(n_layer="4"), dict(n_head=4.0), dict(n_embd=True), dict(n_hidden=-8), dict(bias="no")),
        *(dict(norm_eps=float("nan")), dict(norm_eps=-1e-5), dict(rope_theta="1e4"), dict(rope_theta=0)),
        *(dict(rope_inv_freq=(1.0,)), dict(rope_inv_freq=(1.0, 0.5, 0.2, "0.1")), dict(n_layer=2**20)),
    ],
)
def test_impossible_shapes_are_refused(change):
    """Fault 1, of the types: each field may come from a file, a config.json or a checkpoint."""
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(SMALL, **change)


def test_a_model_of_shapes_alone_samples_nothing():
    """Fault 1: the shapes that a file must have cost no time and no memory, however large."""
    before = torch.get_rng_state()
    with torch.device("meta"):
        GPT(SMALL)
    assert torch.equal(torch.get_rng_state(), before)


# --- invariant 2, and the dropped syncs against the independent implementation


def against_gpt2(gpt2, n_shard, pattern):
    """Logits, loss and the gradient of the token embedding, ours and transformers'."""
    theirs, folder = gpt2
    ours = weights.from_pretrained(folder, n_shard=n_shard, sync=pattern)
    x, y = batch()
    logits, loss = ours(x, y)
    loss.backward()
    theirs.zero_grad()
    expected = theirs(x).logits
    expected_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), y.flatten())
    expected_loss.backward()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    gradients = ours.transformer.wte.weight.grad, theirs.transformer.wte.weight.grad
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_shard", [1, 2, 4])
def test_all_2_is_transformers_gpt2(gpt2, n_shard):
    against_gpt2(gpt2, n_shard, "2222")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_shard_is_transformers_gpt2(gpt2, pattern):
    against_gpt2(gpt2, 1, pattern)


@pytest.mark.parametrize("n_shard", [1, 2, 4])
def test_parallel_block_and_ladder_against_transformers_layers(gpt2, n_shard):
    """The rules as their papers give them, on the sublayers of a dense GPT-2: with all syncs no shard is seen."""
    theirs, folder = gpt2
    x, _ = batch()
    sublayers = []
    for block in theirs.transformer.h:
        sublayers.append(lambda h, b=block: b.attn(b.ln_1(h))[0])
        sublayers.append(lambda h, b=block: b.mlp(b.ln_2(h)))

    def head(h):
        return theirs.lm_head(theirs.transformer.ln_f(h))

    start = h = theirs.transformer.wte(x) + theirs.transformer.wpe.weight[: x.size(1)]
    for attention, mlp in zip(sublayers[::2], sublayers[1::2], strict=True):
        h = h + attention(h) + mlp(h)
    ours = weights.from_pretrained(folder, n_shard=n_shard, sync="1111+parallel")
    torch.testing.assert_close(ours(x, x)[0], head(h), rtol=1e-5, atol=1e-5)

    before, h = start, start  # arXiv 2501.06589: x[i+1] = x[i] + h(x[i-1])
    for sublayer in sublayers:
        before, h = h, h + sublayer(before)
    ours = weights.from_pretrained(folder, n_shard=n_shard, sync="2222+ladder")
    torch.testing.assert_close(ours(x, x)[0], head(h), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_shard, choice", [(1, "delayed"), (1, "desync"), (4, "desync")])
def test_methods_that_are_plain_gpt2(gpt2, n_shard, choice):
    """One shard has all parts at once, and where all syncs are made nothing is left to average."""
    theirs, folder = gpt2
    x, _ = batch()
    ours = weights.from_pretrained(folder, n_shard=n_shard, sync=f"2222+{choice}")
    torch.testing.assert_close(ours(x, x)[0], theirs(x).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n_shard", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_variants_against_the_oracle(variant, n_shard, bias):
    torch.manual_seed(0)
    dense_model = rough(GPT(dataclasses.replace(SMALL, bias=bias))).double()
    dense = weights.shards_to_dense(dict(dense_model.named_parameters()), dense_model.config)
    config = dataclasses.replace(SMALL, bias=bias, n_shard=n_shard, sync=variant)
    model = GPT(config).double()
    model.load_state_dict(dense_to_shards(dense, config), strict=False)
    x, y = batch()
    logits, loss = model(x, y)
    expected = oracle.logits(dense, x, 4, 4, n_shard, sync=variant)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)

    loss.backward()
    names = [name for name in dense if name != "lm_head.weight"]
    expected_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), y.flatten())
    gradients = torch.autograd.grad(expected_loss, [dense_model.get_parameter(name) for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        ours = model.get_parameter(name).grad
        if ".ln_" in name and rsm.is_sharded(name):  # each shard has its own gain: together they are the dense one's
            ours = ours.sum(0)
            gradient = gradient[0]
        elif name.endswith("c_proj.bias"):  # each shard holds 1/n_shard of it
            ours, gradient = ours.mean(0), gradient[0]
        else:
            ours = weights.unshard_tensor(name, ours, config)
            gradient = weights.unshard_tensor(name, gradient, dense_model.config)
        torch.testing.assert_close(ours, gradient, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_variants_are_different_functions():
    """Guards the tests above: they really differ once n_shard is above 1."""
    x, y = batch()
    losses = set()
    for variant in VARIANTS:
        torch.manual_seed(0)
        losses.add(round(rough(GPT(dataclasses.replace(SMALL, n_shard=2, sync=variant)))(x, y)[1].item(), 5))
    assert len(losses) == len(VARIANTS)


# --- converters and initial weights


@pytest.mark.parametrize("n_shard", [1, 2, 4])
def test_initial_weights_are_the_dense_models(n_shard):
    torch.manual_seed(5)
    dense = GPT(SMALL)
    torch.manual_seed(5)
    sharded = GPT(dataclasses.replace(SMALL, n_shard=n_shard))
    joined = weights.shards_to_dense(dict(sharded.named_parameters()), sharded.config)
    for name, tensor in weights.shards_to_dense(dict(dense.named_parameters()), dense.config).items():
        assert torch.equal(joined[name], tensor), name
    x, y = batch()
    torch.testing.assert_close(sharded(x, y)[0], dense(x, y)[0], rtol=1e-5, atol=1e-6)


def test_initial_weights_have_gpt2s_spread():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=512, n_layer=4, n_head=4, n_embd=128, n_shard=2))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif ".ln_" in name:
            assert (parameter == 1).all()
        else:
            wanted = 0.02 / 8**0.5 if "c_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(wanted, rel=0.05), name


def test_shards_to_dense_folds_gains_that_differ():
    torch.manual_seed(0)
    model = rough(GPT(dataclasses.replace(SMALL, n_shard=4))).double()
    assert not torch.equal(model.transformer.h[0].ln_1.weight[0], model.transformer.h[0].ln_1.weight[1])
    dense = GPT(SMALL).double()
    dense.load_state_dict(
        {
            n: rsm.shard_tensor(n, t, SMALL)
            for n, t in weights.shards_to_dense(dict(model.named_parameters()), model.config).items()
        },
        strict=False,
    )
    x, y = batch()
    torch.testing.assert_close(dense(x, y)[0], model(x, y)[0], rtol=1e-10, atol=1e-10)


def test_no_dense_model_for_dropped_syncs():
    model = GPT(dataclasses.replace(SMALL, n_shard=2, sync="spd"))
    with pytest.raises(ValueError, match="sync='spd'"):
        weights.shards_to_dense(dict(model.named_parameters()), model.config)
    model = GPT(dataclasses.replace(SMALL, sync="baseline+ladder"))
    with pytest.raises(ValueError, match="ladder"):
        weights.shards_to_dense(dict(model.named_parameters()), model.config)


def test_from_pretrained_crops_positions_and_refuses_more(gpt2):
    theirs, folder = gpt2
    model = weights.from_pretrained(folder, n_shard=2, block_size=8)
    x, y = batch(T=8)
    torch.testing.assert_close(model(x, y)[0], theirs(x).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="block_size=17"):
        weights.from_pretrained(folder, block_size=17)


# --- invariant 3: all-reduces counted from outside the model


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("n_shard", [2, 4])
def test_executed_all_reduces(fake_group, variant, n_shard):
    model = GPT(dataclasses.replace(SMALL, n_shard=n_shard, sync=variant), fake_group)
    x, y = batch()
    with CommDebugMode() as comm:
        _, loss = model(x, y)
    assert comm.get_total_counts() == (syncs := model.config.rule.syncs)
    with CommDebugMode() as comm:
        loss.backward()
    # With overlap, what arrives behind the last sublayer is read by no shard: one f less where two syncs end the model.
    unread = model.config.rule.method_name in ("ladder", "delayed") and model.config.rule.pattern[-1] == "2"
    assert comm.get_total_counts() == syncs - unread
    assert all("allreduce" in str(op).replace("_", "") for op in comm.get_comm_counts())


def test_hidden_syncs():
    for variant in VARIANTS:
        rule = SyncRule.parse(variant, 4)
        hides = "ladder" in variant or "delayed" in variant
        assert rule.hidden == (4 if "delayed-layer" in variant else rule.syncs - 1 if hides else 0)


def test_layouts_that_cannot_be_are_refused(fake_group):
    with pytest.raises(ValueError, match="n_shard=1 is not divisible by tp_size=2"):
        GPT(SMALL, fake_group)
    with pytest.raises(ValueError, match="dropout"):
        GPT(dataclasses.replace(SMALL, n_shard=2, dropout=0.1), fake_group)


# --- the rest


def test_parameter_counts():
    config = GPTConfig(bias=False, n_shard=2, sync="spd")
    with torch.device("meta"):
        model = torch.nn.Module.__new__(GPT)  # shapes only: 124M values are not needed for a count
        GPT.__init__(model, config)
    matrices, norms = 12 * 12 * 768**2, 2 * 12 * 768 * 2 + 768
    assert model.get_num_params(non_embedding=False) == matrices + norms + 50304 * 768 + 1024 * 768
    assert model.get_num_params() == model.get_num_params(non_embedding=False) - 1024 * 768
    assert norms - (2 * 12 * 768 + 768) == 18432  # what a second shard's norms add


def test_weight_decay_by_role():
    model = GPT(dataclasses.replace(SMALL, n_shard=2))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert decayed | plain == set(names.values()) and not decayed & plain
    assert plain == {n for n in names.values() if n.endswith("bias") or ".ln_" in n}


def test_mfu_is_of_the_flops_that_pytorch_counts(fake_group):
    """In forward and backward, but for the attention, which its counter does not know on a CPU."""
    model, idx = GPT(dataclasses.replace(SMALL, bias=False)), torch.zeros(4, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    attention = 3 * 4 * idx.numel() * 4 * 32 * 16  # backward is twice forward; a token in a layer: 2 products of 2 C T
    mfu = model_flops_utilization(model, 4, 2.0, "NVIDIA H100 80GB HBM3")
    assert mfu == pytest.approx((counted + attention) / 2 / 989e12, rel=0.01)  # it takes norms for matrices
    part = GPT(dataclasses.replace(SMALL, bias=False, n_shard=2), fake_group)
    assert model_flops_utilization(part, 4, 2.0, "NVIDIA H100 80GB HBM3") == pytest.approx(mfu / 2, rel=0.01)
    assert model_flops_utilization(model, 4, 2.0, "cpu") is None


def test_without_targets_only_the_last_position():
    model = GPT(SMALL)
    x, y = batch()
    last, loss = model(x)
    assert loss is None and last.shape == (3, 1, 61)
    torch.testing.assert_close(last, model(x, y)[0][:, -1:])
    with pytest.raises(ValueError, match="block_size=16"):
        model(torch.zeros(1, 17, dtype=torch.long))


def test_targets_of_minus_1_do_not_count():
    model = GPT(SMALL)
    x, y = batch()
    masked = y.clone()
    masked[1:] = -1
    torch.testing.assert_close(model(x, masked)[1], model(x[:1], y[:1])[1])


def test_dropout_is_where_gpt2_has_it_and_only_in_training(monkeypatch):
    """Of the embedding, of both sublayers' outputs, and of the attention's weights."""
    models = []
    for dropout in (0.3, 0.0):
        torch.manual_seed(0)
        models.append(GPT(dataclasses.replace(SMALL, n_shard=2, dropout=dropout)))
    model, block, h = models[0], models[0].transformer.h[0], torch.randn(2, 8, 16, 32)
    for module in (model.transformer.drop, block.attn, block.mlp):
        assert (module(h) == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    with monkeypatch.context() as patch:  # what is left is the weights'
        patch.setattr(torch.nn.functional, "dropout", lambda y, *_: y)
        assert not torch.equal(block.attn(h), block.attn(h)) and torch.equal(block.mlp(h), block.mlp(h))
    assert torch.equal(model.eval()(*batch())[0], models[1](*batch())[0])


@pytest.mark.parametrize("sync", ["baseline", "spd", "baseline+ladder", "baseline+delayed", "spd+delayed"])
def test_a_stream_may_be_beyond_the_range_of_float16(sync):
    model = GPT(dataclasses.replace(SMALL, n_shard=2, sync=sync))
    with torch.no_grad():
        model.transformer.wte.weight *= 1e6 / model.transformer.wte.weight.abs().max()
        with torch.autocast("cpu", dtype=torch.float16):
            x = model.run_blocks(model.embed(batch()[0]), range(4))
    assert x.abs().max() > 65504 and x.isfinite().all()


@pytest.mark.parametrize("pattern", ["2222", "0a01"])
def test_bfloat16_autocast_stays_near_float32(pattern):
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(SMALL, n_shard=2, sync=pattern))
    x, y = batch()
    expected = model(x, y)[1]
    exact = torch.autograd.grad(expected, list(model.parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x, y)[1]
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3) and loss != expected
    for (name, p), gradient in zip(model.named_parameters(), exact, strict=True):
        assert (p.grad - gradient).norm() < 0.03 * gradient.norm(), name


@pytest.mark.timeout(300)
def test_compiled_without_graph_breaks():
    torch._dynamo.reset()  # of what other tests in this process have compiled
    x, y = batch()
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(SMALL, n_layer=2, n_shard=2, sync="a1"))
    expected = model(x, y)[1]
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = torch.compile(model, fullgraph=True)(x, y)[1]
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)


def test_compiled_for_any_length():
    """A compiler that has seen two lengths makes the third one symbolic."""
    torch._dynamo.reset()
    model = GPT(SMALL)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for T in (7, 1, 9, 12):
            idx, _ = batch(T=T)
            torch.testing.assert_close(compiled(idx)[0], model(idx)[0])
