"""Checkpoints: what is written is read back, and whatever else is in the file is refused without running it."""

import errno
import os
import pickle
import resource
import shutil
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reduced_sync import checkpoint as ckpt
from reduced_sync_model import GPT, GPTConfig

pytestmark = pytest.mark.timeout(60)
CONFIG = dict(block_size=8, vocab_size=64, n_layer=2, n_head=2, n_embd=32, n_shard=2, sync="01", bias=True)


def trained(seed=0):
    """A model and its optimizer after two steps."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**CONFIG))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    for _ in range(2):
        optimizer.zero_grad()
        idx = torch.randint(0, 64, (2, 9))
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step()
    return model, optimizer


def state_of(model, optimizer, step=2):
    state = {"model_args": dict(CONFIG), "config": {"n_embd": 32, "device": None}, "step": step, "evaluated": step}
    return (
        ckpt.gather(model, optimizer)
        | state
        | {"best_val_loss": 4.2, "scaler": {}, "data": {}, "skipped": 0, "bad_steps": 0}
    )


@pytest.fixture
def state():
    return state_of(*trained())


@pytest.fixture
def path(tmp_path, state):
    ckpt.save(state, tmp_path, is_best=False)
    return tmp_path / "ckpt.pt"


def same(a, b):
    """Equal dicts, lists and plain values; tensors bit for bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def refused(path, *words):
    with pytest.raises(ValueError) as error:
        ckpt.load(path)
    for word in (str(path), *words):
        assert word in str(error.value), error.value
    assert "\n" not in str(error.value)
    return str(error.value)


# --- round trip


def test_what_is_saved_is_loaded(path, state):
    assert same(ckpt.load(path), state)
    assert sorted(os.listdir(path.parent)) == ["ckpt.pt"]


def test_a_restored_run_goes_on_as_the_first(path):
    model, optimizer = trained()
    other, its_optimizer = trained(seed=1)
    ckpt.restore(ckpt.load(path), other, its_optimizer)
    idx = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(5))
    for one, its in ((model, optimizer), (other, its_optimizer)):
        its.zero_grad()
        one(idx[:, :-1], idx[:, 1:])[1].backward()
        its.step()
    assert same(state_of(model, optimizer), state_of(other, its_optimizer))


def test_a_fresh_optimizer_can_be_saved_and_restored(tmp_path):
    model = GPT(GPTConfig(**CONFIG))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    ckpt.save(state_of(model, optimizer), tmp_path, is_best=False)
    ckpt.restore(ckpt.load(tmp_path / "ckpt.pt"), model, optimizer)
    assert not optimizer.state


