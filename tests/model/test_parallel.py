"""The model and the training helpers on real process groups: invariants 1, 2 and 5 of the design."""

import dataclasses
import platform
import resource
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from variants import SMALL, VARIANTS, batch, rough

import reduced_sync_model as rsm
from reduced_sync import distributed
from reduced_sync_model import GPT


def whole_and_part(sync, group, n_shard=4):
    """The same float64 model twice: all shards in this process, and this rank's part of them on the group."""
    config = dataclasses.replace(SMALL, n_layer=len(sync.partition("+")[0]), n_shard=n_shard, sync=sync)
    torch.manual_seed(0)
    whole = rough(GPT(config)).double()
    part = GPT(config, group).double()
    state = dict(whole.named_parameters())
    part.load_state_dict({name: part.local_part(name, tensor) for name, tensor in state.items()}, strict=False)
    return whole, part


def assert_same_function(rank, variants):
    x, y = batch()
    for variant in variants:
        whole, part = whole_and_part(variant, group=dist.group.WORLD)
        expected, loss = whole(x, y)[1], part(x, y)[1]
        expected.backward()
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
        for name, parameter in part.named_parameters():
            gradient = part.local_part(name, whole.get_parameter(name).grad)
            error = (parameter.grad - gradient).norm() / gradient.norm()
            assert error <= 1e-10, f"{variant}: gradient of {name} is off by {error:.1e}"


@pytest.mark.timeout(240)
@pytest.mark.parametrize("tp_size", [2, 4])
def test_tp_size_changes_neither_loss_nor_gradients(tp_size):
    run_ranks(tp_size, assert_same_function, VARIANTS)


def assert_stop_of_an_evaluation(rank):
    layout = distributed.Layout(torch.device("cpu"), torch.float32, dp_size=2, dp_rank=rank)
    for asked, seen in ((0, [0, 0]), (1, [1, 1]), (2, [3, 2])):  # before which of rank 0's batches; those seen
        stop = SimpleNamespace(asked=None, agreed=False)
        batches = asking(range(5)[rank::2], stop, asked if rank == 0 else None)
        assert len(list(distributed.until_stopped(batches, 5, 1, layout, stop))) == seen[rank], asked
        assert stop.agreed == (asked < 2)


def asking(batches, stop, asked):
    """The batches; a stop is asked for as number `asked` of them is fetched."""
    for i, one in enumerate(batches):
        if i == asked:
            stop.asked = 0.0
        yield one


def test_replicas_with_more_batches_stop_with_the_others():
    """Fault 20c: of 5 windows one replica has 3; it asks before two of them, else it would wait for ever."""
    run_ranks(2, assert_stop_of_an_evaluation)


def assert_initial_weights(rank):
    config = dataclasses.replace(SMALL, n_shard=4, sync="0101")
    torch.manual_seed(9)
    whole = GPT(config)
    torch.manual_seed(9)
    part = GPT(config, dist.group.WORLD)
    for name, parameter in part.named_parameters():
        assert torch.equal(parameter, part.local_part(name, whole.get_parameter(name))), name
    assert part.get_num_params() == whole.get_num_params()


def assert_training_steps(rank, pattern):
    """Several SGD steps with clipping: the same weights as one process, replicated ones bit-equal on all ranks."""
    whole, part = whole_and_part(pattern, dist.group.WORLD)
    bound = 0.5
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (whole, part)]
    for step in range(5):
        x, y = batch(T=8 + step)
        norms = []
        for model, optimizer, group in ((whole, optimizers[0], None), (part, optimizers[1], dist.group.WORLD)):
            optimizer.zero_grad()
            model(x, y)[1].backward()
            norms.append(distributed.clip_gradients(model, bound, rsm.is_sharded, group))
            optimizer.step()
        torch_norm = torch.nn.utils.get_total_norm([p.grad for p in whole.parameters()]).item()
        assert torch_norm == pytest.approx(bound, rel=1e-5) and norms[0] > bound  # clipped
        assert norms[1] == pytest.approx(norms[0], rel=1e-10)
    for name, parameter in part.named_parameters():
        torch.testing.assert_close(parameter, part.local_part(name, whole.get_parameter(name)), rtol=1e-9, atol=1e-11)
        if not rsm.is_sharded(name):
            copies = [torch.empty_like(parameter) for _ in range(dist.get_world_size())]
            dist.all_gather(copies, parameter.detach())
            assert all(torch.equal(copy, parameter) for copy in copies), name


