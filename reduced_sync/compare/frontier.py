"""Loss against time: the time per token of arms, measured or predicted, and which of them no other one beats.

The condition under which a token takes that time is text: `tp_size 2, batch 1, prompt 128` or `PREDICTED, link nvlink,
...`. Standard TP computes the same however it is cut, so a dense arm is timed at any n_shard and number of heads.
"""

import dataclasses
import math
from pathlib import Path

import torch

from reduced_sync.bench.cost_model import Forward, forward_seconds
from reduced_sync.bench.results import read_results
from reduced_sync.compare.runs import Arm, comparable, gap_between
from reduced_sync.hardware import GPUS, LINKS
from reduced_sync.train.experiment import model_keys
from reduced_sync_model import GPT, MOST_LAYERS, GPTConfig, SyncRule


def _config_of(arm):
    """The GPTConfig of the arm's runs, as their logs have it.

    An older log does not name the vocabulary: the parameters that the rest of the model leaves for it do. Raises
    ValueError where they cannot.
    """
    try:
        keys = model_keys(arm.config)
        config = GPTConfig(**{"vocab_size": 1} | keys)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{arm.names[0]}: its config is not that of a model: {error}") from None
    if "vocab_size" in keys:
        return config
    with torch.device("meta"):
        others = arm.n_params - GPT(config).get_num_params(non_embedding=False)
    more, rest = divmod(others, config.n_embd if config.tie_embeddings else 2 * config.n_embd)
    if rest or more < 0 or arm.settings.get("init_from", "scratch") != "scratch":  # heads may have another size there
        lines = "'# vocab_size: N' and '# head_size: N'"
        raise ValueError(f"{arm.names[0]}: its log does not say the model's whole shape: add the lines {lines} to it")
    return dataclasses.replace(config, vocab_size=1 + more)


def add_measured(arms: list[Arm], path: str | Path, tp_size: int | None, batch_size: int | None) -> None:
    """Give the arms the times that `bench.py decode --json=PATH` measured, a condition for each prompt and added delay.

    Of several tp_size the largest is taken, and of several batch sizes the smallest, unless they are given. Raises
    OSError, and ValueError where the file has no such case, or none of the arms is in it.
    """
    settings, cases = read_results(path)
    if settings.get("command", "decode") != "decode":
        raise ValueError(f"{path}: written by bench.py {settings['command']}, not by bench.py decode")
    configs, measured = [_config_of(arm) for arm in arms], set()
    try:
        sizes = {(case.tp_size, case.batch_size) for case in cases}
        allowed = [(n, B) for n, B in sizes if tp_size in (None, n) and batch_size in (None, B)]
        if not allowed:
            there = ", ".join(f"{n} with {B}" for n, B in sorted(sizes))
            raise ValueError(f"{path}: no case of this tp_size and batch; there are tp_size {there or 'none'}")
        tp_size, batch_size = max(allowed, key=lambda size: (size[0], -size[1]))
        for case in cases:
            if (case.tp_size, case.batch_size) != (tp_size, batch_size):
                continue
            condition = f"tp_size {tp_size}, batch {batch_size}, prompt {case.prompt}"
            if case.added_delay_s:
                condition += f", {1e6 * case.added_delay_s:g} us added"
            rows = [(row.tpot_s, _model_of(row, settings)) for row in case.rows]
            measured |= {_size(model) for _, model in rows}
            for arm, config in zip(arms, configs, strict=True):
                times = [seconds for seconds, model in rows if _is_of(model, arm, config)]
                if len(times) > 1 or (times and condition in arm.tpots):
                    raise ValueError(f"{path}: several times of {arm.names[0]}'s model for {condition}")
                if times:
                    arm.tpots[condition] = times[0]
    except KeyError as error:
        raise ValueError(f"{path}: not what bench.py decode writes now: {error} is missing; measure again") from None
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: not what bench.py decode writes: {error}") from None
    if not conditions_of(arms):
        line = f"{path}: none of the runs' models was measured at tp_size {tp_size}, batch {batch_size}"
        if not measured & (own := {_size(vars(config)) for config in configs}):
            line += f", but {', '.join(sorted(measured)) or 'nothing'}; the runs have {', '.join(sorted(own))}"
        raise ValueError(line)


