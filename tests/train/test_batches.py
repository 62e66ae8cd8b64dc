"""Batches are a function of (seed, step), however they are shared out, and broken data is refused with a reason."""

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from reduced_sync.data import DATA, Corpus

pytestmark = pytest.mark.timeout(60)
T, WINDOWS = 8, 24
LENGTHS = {"train": 331, "val": 75}
META = {"vocab_size": 400, "train_tokens": LENGTHS["train"], "val_tokens": LENGTHS["val"]}


def write(folder, splits, meta=META):
    folder.mkdir(exist_ok=True)
    for split, tokens in splits.items():
        np.asarray(tokens, dtype="<u2").tofile(folder / f"{split}.bin")
    (folder / "meta.json").write_text(meta if isinstance(meta, str) else json.dumps(meta))
    return folder


@pytest.fixture
def folder(tmp_path):
    """A dataset whose tokens say where they are: token i is i, from 300 on downwards in val."""
    return write(tmp_path / "corpus", {"train": range(LENGTHS["train"]), "val": 300 - np.arange(LENGTHS["val"])})


@pytest.fixture
def corpus(folder):
    return Corpus(str(folder), T)


def train(corpus, seed=1, step=0, batch_size=WINDOWS, part=0, parts=1):
    batches = list(corpus.train_batches(seed, step, WINDOWS, batch_size, part, parts))
    assert len(batches) == WINDOWS // parts // batch_size
    assert all(x.shape == y.shape == (batch_size, T) and x.dtype == y.dtype == torch.int64 for x, y in batches)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


# --- training


def test_a_batch_is_a_function_of_seed_and_step(corpus, folder):
    x, y = train(corpus, step=5)
    for step in (0, 1, 2):
        train(corpus, step=step)  # no state: what came before does not matter
    again = train(Corpus(str(folder), T), step=5)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    others = [train(corpus, step=6)[0], train(corpus, seed=2, step=5)[0], train(corpus, seed=5, step=1)[0]]
    assert not any(torch.equal(x, other) for other in others)


def test_targets_are_the_inputs_shifted_by_one(corpus):
    x, y = train(corpus)
    assert torch.equal(y, x + 1)  # the tokens count up
    assert torch.equal(x, x[:, :1] + torch.arange(T))


def test_every_window_occurs(corpus):
    starts = {int(start) for step in range(300) for start in train(corpus, step=step)[0][:, 0]}
    assert starts == set(range(LENGTHS["train"] - T))  # the last one has its last target at the end of the file


@pytest.mark.parametrize("parts, batch_size", [(1, 3), (2, 1), (2, 12), (3, 2), (4, 3), (8, 1), (8, 3)])
def test_the_parts_are_the_global_batch_in_order(corpus, parts, batch_size):
    x, y = train(corpus, step=3)
    shares = [train(corpus, step=3, batch_size=batch_size, part=part, parts=parts) for part in range(parts)]
    assert torch.equal(torch.cat([x for x, _ in shares]), x)
    assert torch.equal(torch.cat([y for _, y in shares]), y)


# --- evaluation


