"""Arms side by side: the table, the warnings, the verdict, and all of it as CSV."""

import csv
import itertools
from pathlib import Path

from reduced_sync.compare.frontier import on_frontier, settings_of
from reduced_sync.compare.runs import (
    LEAST_TOKENS,
    Arm,
    baseline_of,
    by_scale,
    comparable,
    differ,
    gap,
    loss_at_equal_time,
    reference_of,
    same_data,
    too_short,
)

FRONTIER = {True: "yes", False: "dominated", None: "-"}


def table(arms: list[Arm], equal_time: bool = False) -> str:
    """The comparison as text, a line an arm. Columns that only some comparisons need are left out of the others.

    With `equal_time` there is one of the losses when each arm has trained for as long as its baseline did.
    """
    several = max((len(arm.seeds) for arm in arms), default=1) > 1
    columns = {  # heading: (aligned to the left, shown, cell of an arm and its gap)
        "run": (True, True, lambda a, g: a.names[0] + (f" and {len(a.names) - 1} more" if len(a.names) > 1 else "")),
        "sync": (True, True, lambda a, g: a.sync),
        "size": (False, differ(arms, "size"), lambda a, g: a.size),
        "n_shard": (False, True, lambda a, g: str(a.n_shard)),
        "syncs": (False, True, lambda a, g: str(a.syncs)),
        "hidden": (False, any(arm.hidden for arm in arms), lambda a, g: str(a.hidden)),
        "fewer": (False, True, lambda a, g: f"{a.reduction:.1f}%"),
        "parameters": (False, True, lambda a, g: f"{a.n_params / 1e6:.2f}M"),
        "tok/param": (False, True, lambda a, g: f"{a.tokens / a.n_params:.2g}"),
        "lr": (False, differ(arms, "learning_rate"), lambda a, g: f"{a.learning_rate:g}"),
        "dtype": (True, differ(arms, "dtype"), lambda a, g: a.dtype),
        "seeds": (False, several, _seeds_cell),
        "val loss": (False, True, lambda a, g: f"{a.losses[a.step]:.4f}" if a.losses else "-"),
        "sd": (False, several, lambda a, g: f"{a.deviation:.4f}" if a.deviation is not None else ""),
        "gap": (False, True, _gap_cell),
        "+-": (False, several, lambda a, g: f"{g.margin:.2f}%" if g and g.margin is not None else ""),
        "at equal time": (False, equal_time, lambda a, g: _equal_time_cell(a, arms)),
        "step": (False, True, lambda a, g: f"{a.step}" + ("" if a.finished else f" of {a.max_iters}*")),
    }
    settings = settings_of(arms)
    for setting, heading in settings.items():
        columns[heading] = (False, True, lambda a, g, s=setting: f"{1000 * a.tpots[s]:.3f}" if s in a.tpots else "-")
        mark = heading.replace("ms/token", "frontier")
        columns[mark] = (True, True, lambda a, g, s=setting: FRONTIER[on_frontier(a, arms, s)])
    columns = {heading: (left, cell) for heading, (left, shown, cell) in columns.items() if shown}
    gaps = [gap(arm, arms) for arm in arms]
    rows = [list(columns)]
    rows += [[cell(arm, g) for _, cell in columns.values()] for arm, g in zip(arms, gaps, strict=True)]
    lines = [""] * len(rows)
    for (left, _), cells in zip(columns.values(), zip(*rows, strict=True), strict=True):
        width = max(map(len, cells))
        padded = [cell.ljust(width) if left else cell.rjust(width) for cell in cells]
        lines = [f"{line}  {cell}" if line else cell for line, cell in zip(lines, padded, strict=True)]
    lines = [line.rstrip() for line in lines]
    if not all(arm.finished for arm in arms):
        lines.append("* unfinished: its gap is provisional")
    lines += [f"{heading}: {setting.removeprefix('PREDICTED, ')}" for setting, heading in settings.items()]
    return "\n".join(lines)


def _seeds_cell(arm, difference):
    count, started = len(arm.counted), len(arm.seeds)
    return f"{count}" if count == started else f"{count} of {started}"


def _gap_cell(arm, difference):
    if difference is None:
        return "-"
    return f"{difference.percent:+.2f}%" + ("" if difference.final else f" at {difference.step}*")