def _model_of(row, settings):
    """The keys that make up a row's model. An older file has the vocabulary of all of them in its settings alone."""
    if row.model is None:
        raise KeyError("model")
    model = {"head_size": row.model["n_embd"] // row.model["n_head"]} | row.model
    if type(model["n_layer"]) is not int or not 0 < model["n_layer"] <= MOST_LAYERS:
        raise TypeError(f"n_layer={model['n_layer']!r}")
    model["sync"] = str(SyncRule.parse(model["sync"], model["n_layer"]))
    return model if "vocab_size" in model else model | {"vocab_size": settings["vocab_size"]}


def _size(model):
    """The size of a model, given as a dict of its keys, in words."""
    return f"{model['n_layer']}x{model['n_embd']} with vocab_size {model['vocab_size']}"


def _is_of(model, arm, config):
    """Whether a row's `model`, the keys that make it up, is the arm's, whose GPTConfig is `config`."""
    own = vars(config)
    keys = {"n_layer", "n_embd", "vocab_size", "sync", *arm.block} - {"n_kv_head"}
    if not arm.is_standard_tp:
        keys |= {"n_shard", "n_head"}
    widths = [[one[heads] * one["head_size"] for heads in ("n_head", "n_kv_head")] for one in (model, own)]
    return widths[0] == widths[1] and all(model[key] == own[key] for key in keys)


def add_predicted(arms: list[Arm], link: str, accelerator: str, tp_size: int, batch_size: int) -> None:
    """Give the arms that tp_size ranks can hold the times of the cost model: bfloat16, behind a full context.

    Raises ValueError where none of them can be held.
    """
    condition = f"PREDICTED, link {link}, {accelerator}, tp_size {tp_size}, batch {batch_size}"
    for arm in arms:
        config = _config_of(arm)
        if arm.is_standard_tp:
            try:
                config = dataclasses.replace(config, n_shard=tp_size)  # it computes the same however it is cut
            except ValueError:
                continue
        if config.n_shard % tp_size == 0:
            token = Forward(tp_size, batch_size, 1, config.block_size, itemsize=2)
            arm.tpots[condition] = forward_seconds(config, GPUS[accelerator], LINKS[link], token)
    if not conditions_of(arms):
        raise ValueError(f"tp_size={tp_size} divides the n_shard of none of the runs")


def conditions_of(arms: list[Arm]) -> dict[str, str]:
    """{condition: the heading of a column of its times, in ms}, of those in which some of the arms have a time."""
    conditions = list(dict.fromkeys(condition for arm in arms for condition in arm.tpots))
    common = set.intersection(*(set(condition.split(", ")) for condition in conditions)) if conditions else set()
    common.discard("PREDICTED")
    return {one: ", ".join(["ms/token", *(p for p in one.split(", ") if p not in common)]) for one in conditions}


def on_frontier(arm: Arm, arms: list[Arm], condition: str) -> bool | None:
    """Whether no arm of its size has a loss and a time that are both as low, and one of them lower.

    A loss is lower beyond noise alone, where the noise is known. None where it has no time, or has not finished.
    """
    if not _has_place(arm, condition):
        return None
    for other in arms:
        same_size = other is not arm and other.size_class == arm.size_class
        if not (same_size and comparable(other, arm) and _has_place(other, condition)):
            continue
        gap, seconds = gap_between(arm, other, arms), arm.tpots[condition] - other.tpots[condition]
        # without a seed in common, the noise leaves open which is better
        if gap is None or not gap.final or seconds < 0 or (gap.deviation is not None and not gap.pairs):
            continue
        above = gap.percent - (gap.margin or 0)
        if above > 0 or (above == 0 and seconds > 0):
            return False
    return True


def _has_place(arm, condition):
    """Whether it has one in the figure of loss against time, yet."""
    return condition in arm.tpots and arm.finished and math.isfinite(arm.losses[arm.step])
