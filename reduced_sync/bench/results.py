"""What bench.py finds, the JSON that it writes with --json, and the one place that reads that again."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reduced_sync.old_keys import with_rules
from reduced_sync_model import GPTConfig


@dataclass
class Training:
    """What bench.py train says of a candidate; ratios are to the first."""

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
    prefill_bytes: int | None = None
    in_all_reduces_s: float | None = None  # of a decoded token
    bound_s: float | None = None  # the time in which a rank reads its weights and cache once


@dataclass(kw_only=True)
class Variant:
    """Which model a row is about."""

    variant: str = ""
    pattern: str = ""
    syncs: int = 0  # all-reduces of a forward pass
    hidden: int = 0  # those of them in flight while the next sublayer runs
    model: dict | None = None  # the keys of its GPTConfig; old files have none


@dataclass(kw_only=True)
class Row(Variant, Times):
    """A variant in one Case. `model_`: by the cost model; `silent_`: where all-reduces send nothing."""

    model_ttft_s: float | None = None
    model_tpot_s: float | None = None
    silent_ttft_s: float | None = None
    silent_tpot_s: float | None = None
    exposed_s: float | None = None  # of a token: all-reduces that are waited for, and the same of the hidden ones, each
    model_exposed_s: float | None = None
    hidden_exposed_s: float | None = None
    hidden_model_exposed_s: float | None = None
    residual_s: float | None = None  # from the line that fits best
    line_s: float | None = None  # TPOT on the line of what was measured
    exposed_syncs: float | None = None  # the slope of TPOT from the next shorter added delay to this one
    model_exposed_syncs: float | None = None


@dataclass(kw_only=True)
class Case:
    """What bench.py decode measured at one tp_size, batch size, prompt length and added delay."""

    tp_size: int
    batch_size: int
    prompt: int
    patterns: list[Row]
    added_delay_s: float = 0.0
    stream: float | None = None  # bytes/s at which a rank sums its weights
    rival: str = ""
    accelerator: dict | None = None
    link: dict | None = None
    bound_s: float | None = None  # the first variant's
    rival_times: Times | None = None
    compiled: Times | None = None  # the first variant
    compiled_silent: Times | None = None
    fit_compute_s: float | None = None
    fit_all_reduce_s: float | None = None
    compute_s: float | None = None
    all_reduce_s: float | None = None


@dataclass(kw_only=True)
class Prediction(Variant):
    """What bench.py predict says of a variant on a link."""

    link: str
    ttft_s: float
    tpot_s: float
    no_communication_tpot_s: float
    predicted: bool = True


RESULTS = {"train": Training, "decode": Case, "predict": Prediction}
REQUIRED = {"train": ["tokens_per_s", "peak_bytes"], "decode": ["tp_size", "batch_size", "prompt"], "predict": []}
PREFIXES = {"rival_times": "rival_", "compiled": "compiled_", "compiled_silent": "compiled_silent_"}  # of Times in JSON


def describe(config: GPTConfig) -> dict:
    """The keys of a Variant that follow from its config."""
    rule = config.rule
    names = "n_layer n_embd n_head n_shard sync norm position mlp n_hidden n_kv_head head_size vocab_size".split()
    row = {"pattern": rule.pattern, "syncs": rule.syncs, "hidden": rule.hidden}
    return row | {"model": {name: getattr(config, name) for name in names}}


def to_json(result: Any) -> dict:
    """A result as JSON has it: what is None is left out, and Times stand in the Case itself."""
    found = {key: value for key, value in vars(result).items() if value is not None}
    for name, prefix in PREFIXES.items():
        if name in found:
            found |= {prefix + key: value for key, value in to_json(found.pop(name)).items()}
    if "patterns" in found:
        found["patterns"] = [to_json(row) for row in found["patterns"]]
    return found


def _from_json(cls, found):
    """The result of class `cls` that `found` describes."""
    keys = {field.name: found[field.name] for field in dataclasses.fields(cls) if field.name in found}
    if cls is Case:
        for name, prefix in PREFIXES.items():
            if f"{prefix}tpot_s" in found:
                own = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
                keys[name] = _from_json(Times, own)
        keys["patterns"] = [_from_json(Row, row) for row in found["patterns"]]
    return cls(**keys)


def read_results(path: str | Path) -> tuple[dict, list]:
    """(settings, results) that `bench.py --json=PATH` wrote: a list of Training, Case or Prediction.

    Raises OSError, and ValueError where the file has another form, or a time or size in it is impossible.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not what bench.py writes: {error}") from None
    settings, results = (found.get("settings", {}), found.get("results")) if isinstance(found, dict) else ({}, None)
    if not isinstance(settings, dict) or not isinstance(results, list):
        raise ValueError(f"{path}: not what bench.py writes: an object with a list of results")
    command = settings.get("command", "decode")
    if command not in list(RESULTS):
        raise ValueError(f"{path}: not what bench.py writes: its command is {command!r}")
    for i, one in enumerate(results):
        rows = one.get("patterns", None if command == "decode" else []) if isinstance(one, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path}: results[{i}] is not what bench.py writes")
        _check_numbers(f"{path}: results[{i}]", one, REQUIRED[command])
        for j, row in enumerate(rows):
            _check_numbers(f"{path}: results[{i}].patterns[{j}]", row, ["tpot_s"])
    try:
        return settings, [_from_json(RESULTS[command], with_rules(one, settings.get("n_layer"))) for one in results]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not what bench.py writes: {error}") from None


def _check_numbers(place, entry, required):
    """Raise ValueError unless `entry` has the keys that are required, and a possible value for each time and size."""
    for key in dict.fromkeys([*required, *entry]):
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