def test_gather_copies(state):
    model, optimizer = trained()
    before = state_of(model, optimizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert same(before, state)


def test_the_file_holds_tensors_and_plain_types_only(path):
    def walk(value):
        if isinstance(value, dict):
            assert type(value) is dict and all(type(key) is str for key in value)
            for one in value.values():
                walk(one)
        else:
            assert type(value) in (torch.Tensor, int, float, str, bool, type(None)), type(value)

    walk(torch.load(path, weights_only=True))
    with zipfile.ZipFile(path) as archive:
        data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    for name in (b"reduced_sync", b"numpy", b"Parameter"):
        assert name not in data


def test_saving_keeps_the_one_before_and_the_best(tmp_path, state):
    model, optimizer = trained()
    for step, is_best in ((1, True), (2, False), (3, True), (4, False)):
        ckpt.save(state_of(model, optimizer, step), tmp_path, is_best)
        steps = {name: ckpt.load(tmp_path / name)["step"] for name in os.listdir(tmp_path)}
        assert steps.pop("ckpt.pt") == step
        assert steps.pop("ckpt_previous.pt", 0) == step - 1
        assert steps.pop("ckpt_best.pt") == (1 if step < 3 else 3)
        assert not steps


def test_saving_after_a_save_that_was_cut_off(tmp_path, state):
    """Killed between its two renames: ckpt_previous.pt and ckpt.pt are one file then."""
    ckpt.save(state | {"step": 1}, tmp_path, is_best=False)
    os.link(tmp_path / "ckpt.pt", tmp_path / "ckpt_previous.pt")
    (tmp_path / "ckpt.pt.tmp").write_text("half a file")
    ckpt.save(state | {"step": 2}, tmp_path, is_best=False)
    assert {name: ckpt.load(tmp_path / name)["step"] for name in os.listdir(tmp_path)} == {
        "ckpt.pt": 2,
        "ckpt_previous.pt": 1,
    }


@pytest.mark.parametrize("nth", [0, 1, 2])
def test_a_run_killed_while_it_saves_its_best_goes_on_to_save_it(tmp_path, state, monkeypatch, nth):
    """ckpt.pt knew of a best loss, of which ckpt_best.pt was never written."""
    ckpt.save(state | {"step": 1}, tmp_path, is_best=True)
    replace, calls = os.replace, iter(range(9))

    def killed(*paths):
        if next(calls) == nth:
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        ckpt.save(state | {"step": 2}, tmp_path, is_best=True)
    steps = [ckpt.load(tmp_path / name)["step"] for name in ("ckpt.pt", "ckpt_best.pt")]
    assert steps == [1, 1 if nth == 0 else 2]  # the run goes on from step 1


def test_saving_where_the_file_system_has_no_links(tmp_path, state, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    for step in (1, 2):
        ckpt.save(state | {"step": step}, tmp_path, is_best=True)
    names = ("ckpt.pt", "ckpt_previous.pt", "ckpt_best.pt")
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert [ckpt.load(tmp_path / name)["step"] for name in names] == [2, 1, 2]


# --- files that are not whole or not ours


class Payload:
    """Pickles as a call that makes the file `mark`: what a poisoned checkpoint would do."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_pickled_payload_is_refused_and_not_executed(path, state, tmp_path):
    mark = tmp_path / "executed"
    torch.save(state | {"config": Payload(mark)}, path)
    refused(path, "cannot be used")
    path.write_bytes(pickle.dumps(Payload(mark)))  # and as a bare pickle
    refused(path, "cannot be used")
    torch.save(state | {"config": Payload(mark)}, path, _use_new_zipfile_serialization=False)
    refused(path, "cannot be used")
    assert not mark.exists()
    torch.save(Payload(mark), path)
    torch.load(path, weights_only=False)
    assert mark.exists()  # the payload does work: that it did not run above is load's doing


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_truncated_file(path, share):
    os.truncate(path, int(path.stat().st_size * share))
    refused(path, "cannot be used")


def test_a_flipped_bit_in_a_tensor(path):
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda record: record.file_size)
    content = bytearray(path.read_bytes())
    middle = record.header_offset + 1000 + record.file_size // 2
    content[middle] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)  # torch by itself takes it
    refused(path, record.filename, "damaged")


def test_foreign_files(path, tmp_path):
    path.write_text("a text")
    refused(path, "cannot be used")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "another zip file")
    refused(path, "cannot be used")
    torch.save(torch.zeros(3), path)
    refused(path, "not a checkpoint of this project")
    torch.save({"model": {}, "iter_num": 3}, path)  # nanoGPT's
    refused(path, "not a checkpoint of this project", "no optimizer")
    refused(tmp_path, "cannot be used")  # a folder


def test_no_file(tmp_path):
    assert refused(tmp_path / "ckpt.pt") == f"no checkpoint {tmp_path / 'ckpt.pt'}"


@pytest.mark.parametrize("key", ckpt.TRAINING_KEYS)
def test_a_missing_key(path, state, key):
    del state[key]
    torch.save(state, path)
    refused(path, f"no {key}")


def test_the_one_before_is_offered(path, state):
    assert "ckpt_previous.pt" not in damaged(path)
    ckpt.save(state, path.parent, is_best=False)
    ckpt.save(state, path.parent, is_best=False)
    previous = path.with_name("ckpt_previous.pt")
    assert f"to go on from the one before: mv {previous} {path}" in damaged(path)
    assert "the one before" not in damaged(previous)  # not itself
    path.unlink()
    path.mkdir()
    assert "Is a directory" in (said := refused(path)) and "the one before" not in said  # that is no damage


def damaged(path):
    """What loading says after the file was cut. The file is replaced: it may be one with another name."""
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[: len(whole) // 2])
    return refused(path)


def test_another_model_names_the_fields(path):
    saved = ckpt.load(path)
    ckpt.check_model(saved, GPTConfig(**CONFIG), path)
    with pytest.raises(ValueError, match="n_shard=2, not 4; sync='grouped-1', not 'spd'") as error:
        ckpt.check_model(saved, GPTConfig(**CONFIG | {"n_head": 4, "n_shard": 4, "sync": "11"}), path)
    assert str(path) in str(error.value) and "n_embd" not in str(error.value)
    assert "norm" not in saved["model_args"]  # written before there was such a field
    for field in ("depth", "a\nb"):  # written after
        later = saved | {"model_args": saved["model_args"] | {field: 3}}
        with pytest.raises(ValueError, match=field[0]) as error:
            ckpt.check_model(later, GPTConfig(**CONFIG), path)
        assert "\n" not in str(error.value)


def test_an_optimizer_without_a_moment(path):
    saved = ckpt.load(path)
    next(iter(saved["optimizer"].values())).pop("exp_avg")
    with pytest.raises(ValueError, match="optimizer state is not what it should be"):
        ckpt.check_model(saved, GPTConfig(**CONFIG), path)


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_tensor_that_the_model_has_not(path, part):
    saved = ckpt.load(path)
    saved[part]["transformer.h.7.ln_1.weight"] = saved[part]["transformer.h.1.ln_1.weight"]
    with pytest.raises(ValueError, match=r"'transformer\.h\.7\.ln_1\.weight' in it is no parameter of its model"):
        ckpt.check_model(saved, GPTConfig(**CONFIG), path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64])
def test_a_tensor_of_another_type(path, dtype):
    saved, name = ckpt.load(path), "transformer.wte.weight"
    weights = {name: saved["model"][name].to(dtype)}
    moments = {name: saved["optimizer"][name] | {"exp_avg": saved["optimizer"][name]["exp_avg"].to(dtype)}}
    for other in (
        saved | {"model": saved["model"] | weights},
        saved | {"optimizer": saved["optimizer"] | moments},
    ):
        with pytest.raises(ValueError, match=rf"wte\.weight or its optimizer state is {dtype}; allowed is float32"):
            ckpt.check_model(other, GPTConfig(**CONFIG), path)


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(torch.zeros(2))
TREES = st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)
KEPT = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@KEPT
@given(data=st.data())
def test_only_value_errors_come_out_of_other_contents(path, state, data):
    """Any part of a checkpoint replaced by anything that weights_only lets through."""
    key = data.draw(st.sampled_from(list(state)))
    if isinstance(state[key], dict) and state[key] and data.draw(st.booleans()):
        inner = data.draw(st.sampled_from(list(state[key])))
        changed = state | {key: state[key] | {inner: data.draw(TREES)}}
    else:
        changed = state | {key: data.draw(TREES)}
    other = path.with_name("other.pt")
    torch.save(changed, other)
    try:
        loaded = ckpt.load(other)
        ckpt.check_model(loaded, GPTConfig(**CONFIG), other)
        ckpt.check_data(loaded, {}, other)
    except ValueError as error:
        assert "\n" not in str(error) and str(other) in str(error)
    else:  # what got through can be used
        model, optimizer = trained(seed=1)
        ckpt.restore(loaded, model, optimizer)


@KEPT
@given(data=st.data())
def test_only_value_errors_come_out_of_damaged_bytes(path, data):
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=40))
    other = path.with_name("other.pt")
    other.write_bytes(content)
    expected = ckpt.load(path)
    try:
        loaded = ckpt.load(other)
    except ValueError as error:
        assert "\n" not in str(error) and str(other) in str(error)
    else:  # damage in padding
        assert same(loaded["model"], expected["model"]) and same(loaded["optimizer"], expected["optimizer"])


# --- a disk that does not take it


@pytest.fixture
def two_saved(tmp_path, state):
    """A folder with a checkpoint, the one before and the best; returns what asserts that they are untouched."""
    for step, is_best in ((1, True), (2, False)):
        ckpt.save(state | {"step": step}, tmp_path, is_best)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def untouched():
        assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before
        assert [ckpt.load(tmp_path / name)["step"] for name in ("ckpt.pt", "ckpt_previous.pt")] == [2, 1]

    return untouched


def test_a_full_disk(tmp_path, state, two_saved, monkeypatch):
    def full(checkpoint, file):
        file.write(b"the first bytes")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device"):
        ckpt.save(state | {"step": 3}, tmp_path, is_best=True)
    two_saved()


def test_a_file_size_limit(tmp_path, state, two_saved):
    """A real failed write, in the middle of the file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = (tmp_path / "ckpt.pt").stat().st_size // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=r"writing failed|File too large"):
            ckpt.save(state | {"step": 3}, tmp_path, is_best=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    two_saved()


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failure_after_the_write(tmp_path, state, two_saved, monkeypatch, function):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(OSError, match="Input/output error"):
            ckpt.save(state | {"step": 3}, tmp_path, is_best=True)
    two_saved()


def test_a_folder_that_is_gone(tmp_path, state):
    shutil.rmtree(tmp_path)
    with pytest.raises(OSError):
        ckpt.save(state, tmp_path, is_best=False)
