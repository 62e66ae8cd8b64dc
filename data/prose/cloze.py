"""Which sentence comes next? Multiple-choice questions on the held-out texts, for EleutherAI's evaluation harness.

    python data/prose/cloze.py                     after prepare.py: writes cloze.jsonl, 726 questions, in a second
    python data/prose/cloze.py --folder DIR        of the texts in DIR, into DIR (default: beside this script)

A question of a paragraph of manual.evaluation.txt or workshop.evaluation.txt: one or two sentences of it, and four
choices, of which one is its next sentence and three are of other paragraphs of that text and about as long. Guessing
gets 25 %. No sentence of a question stands in the text's calibration part. The file is the same each time. cloze.yaml
is the harness's task; README.md has the command.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from reduced_sync.cli import set_up

if __name__ == "__main__":  # before the imports that take seconds: Ctrl-C ends them in silence
    set_up()

import argparse
import json
import random
import re

from reduced_sync import preparing
from reduced_sync.files import replace_file

TEXTS = ("manual", "workshop")  # in Shakespeare's a line is a verse
CONTEXT = 2  # sentences at most
LENGTH = range(40, 301)  # characters of a choice


def held_out_paragraphs(evaluation, calibration):
    """The lines of the text `evaluation` as lists of sentences, but those with a sentence of the text `calibration`."""
    paragraphs = [re.split(r"(?<=[.?!]) +(?=[A-Z])", line) for line in evaluation.splitlines() if line]
    return [sentences for sentences in paragraphs if not any(s in calibration for s in sentences)]


def questions(paragraphs, rng):
    """One question of each paragraph that makes one, a dict: context, choices, and answer, an index of choices."""
    candidates = {s: None for p in paragraphs for s in p[1:] if len(s) in LENGTH and s[-1] in ".?!"}  # a set in order
    cloze = []
    for paragraph in paragraphs:
        places = [i for i in range(1, len(paragraph)) if paragraph[i] in candidates]
        if places:
            i = rng.choice(places)
            right = paragraph[i]
            others = [s for s in candidates if s not in paragraph]
            wrong = sorted(others, key=lambda s: abs(len(s) - len(right)))[:3]
            choices = rng.sample([right, *wrong], len(wrong) + 1)
            context = " ".join(paragraph[max(0, i - CONTEXT) : i])
            cloze.append({"context": context, "choices": choices, "answer": choices.index(right)})
    return cloze


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent, help="default: %(default)s")
    folder = parser.parse_args().folder
    rng, all_questions = random.Random(1337), []
    for name in TEXTS:
        try:
            texts = [(folder / f"{name}.{part}.txt").read_text("utf-8") for part in ("evaluation", "calibration")]
        except OSError as error:
            raise ValueError(f"{error.filename}: {error.strerror}: data/prose/prepare.py writes it") from None
        all_questions += questions(held_out_paragraphs(*texts), rng)
    data = "".join(json.dumps(question) + "\n" for question in all_questions).encode()
    path = folder / "cloze.jsonl"
    try:
        replace_file(path, lambda file: file.write(data))
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None
    print(f"{path}: {len(all_questions)} questions")


if __name__ == "__main__":
    preparing.run(main)
