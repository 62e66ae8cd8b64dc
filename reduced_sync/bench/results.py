"""What bench.py finds and writes as JSON with --json, and the one place that reads that again."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from reduced_sync.old_keys import translate_old_result
from reduced_sync_model import GPTConfig


@dataclass
class Training:
    """What bench.py train measured of a candidate; ratios are to the first."""

    candidate: str
    tokens_per_s: float
    speed_ratio: float
    rounds_s: list[float]
    peak_bytes: int
    memory_ratio: float


@dataclass(kw_only=True)
class Times:
    """A model that generates: medians over tokens and rounds, of the slowest rank; all-reduces over all ranks."""

    tpot_s: float
    ttft_s: float | None = None
    all_reduces: int | None = None  # that ran in a decode step
    bytes: int | None = None  # of one of those
    in_all_reduces_s: float | None = None  # of a decoded token
    bound_s: float | None = None  # the time in which a rank reads its weights and cache once


@dataclass(kw_only=True)
class Model:
    """Which model a row is about."""

    candidate: str = ""
    pattern: str = ""
    syncs: int = 0  # all-reduces of a forward pass
    hidden: int = 0  # those of them in flight while the next sublayer runs
    model: dict | None = None  # the keys of its GPTConfig; old files have none

    @property
    def count(self) -> str:
        """Its syncs as text; with hidden ones those that block and those, as in 1+23."""
        return f"{self.syncs - self.hidden}+{self.hidden}" if self.hidden else str(self.syncs)


@dataclass(kw_only=True)
class Row(Model, Times):
    """A candidate in one Case. `model_`: by the cost model; `silent_`: where all-reduces send nothing."""

    model_ttft_s: float | None = None
    model_tpot_s: float | None = None
    silent_ttft_s: float | None = None
    silent_tpot_s: float | None = None
    exposed_s: float | None = None  # per token: all-reduces that are waited for, and of the hidden ones the same, each
    model_exposed_s: float | None = None
    hidden_exposed_s: float | None = None
    hidden_model_exposed_s: float | None = None
    line_s: float | None = None  # TPOT on the line of what was measured
    exposed_syncs: float | None = None  # the slope of TPOT from the next shorter added delay to this one
    model_exposed_syncs: float | None = None


@dataclass(kw_only=True)
class Case:
    """What bench.py decode measured at one tp_size, batch size, prompt length and added delay."""

    tp_size: int
    batch_size: int
    prompt: int
    rows: list[Row]
    added_delay_s: float = 0.0
    read_rate: float | None = None  # bytes/s at which a rank sums its weights
    reference: str = ""
    accelerator: dict | None = None
    link: dict | None = None
    bound_s: float | None = None  # the first candidate's
    reference_times: Times | None = None
    compiled: Times | None = None  # the first candidate
    compiled_silent: Times | None = None
    compute_s: float | None = None  # TPOT on the line: compute_s + syncs x all_reduce_s
    all_reduce_s: float | None = None


@dataclass(kw_only=True)
class Prediction(Model):
    """What bench.py predict says of a candidate on a link."""

    link: str
    ttft_s: float
    tpot_s: float
    no_communication_tpot_s: float


RESULTS = {"train": Training, "decode": Case, "predict": Prediction}
REQUIRED = {Training: ["tokens_per_s", "peak_bytes"], Case: ["tp_size", "batch_size", "prompt"], Prediction: []}
REQUIRED |= {Row: ["tpot_s"], Times: ["tpot_s"]}


def describe(config: GPTConfig) -> dict:
    """The keys of a Model that follow from its config."""
    model = {key: value for key, value in dataclasses.asdict(config).items() if key not in ("block_size", "dropout")}
    return {"pattern": config.rule.pattern, "syncs": config.rule.syncs, "hidden": config.rule.hidden, "model": model}


def _from_json(cls, place, entry):
    """The result of class `cls` that `entry` describes, which stands at `place`. Raises ValueError, naming that."""
    if not isinstance(entry, dict):
        raise ValueError(f"{place} is not what bench.py writes")
    keys = {one.name: entry[one.name] for one in dataclasses.fields(cls) if one.name in entry}
    _check_numbers(place, keys, REQUIRED[cls])
    if cls is Case:
        if not isinstance(keys.get("rows"), list):
            raise ValueError(f"{place} is not what bench.py writes")
        keys["rows"] = [_from_json(Row, f"{place}.rows[{j}]", row) for j, row in enumerate(keys["rows"])]
        for name in ("reference_times", "compiled", "compiled_silent"):
            if keys.get(name) is not None:
                keys[name] = _from_json(Times, f"{place}.{name}", keys[name])
    try:
        return cls(**keys)
    except TypeError as error:  # a key is missing
        raise ValueError(f"{place} is not what bench.py writes: {error}") from None


def read_results(path: str | Path) -> tuple[dict, list]:
    """(options, results) that `bench.py --json=PATH` wrote: a list of Training, Case or Prediction.

    Raises OSError, and ValueError where the file has another form, or a time or size in it is impossible.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not what bench.py writes: {error}") from None
    content = content if isinstance(content, dict) else {}
    options, results = content.get("settings", {}), content.get("results")
    if not isinstance(options, dict) or not isinstance(results, list):
        raise ValueError(f"{path}: not what bench.py writes: an object with a list of results")
    command = options.get("command", "decode")
    if command not in list(RESULTS):
        raise ValueError(f"{path}: not what bench.py writes: its command is {command!r}")
    try:
        entries = [translate_old_result(one, options.get("n_layer")) for one in results]
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: not what bench.py writes: {error}") from None
    return options, [_from_json(RESULTS[command], f"{path}: results[{i}]", one) for i, one in enumerate(entries)]


def _check_numbers(place, entry, required):
    """Raise ValueError unless `entry` has the keys that are required, and a possible value for each time and size."""
    for key in dict.fromkeys([*required, *(key for key, value in entry.items() if value is not None)]):
        if key in ("tp_size", "batch_size", "prompt"):
            kinds, least, wanted = (int,), 1, "a positive integer"
        elif key == "added_delay_s":
            kinds, least, wanted = (int, float), 0, "a number of at least 0"
        elif key.endswith(("ttft_s", "tpot_s", "tokens_per_s", "peak_bytes")):
            kinds, least, wanted = (int, float), 1e-15, "a positive number"
        else:
            continue
        value = entry.get(key)
        if type(value) not in kinds or not least <= value < 1e15:  # nan is not >= either
            raise ValueError(f"{place}.{key} {f'is {value!r}' if key in entry else 'is missing'}, it must be {wanted}")
