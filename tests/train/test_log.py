"""log.txt: the forms that people grep, and that what is written is what is read."""

import math
import subprocess
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train_reduced_sync
from reduced_sync.dropping.log import read_drop_log, table_of
from reduced_sync.train.log import RunLog, changes, drop_lines_after, iter_line, read_log, step_line


def test_the_forms_people_grep():
    assert step_line(20000, 3.27111, 3.28334) == "step 20000: train loss 3.2711, val loss 3.2833"
    line = iter_line(20000, 3.269, 0.1312, 491520, 0.42131, 0.412)
    assert line == "iter 20000: loss 3.2690, time 131.20ms, tok/s 3746341, mfu 41.20%, grad norm 0.4213"
    assert iter_line(7, 3.0, 1.0, 1024, 1.0) == "iter 7: loss 3.0000, time 1000.00ms, tok/s 1024, grad norm 1.0000"


def test_saving_is_no_part_of_a_steps_time(small_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(train_reduced_sync.ckpt, "save", lambda *_: time.sleep(0.5))
    keys = dict(dataset=small_dataset, out_dir=tmp_path / "out", device="cpu", max_iters=6, log_interval=1)
    keys |= dict(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=2, gradient_accumulation_steps=1)
    keys |= dict(eval_interval=6, eval_iters=1, warmup_iters=1, checkpoint_minutes=1e-9)
    train_reduced_sync.main([f"--{key}={value}" for key, value in keys.items()])
    times = [ms for _, _, ms, *_ in read_log(tmp_path / "out" / "log.txt").iterations]
    assert len(times) == 6 and sorted(times)[3] < 500


def write(path, lines, header=None):
    log = RunLog(path)
    log.header(header or {"sync": "spd", "config": {"n_shard": 2, "out_dir": "out: a"}})
    for line in lines:
        log.line(line)
    log.close()


def test_a_line_that_was_cut_short_is_no_part_of_the_next(tmp_path):
    (tmp_path / "log.txt").write_text("step 0: train loss 4.1000, val loss 4.2000\nstep 5: tra")
    write(tmp_path / "log.txt", [step_line(5, 3.5, 3.25)])
    assert [step for step, *_ in read_log(tmp_path / "log.txt").evaluations] == [0, 5]


numbers = st.floats(allow_nan=True, allow_infinity=True, min_value=None, max_value=None)


@given(st.integers(0, 10**7), numbers, numbers)
def test_what_is_written_is_read(tmp_path_factory, step, loss, norm):
    path = tmp_path_factory.mktemp("log") / "log.txt"
    write(path, [step_line(step, loss, norm), iter_line(step, loss, 0.5, 2048, norm)])
    log = read_log(path)
    assert log.header == {"sync": "spd", "config": {"n_shard": 2, "out_dir": "out: a"}}
    (read_step, train, val), (iter_step, iter_loss, ms, speed, iter_norm) = log.evaluations[0], log.iterations[0]
    assert (read_step, iter_step, ms, speed) == (step, step, 500.0, 4096)
    for written, read in ((loss, train), (norm, val), (loss, iter_loss), (norm, iter_norm)):
        assert (math.isnan(written) and math.isnan(read)) or read == float(f"{written:.4f}")


def test_grep_finds_the_lines(tmp_path):
    path = tmp_path / "log.txt"
    write(path, [step_line(s, 3.5, 3.25 + s / 1e6) for s in (19500, 20000)] + [iter_line(20000, 3.2, 0.1, 1000, 1.0)])
    assert subprocess.check_output(["grep", "-c", "val loss", path], text=True) == "2\n"
    found = subprocess.check_output(["grep", "step 20000", path], text=True)
    assert found == "step 20000: train loss 3.5000, val loss 3.2700\n"


def test_a_line_being_written_is_left_out(tmp_path):
    path = tmp_path / "log.txt"
    write(path, [step_line(0, 4.0, 4.0)])
    with open(path, "a") as file:
        file.write("step 100: train lo")
    assert read_log(path).evaluations == [(0, 4.0, 4.0)]


@pytest.mark.parametrize(
    "line", ["hello", "step x: train loss 1.0, val loss 1.0", "# config: {", "# config: [1]", "iter 3: loss 1.0"]
)
def test_what_is_not_a_log_is_refused(tmp_path, line):
    path = tmp_path / "log.txt"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"log\.txt:1: "):
        read_log(path)


