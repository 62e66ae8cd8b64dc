"""compare.py as a command."""

import csv
import json
import math
import struct
from pathlib import Path

import pytest
from launch import run_script, status
from make_runs import make

import compare


def test_the_command_starts_without_what_it_may_not_need():
    """matplotlib takes seconds to import, and scipy one."""
    code = "import sys, compare; print({'scipy', 'matplotlib'} & set(sys.modules))"
    process = run_script(["-c", code], timeout=30)
    assert (process.stdout, process.stderr) == ("set()\n", "")


def test_command_writes_figure_and_csv(runs, monkeypatch, capsys):
    make(runs, "out-g2", "000001000001", [4.0, 3.3])  # unfinished
    monkeypatch.chdir(runs)
    assert status(compare.main, ["--csv=table.csv", "--tolerance=2.1"]) == 0
    assert "fewest syncs within 2.1%" in capsys.readouterr().out
    png = (runs / "comparison.png").read_bytes()
    assert png.startswith(b"\x89PNG") and struct.unpack(">2I", png[16:24]) == (12 * 130, 4.8 * 130)
    with open(runs / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["out-base", "out-spd", "out-g6", "out-g3", "out-g2"]
    assert float(rows[4].pop("gap_percent")) == pytest.approx(100 * math.log(1.1))
    expected = "run=out-g2 sync=grouped-2 n_layer=12 n_embd=64 n_shard=2 syncs=2 "
    expected += f"hidden_syncs=0 reduction_percent={100 * (1 - 2 / 24)} parameters=609344 tokens=10240000 "
    expected += "learning_rate=0.001 bracketed=False dtype=float32 seeds=1 step=10 max_iters=20 "
    expected += "val_loss=3.3 val_loss_sd= gap_margin= gap_pairs=1 gap_step=10 verdict=unfinished"
    assert rows[4] == dict(pair.split("=") for pair in expected.split())


def test_what_is_no_run_is_skipped_with_a_note(runs, monkeypatch, capsys):
    """A folder without a log, a study's own, a run that has just started, logs that lack something."""
    monkeypatch.chdir(runs)
    for name in ("out-empty", "out-study/a", "out-started"):
        Path(name).mkdir(parents=True)
    Path("out-study/a/log.txt").write_bytes(Path("out-spd/log.txt").read_bytes())
    Path("out-study/table.csv").write_text("run,variant\n")
    Path("out-started/log.txt").write_text("")
    whole = Path("out-spd/log.txt").read_text()
    lacking = {"syncs": "# syncs:", "parameters": "# parameters:", "dtype": "# dtype:"}
    lacking |= {"config": "# config:", '"learning_rate": 0.001, ': "learning_rate", '"eval_iters": 5, ': "eval_iters"}
    for i, text in enumerate(lacking):
        Path(f"out-x{i}").mkdir()
        lines = whole.replace(text, "") if text.endswith(", ") else whole.replace(f"# {text}:", "# other:")
        Path(f"out-x{i}/log.txt").write_text(lines)
    Path("out-x9").mkdir()
    Path("out-x9/log.txt").write_text(whole.replace("(609344)", "(many)"))
    assert status(compare.main, sorted(map(str, Path().glob("out*")))) == 0
    out, err = capsys.readouterr()
    assert "fewest syncs" in out and len(out.split("\n")) == 8  # heading, four runs, verdict, figure
    notes = err.splitlines()
    assert len(notes) == 4 + len(lacking) and all(note.startswith("skipped: out-") for note in notes)
    assert "skipped: out-study: its runs are in folders of their own: compare.py out-study/*/" in notes
    assert "skipped: out-started/log.txt: its header is not that of a run: there is none, yet" in notes
    assert any("out-empty/log.txt: No such file or directory" in note for note in notes)
    for i, word in enumerate(lacking.values()):
        assert any(f"out-x{i}/log.txt: its header" in note and word in note for note in notes), (word, err)
    assert status(compare.main, ["out-study/a", "out-study/a/log.txt", "out-study/../out-study/a"]) == 0
    assert capsys.readouterr().out.count("\na ") == 1  # one run, named thrice
    assert status(compare.main, ["out-study/a", "out-study/table.csv"]) == 0
    assert "skipped: out-study/table.csv:1: not a line of a log" in capsys.readouterr().err
    assert status(compare.main, ["out-started", "out-empty"]) == 1
    assert capsys.readouterr().err.endswith("there is none, yet (and 1 more that are no runs)\n")


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["nowhere"], "nowhere: No such file or directory; name folders that hold a log.txt"),
        ([], "no out*/log.txt here; name the runs' folders"),
        (["text"], "text:1: not a line of a log: 'not a log'"),
        (["out-base", "--png=no/such/folder.png"], "no/such/folder.png: No such file or directory"),
        (["out-base", "--tolerance=nan"], "--tolerance=nan: tolerance must be float, not str"),
        (["out-base", "--tolerance=1e999"], "tolerance=inf must be at least 0, and below 2^63"),
        (["out-base", "--tolerance=-1"], "tolerance=-1.0 must be at least 0, and below 2^63"),
        (["out-base", "--latency=no.json"], "no.json: No such file or directory"),
        (["out-base", "--latency=text"], "text: not what bench.py writes: Expecting value: line 1 column 1 (char 0)"),
        (
            ["out-base", "--latency=old.json"],
            "old.json: not what bench.py decode writes now: 'model' is missing; measure again",
        ),
        (["out-base", "--accelerator=h200"], "--accelerator goes with --link"),
        (["out-base", "--csv=x.png", "--png=./x.png"], "--csv and --png are one file: x.png"),
        (["out-base", "--csv=out-base/log.txt"], "out-base/log.txt is read: choose another file to write"),
        (["out-base", "--latency=old.json", "--csv=old.json"], "old.json is read: choose another file to write"),
        (["out-base", "--latency="], "--latency is empty: it must name a file"),
        (["out-base", "--latency=a", "--link=nvlink"], "times are either measured, --latency, or predicted, --link"),
        (["out-base", "--batch_size=2"], "--batch_size goes with --latency or --link"),
        (["out-base", "--tp_size=2"], "--tp_size goes with --latency or --link"),
        (["out-base", "--link=nvlink"], "--link goes with --tp_size"),
    ],
    ids=str,
)
def test_mistakes_end_with_one_line(tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("not a log\n")
    old = {"tp_size": 2, "batch_size": 1, "prompt": 128, "patterns": [{"variant": "baseline", "tpot_s": 0.1}]}
    (tmp_path / "old.json").write_text(json.dumps({"results": [old]}))
    if arguments[:1] == ["out-base"]:
        make(tmp_path, "out-base", "2" * 12, [4.0])
    assert status(compare.main, arguments) == 1
    assert capsys.readouterr().err == f"error: {line}\n"