def _equal_time_cell(arm, arms):
    loss = loss_at_equal_time(arm, arms)
    return "-" if loss is None else f"{loss:.4f}"


def warnings(arms: list[Arm]) -> list[str]:
    """A line for each setting in which runs of one size differ, and for each run that changed some on its way."""
    lines = []
    for group in by_scale(arms):
        for key in dict.fromkeys(key for arm in group for key in arm.settings):
            values = {str(arm.settings[key]) for arm in group if key in arm.settings}
            if len(values) > 1:
                end = ": no gap between them" if key == "evaluation" else ""
                lines.append(f"warning: the runs differ in {key}: {', '.join(sorted(values))}{end}")
        if not all(itertools.starmap(same_data, itertools.combinations(group, 2))):
            names = {
                f"{name} (sha256 {str(train)[:8]}, {str(val)[:8]})" for name, train, val in (a.data for a in group)
            }
            lines.append(f"warning: the runs differ in data: {', '.join(sorted(names))}: no gap between them")
        if len({tuple(sorted(arm.seeds)) for arm in group if len(arm.seeds) == 1}) > 1:
            lines.append("warning: single runs differ in seed")
    lines += [f"warning: {arm.names[0]} was resumed with other settings: {arm.changed}" for arm in arms if arm.changed]
    references = [(arm, baseline_of(arm, arms)) for arm in arms]
    if any(reference is not None and reference.scale != arm.scale for arm, reference in references):
        lines.append("warning: some runs have no baseline of their own size: they are compared with another's")
    settings = settings_of(arms)
    if timeless := [arm.names[0] for arm in arms if settings.keys() - arm.tpots.keys()]:
        lines.append(f"warning: no time per token of {', '.join(timeless)}")
    return lines


def verdict(arms: list[Arm], tolerance: float) -> str:
    """For each size and n_shard a line: the fewest syncs within `tolerance` percent of the baseline, or why not."""
    lines = []
    for scale, n_shard in sorted({(arm.scale, arm.n_shard) for arm in arms}):
        group = [arm for arm in arms if (arm.scale, arm.n_shard) == (scale, n_shard)]
        reference = reference_of(group, arms)
        if reference is not None and all(arm.all_synced and arm.n_layer < reference.n_layer for arm in group):
            continue  # controls only
        size = f"{reference.size}, " if reference is not None and len(by_scale(arms)) > 1 else ""
        lines.append(f"{size}n_shard {n_shard}: {_group_verdict(group, reference, arms, tolerance)}")
    return "\n".join(lines)


def _group_verdict(group, reference, arms, tolerance):
    """The verdict on the arms `group` of one size and n_shard, whose baseline is `reference`."""
    variants = [arm for arm in group if not arm.all_synced and arm.finished]
    gaps = [(arm, difference) for arm in variants if (difference := gap(arm, arms)) is not None]
    if reference is None or (variants and not gaps):
        return f"can't say: {_no_gap_reason(variants or group, arms)}"
    if not reference.finished:
        return f"can't say yet: the baseline {reference.names[0]} has not finished"
    if not variants:
        return "can't say: no variant has finished"
    short = too_short([reference, *(arm for arm, _ in gaps)])
    start = f"{short}, at least {LEAST_TOKENS} are needed. Seen so far, no answer: " if short else ""
    notes = {"unfinished": sum(not arm.finished for arm in group)}
    notes["evaluated on other windows or data"] = len(variants) - len(gaps)
    note = "".join(f" ({count} {why} not counted)" for why, count in notes.items() if count)
    good = [(arm, difference) for arm, difference in gaps if difference.percent <= tolerance]  # nan is not <=
    if not good:
        return f"{start}no variant is within {tolerance:g}% of the baseline{note}"
    best, difference = min(good, key=lambda pair: (pair[0].blocking, pair[1].percent))
    fewer = f"{best.reduction:.1f}% fewer syncs"
    if best.hidden:
        fewer = f"{100 * (1 - best.blocking / (2 * best.n_layer)):.1f}% fewer that block"
    detail = f"{best.sync}, {difference.percent:+.2f}%, {fewer}"
    return f"{start}the fewest syncs within {tolerance:g}% of the baseline: {best.count} ({detail}){note}"


