"""The training script's log.txt: the one place that writes it and the one place that parses it.

A log opens with a header of `# key: value` lines that describes the run; `# config:` is JSON. Then come lines of two
fixed forms that grep finds:

    step 20000: train loss 3.2711, val loss 3.2833
    iter 19990: loss 3.2690, time 131.20ms, tok/s 3746000, mfu 41.20%, grad norm 0.4213

`step N` is an evaluation of the weights after N updates; `iter N` is update number N, counted from 0. An update that
was skipped, as its loss or gradient was not finite, always has its line, which ends in the number of them so far:
`, skipped 1`. A resumed run adds a header of its own, so a log may hold several. Settings that changed since the
checkpoint are listed: `# changed since step 500: learning_rate 0.001 -> 0.002`.
"""

import errno
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from reduced_sync.files import replace_file
from reduced_sync.old_keys import translate_old_keys

NUMBER = r"(-?\d+\.?\d*(?:e[+-]?\d+)?|nan|-?inf)"
STEP = re.compile(rf"step (\d+): train loss {NUMBER}, val loss {NUMBER}$")
ITER = re.compile(
    rf"iter (\d+): loss {NUMBER}, time {NUMBER}ms, tok/s (\d+)(?:, mfu {NUMBER}%)?, grad norm {NUMBER}"
    r"(, skipped \d+)?$"
)
# keys of a config that say which model it is, and keys, also of older runs, that do not change what it learns
ARCHITECTURE = "sync n_shard n_layer n_head n_embd norm position mlp n_hidden n_kv_head".split()
WITHOUT_EFFECT = """out_dir eval_interval log_interval eval_only always_save_checkpoint checkpoint_interval
checkpoint_minutes init_from wandb_log wandb_project wandb_run_name tp_size backend device compile timeout_s
max_bad_steps""".split()


