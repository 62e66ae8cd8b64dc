"""Arms side by side: the table, the warnings, the verdict, and all of it as CSV."""

import csv
import itertools
from pathlib import Path

from reduced_sync.compare.frontier import conditions_of, on_frontier
from reduced_sync.compare.runs import (
    LEAST_TOKENS,
    Arm,
    Gap,
    baseline_of,
    by_size_class,
    comparable,
    depth_of,
    differ,
    gap_of,
    group_baseline,
    is_control,
    noise,
    same_data,
    too_short_note,
)

FRONTIER = {True: "yes", False: "dominated", None: "-"}
# why an arm has no verdict: the word in its line of the table, and what that means for all
NO_VERDICT = {
    "unfinished": "some runs have not finished",
    "other length": "the baseline has a different max_iters",
    "too short": f"the runs are too short: at least {LEAST_TOKENS} tokens per parameter are needed",
    "not bracketed": "the learning rates are not bracketed",
    "baseline diverged": "a seed of the baseline diverged",
    "other seeds": "the baseline has none of the seeds",
    "one seed": "no two arms share two seeds, so the noise is not known",
}


def judge(arm: Arm, gap: Gap | None, arms: list[Arm], tolerance: float) -> str:
    """The verdict on an arm: `within` the tolerance in percent, `outside`, or `open`; else why there is none.

    By the gap's 95 % interval, which leaves it open where it reaches to both sides. The baseline has none.
    """
    baseline = baseline_of(arm, arms)
    if gap is None or baseline is arm:
        return ""
    for word, holds in {
        "diverged": arm.diverged,
        "baseline diverged": baseline.diverged,
        "unfinished": not (arm.finished and baseline.finished),
        "other length": not gap.final,
        "too short": too_short_note([arm, baseline], baseline),
        "not bracketed": not (arm.bracketed and baseline.bracketed),
        "other seeds": not gap.pairs,
        "one seed": gap.margin is None,
    }.items():
        if holds:
            return word
    if gap.percent + gap.margin <= tolerance:
        return "within"
    return "open" if gap.percent - gap.margin <= tolerance else "outside"


def table(arms: list[Arm], tolerance: float) -> str:
    """The comparison as text, a line per arm. Columns that only some comparisons need are left out of the others."""
    several = max((len(arm.seed_losses) for arm in arms), default=1) > 1
    tuned = max((len(arm.arms_by_rate) for arm in arms), default=1) > 1
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
        "lr": (False, tuned or differ(arms, "learning_rate"), lambda a, g: f"{a.learning_rate:g}"),
        "lr tried": (True, tuned, _rates_cell),
        "dtype": (True, differ(arms, "dtype"), lambda a, g: a.dtype),
        "seeds": (False, several, _seeds_cell),
        "val loss": (False, True, lambda a, g: f"{a.losses[a.step]:.4f}" if a.losses else "-"),
        "sd": (False, several, lambda a, g: f"{a.deviation:.4f}" if a.deviation is not None else ""),
        "gap": (False, True, _gap_cell),
        "95% +-": (False, several, lambda a, g: f"{g.margin:.2f}%" if g and g.margin is not None else ""),
        "verdict": (True, True, lambda a, g: _verdict_cell(judge(a, g, arms, tolerance), g, tolerance)),
        "step": (False, True, lambda a, g: f"{a.step}" + ("" if a.finished else f" of {a.max_iters}*")),
    }
    conditions = conditions_of(arms)
    for condition, heading in conditions.items():
        columns[heading] = (False, True, lambda a, g, s=condition: f"{1000 * a.tpots[s]:.3f}" if s in a.tpots else "-")
        mark = heading.replace("ms/token", "frontier")
        columns[mark] = (True, True, lambda a, g, s=condition: FRONTIER[on_frontier(a, arms, s)])
    columns = {heading: (left, cell) for heading, (left, shown, cell) in columns.items() if shown}
    gaps = [gap_of(arm, arms) for arm in arms]
    rows = [list(columns)]
    rows += [[cell(arm, g) for _, cell in columns.values()] for arm, g in zip(arms, gaps, strict=True)]
    lines = [""] * len(rows)
    for (left, _), cells in zip(columns.values(), zip(*rows, strict=True), strict=True):
        width = max(map(len, cells))
        padded = [cell.ljust(width) if left else cell.rjust(width) for cell in cells]
        lines = [f"{line}  {cell}" if line else cell for line, cell in zip(lines, padded, strict=True)]
    lines = [line.rstrip() for line in lines]
    if not all(arm.finished for arm in arms) or any(gap is not None and not gap.final for gap in gaps):
        lines.append("* before the last step of the run or of its baseline: its gap is provisional")
    lines += [f"{heading}: {condition.removeprefix('PREDICTED, ')}" for condition, heading in conditions.items()]
    return "\n".join(lines)


def _rates_cell(arm, gap):
    least, most = arm.arms_by_rate[0].learning_rate, arm.arms_by_rate[-1].learning_rate
    return f"{least:g} to {most:g}" if least < most else ""