def test_a_cut_line_of_a_drop_log(tmp_path):
    """A perplexity whose last digits are missing was taken for another number."""
    path = tmp_path / "log.txt"
    good = "perplexity dense: 4 of 4 syncs, manual 25.100\n"
    path.write_text(good + "perplexity dropped: 2 of 4 syncs, manual 2")
    log = read_drop_log(path)
    assert log.perplexities == [("dense", 4, 4, {"manual": 25.1})] and "| dense | 4 of 4 |" in table_of({"a": log})
    path.write_text("# started: today\n")
    with pytest.raises(ValueError, match="a: its log has no perplexity, yet"):
        table_of({"a": read_drop_log(path)})


def test_resuming_drops_what_will_be_written_again(tmp_path):
    path = tmp_path / "log.txt"
    lines = []
    for step in range(0, 40, 10):
        lines += [step_line(step, 4.0, 4.0), iter_line(step, 4.0, 0.1, 100, 1.0)]
    write(path, lines)
    with open(path, "a") as file:
        file.write("iter 35: lo")  # the run was killed while it wrote
    drop_lines_after(path, 20, 10)  # saved at step 20, before the evaluation there
    log = read_log(path)
    assert [e[0] for e in log.evaluations] == [0, 10] and [i[0] for i in log.iterations] == [0, 10]
    drop_lines_after(path, 10, 10)
    log = read_log(path)
    assert [e[0] for e in log.evaluations] == [0, 10] and [i[0] for i in log.iterations] == [0]
    assert path.read_text().endswith("\n") and log.header["sync"] == "spd"


def test_each_resume_has_its_header(tmp_path):
    """All are kept but those of a resume that was lost: a later one goes on from an earlier step."""
    path = tmp_path / "log.txt"
    write(path, [step_line(0, 4.0, 4.0)], {"started": "today", "device": "cpu", "config": {"seed": 1}})
    for step, seed in ((10, 2), (30, 3), (30, 4), (20, 5)):
        write(path, [], {f"resumed at step {step}": "today", "device": "cuda", "config": {"seed": seed}})
    log = read_log(path)
    assert [(step, header["config"]["seed"]) for step, header in log.headers.items()] == [(0, 1), (10, 2), (20, 5)]
    assert log.header["config"] == {"seed": 5} and log.header["device"] == "cuda" and log.header["started"] == "today"


CONFIG = dict(max_iters=100, gradient_accumulation_steps=40, batch_size=12, block_size=64, eval_iters=200)
CONFIG |= dict(learning_rate=1e-3, lr_decay_iters=None, dtype="float32", out_dir="out", device="cpu", n_shard=2)


@pytest.mark.parametrize(
    "after, text",
    [
        (dict(), ""),
        (dict(out_dir="out-2", device="cuda", log_interval=3), ""),
        (dict(batch_size=6, gradient_accumulation_steps=80, eval_iters=400), ""),  # the same sequences
        (dict(lr_decay_iters=100), ""),
        (dict(dtype=None, dropout=0.5), ""),  # not known, or not known before
        (dict(learning_rate=2e-3, max_iters=200), "max_iters 100 -> 200, learning_rate 0.001 -> 0.002"),
        (dict(eval_iters=0), "evaluation 2400 windows of 64 tokens -> all windows of 64 tokens"),
        (
            dict(batch_size=6, gradient_accumulation_steps=80),
            "evaluation 2400 windows of 64 tokens -> 1200 windows of 64 tokens",
        ),
        (dict(gradient_accumulation_steps=20), "tokens a step 30720 -> 15360"),
        (dict(dtype="bfloat16"), "dtype float32 -> bfloat16"),
    ],
    ids=str,
)
def test_what_changed_is_named(after, text):
    assert changes(CONFIG, CONFIG | after) == text