class RunLog:
    """Appends to one log.txt, a line at once. Only rank 0 makes one. Raises OSError where a line cannot be written."""

    def __init__(self, path):
        self.file = open(path, "a+b", buffering=0)  # what cannot be written must not wait in a buffer
        self.file.seek(0)
        self.file.truncate(self.file.read().rfind(b"\n") + 1)  # a line that a full disk has cut short

    def line(self, text: str) -> None:
        """Append a line, at once: one, whatever the names in it."""
        data = (" ".join(text.splitlines()) + "\n").encode(errors="backslashreplace")
        if self.file.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.file.name)

    def header(self, facts: dict) -> None:
        """Write the dict `facts` as `# key: value` lines; a dict value is written as JSON on one line."""
        for key, value in facts.items():
            self.line(f"# {key}: {json.dumps(value) if isinstance(value, dict) else value}")

    def sync(self) -> None:
        """Wait until its lines are on the disk: a checkpoint must not outlive those of its evaluation."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def step_line(step: int, train_loss: float, val_loss: float) -> str:
    """The line of an evaluation; losses in nats per token."""
    return f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}"


def iter_line(
    step: int,
    loss: float,
    seconds: float,
    tokens: int,
    grad_norm: float,
    mfu: float | None = None,
    skipped: int | None = None,
) -> str:
    """The line of one update: `tokens` trained on in `seconds`; `mfu` a fraction, or None where no peak is known.

    `skipped` is the number of updates skipped so far where this is one of them.
    """
    mfu = f", mfu {100 * mfu:.2f}%" if mfu is not None else ""
    speed = f"time {1000 * seconds:.2f}ms, tok/s {tokens / seconds:.0f}"
    end = f", skipped {skipped}" if skipped else ""
    return f"iter {step}: loss {loss:.4f}, {speed}{mfu}, grad norm {grad_norm:.4f}{end}"


@dataclass
class Log:
    """A parsed log.txt."""

    headers: dict = field(default_factory=dict)  # {step it starts at: {key: string, or a dict for `config`}}, in order
    evaluations: list = field(default_factory=list)  # (step, train loss, val loss)
    iterations: list = field(default_factory=list)  # (step, loss, ms, tokens/s, grad norm)
    bad_steps: int = 0  # skipped updates in a row at its end

    @property
    def header(self) -> dict:
        """All headers as one; later ones are right."""
        return {key: value for header in self.headers.values() for key, value in header.items()}


def read_log(path: str | Path) -> Log:
    """Parse a log.txt, also one that is being written: a last line without its newline is left out.

    Raises ValueError where a complete line is none of the forms above, and OSError where the file cannot be read.
    """
    log = Log()
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                break
            line = line.rstrip("\n")
            if line.startswith("# "):
                key, _, value = line[2:].partition(": ")
                resumed = re.fullmatch(r"resumed at step (\d+)", key)
                if resumed or not log.headers:
                    start = int(resumed[1]) if resumed else 0
                    # what an earlier resume did from there on was not saved
                    log.headers = {step: header for step, header in log.headers.items() if step < start}
                    log.headers[start] = {}
                try:
                    log.headers[start][key] = json.loads(value) if key == "config" else value
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}:{number}: the header's config is not JSON: {error}") from None
                if key == "config":
                    if not isinstance(log.headers[start][key], dict):
                        raise ValueError(f"{path}:{number}: the header's config is no object: {value[:60]}")
                    log.headers[start][key] = translate_old_keys(log.headers[start][key])
            elif match := STEP.match(line):
                log.evaluations.append((int(match[1]), float(match[2]), float(match[3])))
            elif match := ITER.match(line):
                step, loss, ms, tokens, _mfu, norm, skipped = match.groups()
                goes_on = log.iterations and log.iterations[-1][0] == int(step) - 1
                log.bad_steps = (log.bad_steps * bool(goes_on) + 1) if skipped else 0
                log.iterations.append((int(step), float(loss), float(ms), int(tokens), float(norm)))
            elif line:
                raise ValueError(f"{path}:{number}: not a line of a log: {line[:60]!r}")
    return log


def training_settings(config: dict) -> dict:
    """What of a config (a dict, as in a header) decides what a model learns and what its losses are measured on.

    The same sequences per step are the same step, however many of them make a micro-step. The data is a matter of its
    content, not in here.
    """
    result = {key: value for key, value in config.items() if key not in (*ARCHITECTURE, *WITHOUT_EFFECT, "dataset")}
    micro_steps, batches = result.pop("gradient_accumulation_steps"), result.pop("eval_iters")
    batch_size, block_size = result.pop("batch_size"), result["block_size"]
    result["tokens a step"] = micro_steps * batch_size * block_size
    windows = f"{batches * batch_size} windows" if batches else "all windows"
    result["evaluation"] = f"{windows} of {block_size} tokens"
    if result.get("lr_decay_iters") == result["max_iters"]:
        result["lr_decay_iters"] = None  # the default's meaning
    if result.get("dtype") is None:
        result.pop("dtype", None)  # left to the device
    return result


def changes(before: dict, after: dict) -> str:
    """The settings in which config `after` differs from `before`, as text; a key that only one of them has is unknown.

    `learning_rate 0.001 -> 0.002, dropout 0.0 -> 0.1`
    """
    old, new = training_settings(before), training_settings(after)
    return ", ".join(f"{key} {old[key]} -> {new[key]}" for key in old if key in new and old[key] != new[key])


def drop_lines_after(path: str | Path, step: int, evaluated: int) -> None:
    """Cut from the log at `path` what was written after the checkpoint of `step`, which the resumed run writes again.

    Kept: headers, updates before `step`, evaluations up to `evaluated`, the last one that the checkpoint knows of. The
    file is replaced whole or not at all.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line for line in file if line.endswith("\n")]
    kept = [
        line
        for line in lines
        if not ((match := STEP.match(line)) and int(match[1]) > evaluated)
        and not ((match := ITER.match(line)) and int(match[1]) >= step)
    ]
    replace_file(path, lambda file: file.write("".join(kept).encode()))
