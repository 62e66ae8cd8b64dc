"""The gap of another size, from the gaps of several: an extrapolation over the logarithm of the size.

N stands for layers x width squared, which the parameters of the layers are a multiple of. Two forms: constant, the mean
of the two largest sizes, and a straight line in ln N by least squares. Each has a 95 % interval from the noise over
seeds, and their distance says how much the choice of the form matters. The largest size, left out and predicted from
the others, says how well the forms do.
"""

import math
import re

import numpy as np

from reduced_sync.compare.report import judge
from reduced_sync.compare.runs import Arm, gap_of


def predict(arms: list[Arm], size: str) -> str:
    """The predicted gap at `size`, LAYERSxWIDTH, of every way to sync that has verdicts at several sizes, as text.

    Raises ValueError for a text that is no size, and where no arm was compared at several.
    """
    if not (match := re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,6})", size)):
        raise ValueError(f"--predict={size}: a size is LAYERSxWIDTH, like 12x768")
    target, families = math.log(int(match[1]) * int(match[2]) ** 2), {}
    for arm in arms:
        gap, place = gap_of(arm, arms), math.log(arm.n_layer * arm.n_embd**2)
        if not arm.is_standard_tp and judge(arm, gap, arms, tolerance=0) in ("within", "outside", "open"):
            gaps = families.setdefault((arm.sync, arm.n_shard, arm.family, arm.dtype), {})
            if place in gaps:
                raise ValueError(f"--predict: there are several arms of {arm.sync} at {arm.size}: name the runs of one")
            gaps[place] = gap
    families = {key: dict(sorted(gaps.items())) for key, gaps in families.items() if len(gaps) > 1}
    if not families:
        raise ValueError("--predict needs one way to sync with verdicts at two sizes or more")
    lines = [f"EXTRAPOLATED to {size}, gap in percent with 95 % intervals:"]
    for (sync, n_shard, family, dtype), gaps in families.items():
        factor = math.exp(target - max(gaps))
        found = forms(gaps, target)
        cells = [f"{form} {value:+.2f} +- {margin:.2f}" for form, (value, margin) in found.items()]
        cells.append(f"{abs(found['constant'][0] - found['line'][0]):.2f} apart")
        name = " ".join(filter(None, [sync, family, f"n_shard {n_shard}", dtype]))
        lines.append(f"{name}, {len(gaps)} sizes, {factor:.3g} times the largest N: {', '.join(cells)}")
        *smaller, largest = gaps
        if len(smaller) > 1:
            trial = forms({place: gaps[place] for place in smaller}, largest)
            cells = [f"{form} {value:+.2f} +- {margin:.2f}" for form, (value, margin) in trial.items()]
            lines.append(f"    the largest size, left out: {', '.join(cells)}; measured {gaps[largest].percent:+.2f}")
    return "\n".join(lines)


def forms(gaps: dict, target: float) -> dict[str, tuple[float, float]]:
    """{form: (gap in percent at ln N = `target`, half of its 95 % interval)}, of {ln N: Gap} of two sizes or more."""
    places = np.array(list(gaps))
    values, margins = (np.array([getattr(one, name) for one in gaps.values()]) for name in ("percent", "margin"))
    ones = np.ones_like(places)
    weights = {"constant": np.where(places >= np.sort(places)[-2], 0.5, 0.0)}
    weights["line"] = np.array([1.0, target]) @ np.linalg.pinv(np.stack([ones, places], axis=1))
    return {form: (float(w @ values), float(np.sqrt(w**2 @ margins**2))) for form, w in weights.items()}