def fastest(arms: list[Arm], tolerance: float) -> str:
    """For each setting and size a line: the arm with the least time per token within `tolerance` percent."""
    groups = by_scale(arms)
    lines = []
    for setting in settings_of(arms):
        for group in groups:
            reference = reference_of(group, arms)
            size = f"{reference.size}, " if reference is not None and len(groups) > 1 else ""
            lines.append(f"{size}{setting}: {_fastest_of(group, setting, arms, tolerance)}")
    return "\n".join(lines)


def _fastest_of(group, setting, arms, tolerance):
    """The verdict on the arms `group` of one size in one setting."""
    gaps = [(arm, difference) for arm in group if setting in arm.tpots and (difference := gap(arm, arms)) is not None]
    gaps = [(arm, difference) for arm, difference in gaps if difference.final]
    if not gaps:
        return "can't say: no run with a time per token has finished and has a baseline that has"
    short = too_short([arm for arm, _ in gaps])
    start = f"{short}, at least {LEAST_TOKENS} are needed. Seen so far, no answer: " if short else ""
    good = [(arm, difference) for arm, difference in gaps if difference.percent <= tolerance]  # nan is not <=
    if not good:
        return f"{start}no run with a time per token is within {tolerance:g}% of the baseline"
    best, difference = min(good, key=lambda pair: (pair[0].tpots[setting], pair[1].percent))
    time, reference = best.tpots[setting], baseline_of(best, arms)
    ratio = "the baseline itself" if best is reference else "its baseline has no time"
    if best is not reference and setting in reference.tpots:
        ratio = f"{reference.tpots[setting] / time:.2f}x as fast as the baseline"
    is_control = best.all_synced and best.n_layer < reference.n_layer
    name = f"control {best.size}" if is_control else f"{best.sync}, n_shard {best.n_shard}"
    detail = f"{name}, {difference.percent:+.2f}%, {best.names[0]}"
    return f"{start}the fastest within {tolerance:g}% of the baseline: {1000 * time:.3f} ms/token, {ratio} ({detail})"


def _no_gap_reason(variants, arms):
    """Why none of the variants has a gap to a baseline."""
    synced = [arm for arm in arms if arm.all_synced]
    if synced and not any(itertools.starmap(comparable, itertools.product(variants, synced))):
        return "evaluated on other windows or data than the baseline"
    return f"{len(synced) or 'no'} baseline{'s' if synced else ''} among the runs, one is needed"


def write_csv(arms: list[Arm], path: str | Path, equal_time: bool = False) -> None:
    """One row an arm, numbers in full, times per token in seconds. Raises OSError."""
    settings = settings_of(arms)
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:  # a name may be no text
        writer = csv.writer(file)
        head = "run sync n_layer n_embd n_shard syncs hidden_syncs reduction_percent parameters tokens "
        head += "learning_rate dtype seeds step max_iters val_loss val_loss_sd gap_percent gap_margin gap_step"
        times = [f"{key} {setting}" for setting in settings for key in ("tpot_s", "on_frontier")]
        writer.writerow([*head.split(), *["val_loss_at_equal_time"] * equal_time, *times])
        for arm in arms:
            difference, a = gap(arm, arms), arm
            end = (difference.percent, difference.margin, difference.step) if difference else ("", "", "")
            start = (a.names[0], a.sync, a.n_layer, a.n_embd, a.n_shard, a.syncs, a.hidden, a.reduction)
            middle = (a.n_params, a.tokens, a.learning_rate, a.dtype, len(a.counted), a.step, a.max_iters)
            equal = [loss_at_equal_time(a, arms)] * equal_time
            times = [value for setting in settings for value in (a.tpots.get(setting), on_frontier(a, arms, setting))]
            writer.writerow((*start, *middle, a.losses.get(a.step, ""), a.deviation, *end, *equal, *times))


def report(arms: list[Arm], tolerance: float, equal_time: bool = False) -> str:
    """The table, warnings and verdicts as text."""
    parts = [table(arms, equal_time), *warnings(arms), verdict(arms, tolerance)]
    return "\n".join([*parts, fastest(arms, tolerance)] if settings_of(arms) else parts)