def assert_average_gradients(rank):
    """The data-parallel mean equals the gradient of the whole batch, with buckets so small that there are several."""
    torch.manual_seed(0)
    model = rough(GPT(dataclasses.replace(SMALL, n_shard=2, sync="0101"))).double()
    x, y = batch(B=4)
    model(x, y)[1].backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x[rank * 2 : rank * 2 + 2], y[rank * 2 : rank * 2 + 2])[1].backward()
    distributed.average_gradients(model, dist.group.WORLD, bucket_bytes=5000)
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-13)


def assert_compiled(rank, pattern, backend):
    """torch.compile with TP, without graph breaks at the all-reduces."""
    x, y = batch()
    whole, part = whole_and_part(pattern, dist.group.WORLD)
    expected, loss = whole(x, y)[1], torch.compile(part, fullgraph=True, backend=backend)(x, y)[1]
    expected.backward()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for name, parameter in part.named_parameters():
        gradient = part.local_part(name, whole.get_parameter(name).grad)
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


def assert_on_two_ranks(rank):
    assert_initial_weights(rank)
    for pattern in ("2222", "0a01"):
        assert_training_steps(rank, pattern)
    assert_average_gradients(rank)


@pytest.mark.timeout(240)
def test_two_ranks():
    run_ranks(2, assert_on_two_ranks)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("pattern, backend", [("2", "inductor"), ("0a21", "aot_eager")])  # inductor takes its time
def test_compiled_on_two_ranks(pattern, backend):
    run_ranks(2, assert_compiled, pattern, backend, limit=350)


def assert_what_is_shared(rank):
    """Ranks that start from other steps are refused, and replicated parameters are those of rank 0."""
    config, device = dataclasses.replace(SMALL, n_shard=2), torch.device("cpu")
    distributed.check_same([config, 3], device)
    with pytest.raises(distributed.ErrorOnAllRanks, match="different checkpoints or were given different keys"):
        distributed.check_same([config, 3 + rank], device)
    torch.manual_seed(0)
    model = GPT(config, dist.group.WORLD)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += rank
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    distributed.share_replicated(model, rsm.is_sharded, dist.group.WORLD)
    for name, parameter in model.named_parameters():
        expected = before[name] - (0 if rsm.is_sharded(name) else rank)
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-6)


def test_what_ranks_share():
    run_ranks(2, assert_what_is_shared)


def assert_wrong_without_f(rank):
    """What section 4 of the design warns of is visible to these tests: without f the gradients are wrong."""
    whole, part = whole_and_part("0101", dist.group.WORLD)
    x, y = batch()
    whole(x, y)[1].backward()
    rsm.copy_to_ranks = lambda x, group: x
    loss = part(x, y)[1]
    loss.backward()
    name = "transformer.wpe.weight"
    error = (part.get_parameter(name).grad - whole.get_parameter(name).grad).norm()
    assert error > 0.01 * whole.get_parameter(name).grad.norm()


@pytest.mark.timeout(120)
def test_a_missing_f_would_be_seen():
    run_ranks(2, assert_wrong_without_f)


def assert_freed_memory_is_kept(rank):
    def page_faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(64 * 2**20, dtype=torch.uint8)  # more than glibc ever keeps by itself
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    taken_anew = min(page_faults() for _ in range(10))
    distributed.keep_freed_memory()
    kept = min(page_faults() for _ in range(10))  # the first ones grow the heap
    assert kept < taken_anew / 10, (taken_anew, kept)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's")
def test_freed_memory_is_kept():
    run_ranks(1, assert_freed_memory_is_kept)
