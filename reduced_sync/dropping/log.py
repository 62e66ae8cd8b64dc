"""The lines that drop_syncs.py adds to its log.txt, and their parser.

    perplexity distilled: 32 of 60 syncs, manual 25.101, shakespeare 41.203
    sensitivity: attention 3 0.0123, perplexity 24.61
    sensitivity: MLP 3 0.0123, perplexity 24.61
    agreement manual: KL 0.0312, top-1 92.31 %, greedy 41.2 of 64
    distil: 251.3 s, 131072 tokens

The header is that of train/log.py: lines of `# key: value`. Other lines are for readers: the pattern, warnings, the
losses of a stage. The name of a text that is no plain word is a JSON string.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

WORD = re.compile(r"[\w./+@=-]+")
VALUE = re.compile(r'("(?:[^"\\]|\\.)*"|[^"].*?) (\d+\.\d+|nan|inf)(?:, |$)')
PERPLEXITY = re.compile(r"perplexity (.+?): (\d+) of (\d+) syncs, (.+)$")
SENSITIVITY = re.compile(r"sensitivity: (attention|block|MLP) (\d+) (\S+), perplexity (\S+)$")
TOKENS = re.compile(r"(\w+): \d+\.\d s, (\d+) tokens$")
AGREEMENT = re.compile(r'agreement ("(?:[^"\\]|\\.)*"|\S+): (KL \S+, top-1 \S+ %, greedy \S+ of \d+)$')


def quoted(name: str) -> str:
    """The name of a text as a line has it."""
    return name if WORD.fullmatch(name) else json.dumps(name)


def perplexity_line(stage: str, syncs: int, most: int, perplexities: dict[str, float]) -> str:
    """The perplexity of every evaluation text after a stage, with so many of `most` syncs."""
    values = ", ".join(f"{quoted(name)} {value:.3f}" for name, value in perplexities.items())
    return f"perplexity {stage}: {syncs} of {most} syncs, {values}"


def sensitivity_line(sublayer: str, layer: int, sensitivity: float, perplexity: float) -> str:
    """s of the sync after a layer's `attention` or `MLP`, and the perplexity with it and all behind it dropped."""
    return f"sensitivity: {sublayer} {layer} {sensitivity:.6g}, perplexity {perplexity:.6g}"


def agreement_line(name: str, divergence: float, same: float, length: float, most: int) -> str:
    """How near the model comes to the dense one on a text: quality.py's numbers."""
    return f"agreement {quoted(name)}: KL {divergence:.4f}, top-1 {100 * same:.2f} %, greedy {length:.1f} of {most}"


@dataclass
class DropLog:
    """A parsed log.txt of drop_syncs.py."""

    config: dict = field(default_factory=dict)
    perplexities: list = field(default_factory=list)  # (stage, syncs, most syncs, {text: perplexity}), in order
    sensitivities: dict = field(default_factory=dict)  # {attention or MLP: [(layer, s, perplexity)]}, in order
    agreements: dict = field(default_factory=dict)  # {text: what its line says}
    tokens: dict = field(default_factory=dict)  # {stage that has ended: how many it used}


def read_drop_log(path: str | Path) -> DropLog:
    """The log at `path`; a last line without its newline is left out. Raises OSError, ValueError for a damaged line."""
    log = DropLog()
    with open(path, encoding="utf-8") as file:
        lines = file.read().split("\n")[:-1]
    for line in lines:
        try:
            _read_line(log, line)
        except ValueError:
            raise ValueError(f"{path}: not a line of drop_syncs.py's log: {line[:60]!r}") from None
    return log


def _read_line(log, line):
    """Add what a line says to the log. A run that was killed has said the last ones twice."""
    if line.startswith("# config: "):
        log.config = json.loads(line.removeprefix("# config: "))
    elif match := PERPLEXITY.match(line):
        if VALUE.sub("", match[4]):
            raise ValueError
        values = VALUE.findall(match[4])
        perplexities = {json.loads(n) if n[0] == '"' else n: float(value) for n, value in values}
        entry = (match[1], int(match[2]), int(match[3]), perplexities)
        log.perplexities = [old for old in log.perplexities if old[:2] != entry[:2]] + [entry]
    elif match := SENSITIVITY.match(line):
        sublayer = match[1].replace("block", "attention")  # as older logs call it
        measured = log.sensitivities.setdefault(sublayer, [])
        entry = (int(match[2]), float(match[3]), float(match[4]))
        measured[:] = [old for old in measured if old[0] != entry[0]] + [entry]
    elif match := TOKENS.match(line):
        log.tokens[match[1]] = int(match[2])
    elif match := AGREEMENT.match(line):
        log.agreements[json.loads(match[1]) if match[1][0] == '"' else match[1]] = match[2]


def beside_dense(perplexity: float, dense: float) -> str:
    """`27.23 (+11.5 %)`: a perplexity, and how far it lies above that of all syncs."""
    return f"{perplexity:.2f} ({100 * (perplexity / dense - 1):+.1f} %)"


def table_cell(text: object) -> str:
    """What a user has named, as it may stand in a table in Markdown."""
    return " ".join(str(text).split()).replace("|", "\\|")


def table_of(logs: dict[str, DropLog]) -> str:
    """The perplexities of runs by name as a table in Markdown: after each stage, and in percent above all syncs.

    The first line is that of all syncs; a run's own follows where it is another one. A run's last line has its
    agreement with the dense model, where that was measured. Texts that the first run does not have are left out. Raises
    ValueError for a run without perplexities.
    """
    lines, texts, above = [], None, None
    for name, log in logs.items():
        if not log.perplexities:
            raise ValueError(f"{name}: its log has no perplexity, yet")
        dense = log.perplexities[0][3]
        if texts is None:
            texts = list(dense)
            head = ["run", "after", "syncs", *map(table_cell, texts)]
            lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for stage, syncs, most, perplexities in log.perplexities[dense == above :]:
            cells = [beside_dense(perplexities[text], dense[text]) if text in perplexities else "" for text in texts]
            lines.append(f"| {table_cell(name)} | {stage} | {syncs} of {most} | {' | '.join(cells)} |")
        if log.agreements:
            cells = [log.agreements.get(text, "") for text in texts]
            lines.append(f"| {table_cell(name)} | against dense | {syncs} of {most} | {' | '.join(cells)} |")
        above = dense
    return "\n".join(lines)