def _verdict_cell(verdict, gap, tolerance):
    if verdict != "open":
        return verdict or "-"
    needed = gap.seeds_needed(tolerance)
    return f"open: {needed} seeds" if needed else "open: over 100 seeds"


def _seeds_cell(arm, gap):
    count, started = len(arm.counted_losses), len(arm.seed_losses)
    paired = f" ({gap.pairs} paired)" if gap is not None and gap.pairs < count else ""
    return (f"{count}" if count == started else f"{count} of {started}") + paired


def _gap_cell(arm, gap):
    if gap is None:
        return "-"
    return f"{gap.percent:+.2f}%" + ("" if gap.final else f" at {gap.step}*")


def warnings(arms: list[Arm]) -> list[str]:
    """A line for each setting in which runs of one size differ, and for each run that changed some on its way."""
    lines = []
    for group in by_size_class(arms):
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
        if len({tuple(sorted(arm.seed_losses)) for arm in group if len(arm.seed_losses) == 1}) > 1:
            lines.append("warning: single runs differ in seed")
        if any(arm.tpots for arm in group) and noise(group)[0] is None:
            size = (group_baseline(group, arms) or group[0]).size
            lines.append(f"warning: the frontier at {size} goes by losses alone, as the noise is not known")
    lines += [f"warning: {arm.names[0]} was resumed with other settings: {arm.changed}" for arm in arms if arm.changed]
    conditions = conditions_of(arms)
    if timeless := [arm.names[0] for arm in arms if conditions.keys() - arm.tpots.keys()]:
        lines.append(f"warning: no time per token of {', '.join(timeless)}")
    return lines


def verdict(arms: list[Arm], tolerance: float) -> str:
    """For each size and n_shard a line: the fewest syncs within `tolerance` percent of the baseline, or why not."""
    lines = []
    for size_class, n_shard in sorted({(arm.size_class, arm.n_shard) for arm in arms}):
        group = [arm for arm in arms if (arm.size_class, arm.n_shard) == (size_class, n_shard)]
        baseline = group_baseline(group, arms)
        if baseline is not None and all(is_control(arm, baseline) for arm in group):
            continue  # controls only
        size = f"{(baseline or group[0]).size}, " if len(by_size_class(arms)) > 1 else ""
        lines.append(f"{size}n_shard {n_shard}: {_group_verdict(group, baseline, arms, tolerance)}")
    return "\n".join(lines)


def _group_verdict(group, baseline, arms, tolerance):
    """The verdict on the arms `group` of one size and n_shard, given their baseline."""
    variants = [arm for arm in group if not arm.is_standard_tp and arm.finished]
    gaps = [(arm, gap) for arm in variants if (gap := gap_of(arm, arms)) is not None]
    if baseline is None or (variants and not gaps):
        return f"can't say: {_no_gap_reason(variants or group, arms)}"
    if not baseline.finished:
        return f"can't say yet: the baseline {baseline.names[0]} has not finished"
    if not variants:
        return "can't say: no variant has finished"
    good, start, verdicts = _accepted(gaps, arms, tolerance)
    best, gap = min(good, key=lambda pair: (pair[0].blocking, pair[1].percent), default=(None, None))
    notes = {"unfinished": sum(not arm.finished for arm in group)}
    notes["evaluated on other windows or data"] = len(variants) - len(gaps)
    better = [best is None or arm.blocking < best.blocking for arm, _ in gaps]
    note = _rest_note(notes, gaps, verdicts, better, start, tolerance)
    if best is None:
        known = "known to be " if note or "other length" in verdicts else ""
        return f"{start}no variant is {known}within {tolerance:g}% of the baseline{note}"
    count, fewer = best.syncs, f"{best.reduction:.1f}% fewer syncs"
    if best.hidden:
        count = f"{best.blocking} and {best.hidden} hidden"
        fewer = f"{100 * (1 - best.blocking / (2 * best.n_layer)):.1f}% fewer that block"
    detail = f"{best.sync}, {gap.percent:+.2f}%, {fewer}"
    return f"{start}the fewest syncs within {tolerance:g}% of the baseline: {count} ({detail}){note}"


def _accepted(gaps, arms, tolerance):
    """(those of the pairs of arm and Gap that are within the tolerance, how a sentence on them begins, all verdicts).

    Where no variant has a verdict, they are those whose gap itself is, and it begins with why that is no answer.
    """
    verdicts = [judge(arm, gap, arms, tolerance) for arm, gap in gaps]
    reasons = [text for word, text in NO_VERDICT.items() if word in verdicts]
    if {"within", "outside", "open"} & set(verdicts):
        reasons = []
    good = [
        (arm, gap)
        for (arm, gap), verdict in zip(gaps, verdicts, strict=True)
        if verdict == "within"
        or (reasons and verdict in NO_VERDICT and gap.final and gap.percent <= tolerance)  # nan is not <=
        or (baseline_of(arm, arms) is arm and tolerance >= 0)
    ]
    return good, f"no verdict, because {'; '.join(reasons)}. So far: " if reasons else "", verdicts


