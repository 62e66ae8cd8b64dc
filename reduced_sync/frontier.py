"""Loss against time: the time per token of arms, measured or predicted, and which of them no other one beats.

A setting, in which a token takes that time, is text: `tp_size 2, batch 1, prompt 128` or `PREDICTED, link nvlink, ...`.
Standard TP computes the same however it is cut, so a dense arm is timed at any n_shard and number of heads.
"""

import json
import math
from pathlib import Path

from reduced_sync.accelerators import NAMED
from reduced_sync.links import LINKS
from reduced_sync.runs import Arm, comparable


def add_measured(arms: list[Arm], path: str | Path, tp_size: int | None, batch_size: int | None) -> None:
    """Give the arms the times that `bench.py decode --json=PATH` measured, a setting for each prompt and added delay.

    Of several tp_size the largest is taken, and of several batch sizes the smallest, unless they are given. Raises
    OSError, and ValueError where the file has no such case, or none of the arms is in it.
    """
    try:
        cases = json.loads(Path(path).read_text(encoding="utf-8"))["results"]
        sizes = {(case["tp_size"], case["batch_size"]) for case in cases}
        allowed = [(n, B) for n, B in sizes if tp_size in (None, n) and batch_size in (None, B)]
        if not allowed:
            there = ", ".join(f"{n} with {B}" for n, B in sorted(sizes))
            raise ValueError(f"{path}: no case of this tp_size and batch; there are tp_size {there or 'none'}")
        tp_size, batch_size = max(allowed, key=lambda size: (size[0], -size[1]))
        chosen = [case for case in cases if (case["tp_size"], case["batch_size"]) == (tp_size, batch_size)]
        for case in chosen:
            setting = f"tp_size {tp_size}, batch {batch_size}, prompt {case['prompt']}"
            if delay := case.get("added_delay_s"):
                setting += f", {1e6 * delay:g} us added"
            for arm in arms:
                times = [row["tpot_s"] for row in case["patterns"] if _is_of(row["model"], arm)]
                if times:
                    arm.tpots[setting] = times[0]
    except KeyError as error:
        raise ValueError(f"{path}: not what bench.py decode writes now: {error} is missing; measure again") from None
    except (TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not what bench.py decode writes: {error}") from None
    if not settings_of(arms):
        raise ValueError(f"{path}: none of the runs' models was measured at tp_size {tp_size}, batch {batch_size}")


def _is_of(model, arm):
    """Whether a row's `model`, the keys that make it up, is the arm's."""
    n_kv_head = arm.block["n_kv_head"] or arm.n_head
    own = {"n_layer": arm.n_layer, "n_embd": arm.n_embd, "sync_pattern": arm.pattern} | arm.block
    del own["n_kv_head"]
    if arm.block["n_hidden"] == 0:  # the rule's, which a row has worked out
        del own["n_hidden"]
    if not arm.all_synced:
        own |= {"n_shard": arm.n_shard, "n_head": arm.n_head}
    sharing = model["n_head"] * n_kv_head == model["n_kv_head"] * arm.n_head
    return sharing and all(model[key] == value for key, value in own.items())


def add_predicted(arms: list[Arm], link: str, accelerator: str, tp_size: int, batch_size: int) -> None:
    """Give the arms that tp_size ranks can hold the times that latency.py predicts: bfloat16, behind a full context.

    Raises ValueError where none of them can be held.
    """
    from reduced_sync.latency import forward_seconds  # here: they load torch, and compare.py starts without it
    from reduced_sync_model import GPTConfig

    setting = f"PREDICTED, link {link}, {accelerator}, tp_size {tp_size}, batch {batch_size}"
    for arm in arms:
        if (arm.n_head if arm.all_synced else arm.n_shard) % tp_size == 0:
            head = arm.n_params / arm.n_embd - 12 * arm.n_layer * arm.n_embd  # what the blocks do not hold
            model = GPTConfig(
                vocab_size=max(1, round(head)),
                n_layer=arm.n_layer,
                n_head=arm.n_head,
                n_embd=arm.n_embd,
                n_shard=arm.n_shard,
                sync_pattern=arm.pattern,
                **arm.block,
            )
            case = (tp_size, batch_size, 1, arm.settings["block_size"])
            arm.tpots[setting] = forward_seconds(model, NAMED[accelerator], LINKS[link], *case, itemsize=2)
    if not settings_of(arms):
        raise ValueError(f"tp_size={tp_size} divides the n_shard of none of the runs")


def settings_of(arms: list[Arm]) -> dict[str, str]:
    """{setting: the heading of a column of its times, in ms}, of those in which some of the arms have a time."""
    settings = list(dict.fromkeys(setting for arm in arms for setting in arm.tpots))
    common = set.intersection(*(set(setting.split(", ")) for setting in settings)) if settings else set()
    common.discard("PREDICTED")
    return {one: ", ".join(["ms/token", *(p for p in one.split(", ") if p not in common)]) for one in settings}


def on_frontier(arm: Arm, arms: list[Arm], setting: str) -> bool | None:
    """Whether no arm of its size has a loss and a time that are both as low, and one of them lower.

    None where it has no time, or has not finished.
    """
    own = _loss_and_time(arm, setting)
    if own is None:
        return None
    others = [other for other in arms if other.scale == arm.scale and comparable(other, arm)]
    places = [place for other in others if (place := _loss_and_time(other, setting)) is not None]
    return not any(place != own and place[0] <= own[0] and place[1] <= own[1] for place in places)


def _loss_and_time(arm, setting):
    """The arm's place in the figure, or None where it has none, yet."""
    if setting not in arm.tpots or not arm.finished or not math.isfinite(arm.losses[arm.step]):
        return None
    return arm.losses[arm.step], arm.tpots[setting]