def positions(corpus, split, batches, batch_size, part=0, parts=1):
    """{position in the file: times it is a target}, read from the tokens; the batches must fit, too."""
    sign, zero = (1, 0) if split == "train" else (-1, 300)
    seen = []
    for x, y, n in corpus.evaluation_batches(split, batches, batch_size, part, parts):
        assert x.shape == y.shape == (batch_size, T)
        counted = y >= 0
        assert n == int(counted.sum()) > 0
        assert torch.equal(x[counted] + sign, y[counted])
        seen += (sign * (y[counted] - zero)).tolist()
    return seen


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("batches, batch_size", [(1, 1), (2, 2), (3, 2), (4, 2), (1, 9), (50, 4)])
def test_evaluation_windows_do_not_overlap(corpus, split, batches, batch_size):
    seen = positions(corpus, split, batches, batch_size)
    assert len(set(seen)) == len(seen)
    most = (LENGTHS[split] - 1) // T  # whole windows that fit
    assert len(seen) == T * min(batches * batch_size, most)
    assert positions(corpus, split, batches, batch_size) == seen  # the same tokens every time
    if len(seen) > T:
        assert max(seen) > LENGTHS[split] / 2  # spread over the file


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_the_whole_of_val_has_every_target_once(corpus, batch_size):
    seen = positions(corpus, "val", 0, batch_size)
    assert sorted(seen) == list(range(1, LENGTHS["val"]))


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_as_many_windows_of_train_are_spread_over_it(corpus, batch_size):
    """Not the whole of train: of OpenWebText that would be 9 billion tokens at each evaluation."""
    seen = sorted(positions(corpus, "train", 0, batch_size))
    starts = [position - 1 for position in seen[::T]]
    assert len(starts) == 10  # 74 targets of val in windows of 8
    assert seen == [start + 1 + i for start in starts for i in range(T)]
    assert set(np.diff(starts)) == {(LENGTHS["train"] - 1) // 10}
    assert seen == sorted(positions(corpus, "train", 5, 2))  # the same ones as when 10 are asked for


def test_all_of_train_where_it_has_fewer_windows_than_val(tmp_path):
    for tokens in (2 * T, 2 * T + 1, 3 * T, 5 * T):
        meta = {"vocab_size": 400, "train_tokens": tokens, "val_tokens": 5 * T}
        write(tmp_path, {"train": range(tokens), "val": 300 - np.arange(5 * T)}, meta)
        assert sorted(positions(Corpus(str(tmp_path), T), "train", 0, 2)) == list(range(1, tokens))


def test_the_whole_split_where_windows_fit_exactly(tmp_path):
    for tokens in (2 * T, 2 * T + 1, 2 * T + 2):
        meta = {"vocab_size": 100, "train_tokens": tokens, "val_tokens": tokens}
        write(tmp_path, {"train": range(tokens), "val": range(tokens)}, meta)
        corpus = Corpus(str(tmp_path), T)
        assert sorted(positions(corpus, "train", 0, 2)) == list(range(1, tokens))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("batches, batch_size", [(0, 4), (3, 2), (1, 1)])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_the_parts_of_an_evaluation_are_the_whole(corpus, split, batches, batch_size, parts):
    whole = positions(corpus, split, batches, batch_size)
    shares = [positions(corpus, split, batches, batch_size, part, parts) for part in range(parts)]
    assert sorted(position for share in shares for position in share) == sorted(whole)
    assert max(map(len, shares)) - min(map(len, shares)) <= T  # shared evenly: a part has one window more at most


def test_rows_that_fill_a_batch_up_have_no_targets(corpus):
    *_, (x, y, n) = corpus.evaluation_batches("val", 0, 4, 0, 1)
    # 74 targets: 9 windows of 8 and one of 2; the third batch of 4 has 2 rows
    assert n == T + 2 and (y[2:] == -1).all() and (x[2:] == 0).all()
    assert (y[1, :2] >= 0).all() and (y[1, 2:] == -1).all()


# --- what is refused


def refused(folder, *words, block_size=T):
    with pytest.raises(ValueError) as error:
        Corpus(str(folder), block_size)
    for word in words:
        assert word in str(error.value), error.value
    assert "\n" not in str(error.value)


def test_data_that_was_not_prepared(tmp_path, folder):
    refused(tmp_path, "meta.json", "absolute path")
    refused("no_such_dataset", f"a folder under {DATA}")
    (tmp_path / "prepare.py").touch()
    refused(tmp_path, f"python {tmp_path / 'prepare.py'}")
    (folder / "val.bin").unlink()
    refused(folder, "val.bin", "No such file")
    (folder / "meta.json").unlink()
    refused(folder, "meta.json", f"python {DATA / 'nanogpt/prepare.py'} --folder {folder}")


@pytest.mark.parametrize(
    "meta, words",
    [
        ("", "cannot be read"),
        ('{"vocab_size": 400, "train', "cannot be read"),
        ("\xff", "cannot be read"),
        ("[1, 2]", "vocab_size is missing"),
        ("3", "vocab_size is missing"),
        ({}, "vocab_size is missing"),
        (META | {"vocab_size": "400"}, "vocab_size"),
        (META | {"vocab_size": 0}, "vocab_size"),
        (META | {"vocab_size": True}, "vocab_size"),
        (META | {"vocab_size": 65537}, "uint16"),
        (META | {"val_tokens": None}, "val_tokens"),
        (META | {"train_tokens": 331.0}, "train_tokens"),
    ],
)
def test_a_broken_meta_json(folder, meta, words):
    text = meta if isinstance(meta, str) else json.dumps(meta)
    (folder / "meta.json").write_bytes(text.encode("latin-1"))
    refused(folder, "meta.json", words)


JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON = st.recursive(JSON, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary() | JSON | st.dictionaries(st.sampled_from(list(META)), JSON).map(lambda changes: META | changes))
@example(b"[" * 100_000)
def test_only_value_errors_come_out_of_meta_json(folder, meta):
    (folder / "meta.json").write_bytes(meta if isinstance(meta, bytes) else json.dumps(meta).encode())
    try:
        corpus = Corpus(str(folder), T)
    except ValueError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
    else:
        assert corpus.meta.items() >= {(key, META[key]) for key in ("train_tokens", "val_tokens")}


def test_meta_json_is_a_folder(folder):
    (folder / "meta.json").unlink()
    (folder / "meta.json").mkdir()
    refused(folder, "meta.json", "cannot be read")


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_odd_number_of_bytes(folder, split):
    with open(folder / f"{split}.bin", "ab") as file:
        file.write(b"x")
    refused(folder, f"{split}.bin", str(2 * LENGTHS[split] + 1), "odd")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("change", [-2, 2, 200])
def test_a_size_that_differs_from_meta_json(folder, split, change):
    path = folder / f"{split}.bin"
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + bytes(change))
    refused(folder, f"{split}.bin", str(LENGTHS[split] + change // 2), str(LENGTHS[split]))


def test_data_shorter_than_a_block(folder):
    words = ("val.bin", f"{LENGTHS['val']} tokens", f"block_size={LENGTHS['val']}", "--val_fraction", "--block_size")
    refused(folder, *words, block_size=LENGTHS["val"])
    refused(folder, "train.bin", "more text", "--block_size", block_size=LENGTHS["train"])
    corpus = Corpus(str(folder), LENGTHS["val"] - 1)  # just one window
    assert sorted(positions_of_one(corpus)) == list(range(1, LENGTHS["val"]))


def positions_of_one(corpus):
    ((_, y, _),) = corpus.evaluation_batches("val", 1, 1, 0, 1)
    return (300 - y[y >= 0]).tolist()


def test_token_ids_outside_the_vocabulary(folder):
    write(folder, {"val": [400] * LENGTHS["val"]})
    corpus = Corpus(str(folder), T)
    train(corpus)
    with pytest.raises(ValueError, match=r"val\.bin holds token id 400, at or above the vocabulary size 400"):
        list(corpus.evaluation_batches("val", 0, 4, 0, 1))
    write(folder, {"train": [65535] * LENGTHS["train"]})
    with pytest.raises(ValueError, match=r"train\.bin holds token id 65535, .* 400"):
        train(Corpus(str(folder), T))


def test_a_dataset_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=f"no {tmp_path}/texts/meta.json; prepare the data first"):
        Corpus("~/texts", T)