def _name_of(arm, arms):
    """An arm in a sentence on several."""
    if is_control(arm, baseline_of(arm, arms)):
        return f"control {arm.size}"
    return f"{arm.sync}, n_shard {arm.n_shard}" if differ(arms, "n_shard") else arm.sync


def _rest_note(notes, gaps, verdicts, better, start, tolerance):
    """What a verdict ends with: how many arms do not count and why, and which of the `better` ones are open."""
    words = ["diverged", *(() if start else NO_VERDICT)]
    notes = {word: verdicts.count(word) for word in words} | notes
    arms = [arm for arm, _ in gaps]
    note = ", ".join(f"{count} {why}" for why, count in notes.items() if count)
    note = f" (not counted: {note})" if note else ""
    for (arm, gap), word, is_better in zip(gaps, verdicts, better, strict=True):
        if word == "open" and is_better:
            seeds = _verdict_cell(word, gap, tolerance).removeprefix("open: ")
            gap_text = f"{_name_of(arm, arms)} ({gap.percent:+.2f}%)"
            note += f"; {gap_text} is too close to {tolerance:g}% to call: {seeds} would settle it"
    return note


def fastest(arms: list[Arm], tolerance: float) -> str:
    """For each condition and size a line: the arm with the least time per token within `tolerance` percent."""
    groups = by_size_class(arms)
    lines = []
    for condition in conditions_of(arms):
        for group in groups:
            baseline = group_baseline(group, arms)
            size = f"{(baseline or group[0]).size}, " if len(groups) > 1 else ""
            lines.append(f"{size}{condition}: {_fastest_of(group, condition, arms, tolerance)}")
    return "\n".join(lines)


def _fastest_of(group, condition, arms, tolerance):
    """The verdict on the arms `group` of one size in one condition."""
    gaps = [(arm, gap) for arm in group if condition in arm.tpots and (gap := gap_of(arm, arms)) is not None]
    gaps = [(arm, gap) for arm, gap in gaps if gap.final]
    if not gaps:
        return "can't say: no finished run has both a time per token and a finished baseline of its length"
    good, start, verdicts = _accepted(gaps, arms, tolerance)
    best, gap = min(good, key=lambda pair: (pair[0].tpots[condition], pair[1].percent), default=(None, None))
    better = [best is None or arm.tpots[condition] < best.tpots[condition] for arm, _ in gaps]
    note = _rest_note({}, gaps, verdicts, better, start, tolerance)
    if best is None:
        return f"{start}no run with a time per token is within {tolerance:g}% of the baseline{note}"
    time, baseline = best.tpots[condition], baseline_of(best, arms)
    ratio = "the baseline itself" if best is baseline else "its baseline has no time"
    if best is not baseline and condition in baseline.tpots:
        ratio = f"{baseline.tpots[condition] / time:.2f}x as fast as the baseline"
    detail = f"{_name_of(best, arms)}, {gap.percent:+.2f}%, {best.names[0]}"
    found = f"{1000 * time:.3f} ms/token, {ratio} ({detail}){note}"
    return f"{start}the fastest within {tolerance:g}% of the baseline: {found}"


def _no_gap_reason(variants, arms):
    """Why none of the variants has a gap to a baseline."""
    group = [arm for arm in arms if arm.size_class == variants[0].size_class]
    synced = [arm for arm in group if arm.is_standard_tp]
    if synced and not any(itertools.starmap(comparable, itertools.product(variants, synced))):
        return "evaluated on other windows or data than the baseline"
    depth = depth_of(group)
    count = sum(arm.n_layer == depth for arm in synced)
    return f"found {count or 'no'} baseline{'s' if count > 1 else ''} of {depth} layers; exactly one is needed"


def write_csv(arms: list[Arm], path: str | Path, tolerance: float) -> None:
    """One row an arm, numbers in full, times per token in seconds. Raises OSError."""
    conditions, rows = conditions_of(arms), []
    for a in arms:
        gap = gap_of(a, arms)
        row = dict(run=a.names[0], sync=a.sync, n_layer=a.n_layer, n_embd=a.n_embd, n_shard=a.n_shard, syncs=a.syncs)
        row |= dict(hidden_syncs=a.hidden, reduction_percent=a.reduction, parameters=a.n_params, tokens=a.tokens)
        row |= dict(learning_rate=a.learning_rate, bracketed=a.bracketed, dtype=a.dtype, seeds=len(a.counted_losses))
        row |= dict(step=a.step, max_iters=a.max_iters, val_loss=a.losses.get(a.step), val_loss_sd=a.deviation)
        row |= {f"gap_{key}": getattr(gap, key, None) for key in ("percent", "margin", "pairs", "step")}
        row |= dict(verdict=judge(a, gap, arms, tolerance))
        for one in conditions:
            row |= {f"tpot_s {one}": a.tpots.get(one), f"on_frontier {one}": on_frontier(a, arms, one)}
        rows.append(row)
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:  # a name may be no text
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def report(arms: list[Arm], tolerance: float) -> str:
    """The table, warnings and verdicts as text."""
    parts = [table(arms, tolerance), *warnings(arms), verdict(arms, tolerance)]
    return "\n".join([*parts, fastest(arms, tolerance)] if conditions_of(arms) else parts)
