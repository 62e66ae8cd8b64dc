"""Runs as their logs tell of them, as Arms: an architecture at one size, at its best learning rate. Baselines and gaps.

Runs that differ in their seed alone are one Arm; of Arms that differ in their learning rate alone the best one stays.
"""

import itertools
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from reduced_sync.train.log import changes, read_log, training_settings
from reduced_sync_model import MOST_LAYERS, SyncRule

LEAST_TOKENS = 10  # a parameter; shorter runs cannot tell variants apart: EXPERIMENT_SUMMARY.md
RATE_KEYS = ("learning_rate", "min_lr / learning_rate")  # the settings that differ between the rates of an arm
REQUIRED_HEADER = "syncs parameters dtype config".split()  # lines that a header must have, and keys of its config
REQUIRED_CONFIG = """sync n_shard n_layer n_head n_embd dataset seed learning_rate min_lr max_iters
gradient_accumulation_steps batch_size block_size eval_iters""".split()
INTEGER_KEYS = "n_shard n_layer n_head n_embd max_iters gradient_accumulation_steps batch_size block_size".split()
# what a log means that lacks them
BLOCK_DEFAULTS = {"norm": "layernorm", "position": "learned", "mlp": "gelu", "n_hidden": 0, "n_kv_head": 0}


@dataclass
class Arm:
    """Runs that differ in their seed alone: the header's facts, and the evaluations.

    What load_runs returns is at its best learning rate, and knows the others.
    """

    names: list
    config: dict  # the header's, and the sizes of the model that the header itself has
    n_params: int
    dtype: str
    settings: dict  # all that should be the same in runs that are compared
    data: tuple  # name, sha256 of train, sha256 of val; None for one that is not known
    changed: str  # settings that changed where the run was resumed
    seed_losses: dict  # {seed: {step: validation loss}}
    gave_up: bool = False  # a seed did, on losses that are not finite
    arms_by_rate: list = field(default_factory=list, repr=False, compare=False)  # the lowest rate first
    size_class: int = 0  # from number_size_classes
    tpots: dict = field(default_factory=dict)  # {condition: seconds per token}, from compare/frontier.py

    def __post_init__(self):
        self.n_shard, self.n_layer, self.n_head, self.n_embd, self.max_iters = (
            self.config[key] for key in ("n_shard", "n_layer", "n_head", "n_embd", "max_iters")
        )
        self.learning_rate = float(self.config["learning_rate"])
        self.block = {key: self.config.get(key, default) for key, default in BLOCK_DEFAULTS.items()}
        self.rule = SyncRule.parse(self.config["sync"], self.n_layer)
        # all-reduces of a forward pass, those of them that are in flight while the next sublayer runs, and the others
        self.syncs, self.hidden = self.rule.syncs, self.rule.hidden
        self.blocking = self.syncs - self.hidden

    @property
    def tokens(self) -> int:
        """Those of the whole run."""
        return self.settings["tokens a step"] * self.max_iters

    @property
    def model(self) -> tuple:
        """What tells its architecture from another one's."""
        return self.rule, self.n_shard, self.n_layer, self.n_head, self.n_embd, *self.block.values()

    @property
    def sync(self) -> str:
        """Its sync rule, as text."""
        return str(self.rule)

    @property
    def size(self) -> str:
        """Layers x width, and the family of blocks unless it is GPT-2's."""
        return f"{self.n_layer}x{self.n_embd} {self.family}".rstrip()

    @property
    def family(self) -> str:
        """Empty for GPT-2's block, `modern` for Llama's, or what a mixture has of that."""
        other = [self.block[key] for key in ("norm", "position", "mlp") if self.block[key] != BLOCK_DEFAULTS[key]]
        return "modern" if len(other) == 3 else " ".join(other)

    @property
    def reduction(self) -> float:
        """Percent fewer syncs than standard TP with as many layers."""
        return 100 * (1 - self.syncs / (2 * self.n_layer))

    @property
    def counted_losses(self) -> dict[int, dict[int, float]]:
        """The losses of the finished seeds, or of all where none has finished."""
        finished = {seed: losses for seed, losses in self.seed_losses.items() if self.max_iters in losses}
        return finished or self.seed_losses

    @property
    def losses(self) -> dict[int, float]:
        """The mean over the seeds that count, at the steps that all of them have evaluated."""
        counted = self.counted_losses.values()
        steps = set.intersection(*map(set, counted))
        return {step: statistics.fmean(losses[step] for losses in counted) for step in sorted(steps)}

    @property
    def step(self) -> int:
        """The last step that all counted seeds have evaluated."""
        return max(self.losses, default=0)

    @property
    def finished(self) -> bool:
        """Whether the counted seeds have evaluated the last step."""
        return self.max_iters in self.losses

    @property
    def diverged(self) -> bool:
        """Whether a seed gave up on losses that are not finite, or ended with one."""
        last = [losses.get(self.max_iters, 0) for losses in self.seed_losses.values()]
        return self.gave_up or not all(map(math.isfinite, last))

    @property
    def last_loss(self) -> float:
        """The loss by which arms are put in order: infinite where there is none, or it is not a number."""
        loss = self.losses.get(self.step, math.inf)
        return math.inf if math.isnan(loss) else loss

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds of the last loss; None for one seed, and where a loss is not finite."""
        last = [losses[self.step] for losses in self.counted_losses.values()] if self.losses else []
        return statistics.stdev(last) if len(last) > 1 and all(map(math.isfinite, last)) else None

    @property
    def bracketed(self) -> bool:
        """Whether a lower and a higher learning rate than its own, each at most twofold away, do no better."""
        ended = {arm.learning_rate: arm.last_losses for arm in self.arms_by_rate if arm.finished or arm.diverged}
        best, inside = best_rate(ended) if ended else (None, False)
        return inside and best == self.learning_rate

    @property
    def last_losses(self) -> dict[int, float]:
        """{seed: last loss} of the finished seeds; infinite for one that diverged."""
        ends = {seed: losses.get(self.max_iters, math.inf) for seed, losses in self.counted_losses.items()}
        return {seed: math.inf if math.isnan(loss) else loss for seed, loss in ends.items()}

    @property
    def is_standard_tp(self) -> bool:
        """Whether it is standard tensor parallelism."""
        return self.sync == "baseline"


@dataclass
class Gap:
    """How far an arm's loss is above the baseline's: 100 ln(loss / baseline), at the last step that both evaluated."""

    percent: float
    step: int
    final: bool  # it is the last step of both
    pairs: int  # seeds that both have
    deviation: float | None  # of one pair, in percent; None where no noise is known
    freedom: int  # its degrees of freedom

    @property
    def margin(self) -> float | None:
        """Half of the 95 % confidence interval; None where no noise is known, and without pairs."""
        return self.margin_with(self.pairs) if self.deviation is not None and self.pairs else None

    def margin_with(self, pairs: int) -> float:
        """What half of the interval would be with this many pairs and the same deviation."""
        from scipy.stats import t

        return float(t.ppf(0.975, self.freedom + pairs - self.pairs)) * self.deviation / math.sqrt(pairs)

    def seeds_needed(self, tolerance: float) -> int | None:
        """The seeds with which an interval around this percentage leaves out `tolerance`; None for more than 100."""
        room = abs(self.percent - tolerance)
        return next((n for n in range(self.pairs + 1, 101) if self.margin_with(n) < room), None)


def best_rate(losses: dict[float, dict[int, float]]) -> tuple[float, bool]:
    """The best learning rate of {rate: {seed: last loss}}, and whether it is bracketed.

    It has the lowest mean over the seeds that all rates have, or over its own where they share none. It is bracketed if
    there is a rate that is no better on either side, at most twofold away.
    """
    means = means_by_rate(losses)
    best = min(sorted(means), key=means.get)
    ratios = [rate / best for rate in means] if best else []
    return best, any(0.49 < ratio < 1 for ratio in ratios) and any(1 < ratio < 2.05 for ratio in ratios)


def means_by_rate(losses: dict[float, dict[int, float]]) -> dict[float, float]:
    """{rate: mean loss} of {rate: {seed: last loss}}, over the seeds that all rates have, else over a rate's own."""
    shared = set.intersection(*map(set, losses.values())) if losses else set()
    return {rate: statistics.fmean(ends[seed] for seed in shared or ends) for rate, ends in losses.items()}


def load_runs(paths: Iterable[str | Path]) -> tuple[list[Arm], list[str]]:
    """The runs in `paths`, folders with a log.txt or logs, as Arms: by size, n_shard and most syncs first.

    Each is at its best learning rate. What is named twice is taken once. With them comes a line for each path that is
    no run: why it was skipped. Raises ValueError with one clear line where nothing else is left.
    """
    arms, skipped = [], []
    logs = {(path / "log.txt" if path.is_dir() else path).resolve(): path for path in map(Path, paths)}
    for path in logs.values():
        try:
            arm = read_run(path)
        except ValueError as error:
            skipped.append(str(error))
            continue
        for other in arms:
            if same_experiment(other, arm) and not set(other.seed_losses) & set(arm.seed_losses):
                other.names += arm.names
                other.seed_losses |= arm.seed_losses
                other.gave_up |= arm.gave_up
                other.settings = arm.settings | other.settings  # what one of them knows
                if None in other.data:
                    other.data = arm.data
                break
        else:
            arms.append(arm)
    if skipped and not arms:
        raise ValueError(skipped[0] + (f" (and {len(skipped) - 1} more that are no runs)" if skipped[1:] else ""))
    arms = [at_best_rate(arm, arms) for arm in arms]
    arms = list({id(arm): arm for arm in arms}.values())
    number_size_classes(arms)
    return sorted(arms, key=lambda arm: (arm.size_class, arm.n_shard, -arm.syncs, arm.names)), skipped


def at_best_rate(arm: Arm, arms: list[Arm]) -> Arm:
    """The one of `arms` that is `arm` at its best learning rate; finished ones before others.

    It is `arm` itself where a rate has several that are not seeds of one another.
    """
    rates = sorted((a for a in arms if a is arm or same_experiment(a, arm, RATE_KEYS)), key=lambda a: a.learning_rate)
    if len({a.learning_rate for a in rates}) < len(rates):
        rates = [arm]
    ended = {a.learning_rate: a.last_losses for a in rates if a.finished or a.diverged}
    best, _ = best_rate(ended or {a.learning_rate: {0: a.last_loss} for a in rates})
    chosen = next(a for a in rates if a.learning_rate == best)
    chosen.arms_by_rate = rates
    return chosen


def number_size_classes(arms: list[Arm]) -> None:
    """Number the size classes of the arms from 1 on, each family's from its smallest.

    Arms are of one class, and compared, that have one family of blocks and as many parameters: up to 4 % more than
    the smallest. Shards' norms and biases, and the rounded width of a dense control, are within 2 % of the middle.
    """
    family, smallest, size_class = None, 0, 0
    for arm in sorted(arms, key=lambda arm: (arm.family, arm.n_params)):
        if arm.family != family or arm.n_params > 1.04 * smallest:
            family, smallest, size_class = arm.family, arm.n_params, size_class + 1
        arm.size_class = size_class


def read_run(path: Path) -> Arm:
    """The run whose folder or log is `path`, as an Arm. Raises ValueError with one clear line where it is none, yet."""
    log_path = path / "log.txt" if path.is_dir() else path
    try:
        log = read_log(log_path)
    except OSError as error:
        if any(path.glob("*/log.txt")):
            raise ValueError(f"{path}: its runs are in folders of their own: compare.py {path}/*/") from None
        raise ValueError(f"{log_path}: {error.strerror}; name folders that hold a log.txt") from None
    try:
        return _arm_of(log, path.name if path.is_dir() else path.parent.name)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{log_path}: its header is not that of a run: {error}") from None


def _arm_of(log, name):
    """The Arm of one run, called `name`. Raises ValueError, and whatever a header provokes that is not a run's."""
    header = log.header
    if missing := [f"# {key}:" for key in REQUIRED_HEADER if key not in header]:
        raise ValueError(f"it has no line {', '.join(missing)}" if header else "there is none, yet")
    config = header["config"]
    if missing := [key for key in REQUIRED_CONFIG if key not in config]:
        raise ValueError(f"its config has no {', '.join(missing)}")
    config = config | {key: int(header[key]) for key in ("vocab_size", "head_size") if key in header}
    for key in INTEGER_KEYS:
        if type(config[key]) is not int or not 1 <= config[key] <= (MOST_LAYERS if key == "n_layer" else 2**31):
            raise ValueError(f"{key}={config[key]!r} must be a positive integer")
    for key in ("learning_rate", "min_lr"):
        if type(config[key]) not in (int, float) or not 0 <= config[key] < math.inf:
            raise ValueError(f"{key}={config[key]!r} must be a number of at least 0")
    for key, default in BLOCK_DEFAULTS.items():
        if type(config.get(key, default)) is not type(default):
            raise ValueError(f"{key}={config[key]!r} must be {type(default).__name__}")
    if any(loss < 0 for _, *losses in log.evaluations for loss in losses):
        raise ValueError("a loss is below 0")
    # a config says which dtype was asked for, its header what that came to
    configs = [part["config"] | {"dtype": part.get("dtype")} for part in log.headers.values() if "config" in part]
    own = training_settings(configs[-1])
    own["min_lr / learning_rate"] = f"{own.pop('min_lr') / (float(config['learning_rate']) or 1):.4g}"
    own |= {key: value for key, value in configs[0].items() if key == "init_from" and value != "resume"}
    seed = own.pop("seed")
    if (n_params := int(header["parameters"].split("(")[1].rstrip(")"))) < 1:
        raise ValueError(f"parameters {n_params}")
    hashes = [header.get(f"{split} data", "").removeprefix("sha256 ") for split in ("train", "val")]
    arm = Arm(
        names=[" ".join(name.splitlines())],  # a cell of tables
        config=config,
        n_params=n_params,
        dtype=header["dtype"],
        settings=own,
        data=(config["dataset"], *(digest if digest not in ("", "unknown") else None for digest in hashes)),
        changed=", ".join(filter(None, itertools.starmap(changes, itertools.pairwise(configs)))),
        seed_losses={seed: {step: loss for step, _, loss in log.evaluations}},
        gave_up=log.bad_steps >= config.get("max_bad_steps", math.inf),
    )
    if arm.syncs != int(header["syncs"].split(" of ")[0]):
        raise ValueError(f"{header['syncs']} syncs with sync={config['sync']!r}")
    return arm


def same_data(a: Arm, b: Arm) -> bool:
    """Whether two arms have the same data: by its content, or by its name where a log does not know the content."""
    return a.data[1:] == b.data[1:] if None not in a.data + b.data else a.data[0] == b.data[0]


def comparable(a: Arm, b: Arm) -> bool:
    """Whether the losses of two arms are those of the same tokens."""
    return same_data(a, b) and a.settings["evaluation"] == b.settings["evaluation"]


def same_experiment(a: Arm, b: Arm, but: tuple[str, ...] = ()) -> bool:
    """Whether two arms differ in their seed alone, and in the settings `but`.

    What an older log does not say is no difference.
    """
    shared = (a.settings.keys() & b.settings.keys()) - set(but)
    equal = all(a.settings[key] == b.settings[key] for key in shared) and same_data(a, b)
    return a.model == b.model and equal and not a.changed and not b.changed


def baseline_of(arm: Arm, arms: list[Arm]) -> Arm | None:
    """The baseline to compare `arm` with, or None if there is none or more than one that it could be.

    Of the same size, as deep as its deepest arm (a shallower one is a control), and evaluated on the same tokens; of
    the same dtype and n_shard where there is one; among several n_shard that are not the arm's own, the one with the
    lowest loss.
    """
    group = [other for other in arms if other.size_class == arm.size_class and comparable(other, arm)]
    baselines = [other for other in group if other.is_standard_tp and other.n_layer == depth_of(group)]
    for name in ("dtype", "n_shard"):
        baselines = [other for other in baselines if getattr(other, name) == getattr(arm, name)] or baselines
    if len({other.n_shard for other in baselines}) == len(baselines) > 1:
        baselines = [min(baselines, key=lambda other: (not other.finished, other.last_loss))]
    return baselines[0] if len(baselines) == 1 else None


def depth_of(group: list[Arm]) -> int:
    """The layers of a size's baseline, those of its deepest arm."""
    return max(arm.n_layer for arm in group)


def percent_above(loss: float, other: float) -> float:
    """100 ln(loss / other), in percent; of two losses of nothing none, and nan for one that is not a number."""
    if loss == other and math.isfinite(loss):
        return 0.0
    ratio = loss / other if other else math.inf
    return 100 * math.log(ratio) if ratio else -math.inf


def paired(arm: Arm, other: Arm, step: int) -> list[float]:
    """How far `arm` is above `other` at `step`, in percent, for each seed that both have."""
    return [
        percent_above(arm.counted_losses[seed][step], other.counted_losses[seed][step])
        for seed in arm.counted_losses.keys() & other.counted_losses.keys()
    ]


def noise(arms: list[Arm]) -> tuple[float | None, int]:
    """(standard deviation over seeds of the gap between two arms of a size, in percent, its degrees of freedom).

    From what remains of the finished arms' 100 ln(loss) after a mean per arm and one per seed, as all arms with one
    baseline see the same batches: the analysis of variance of randomized blocks, which takes all arms to be equally
    noisy. None where no two arms share two seeds.
    """
    places, values = [], []
    for arm in arms:
        baseline = baseline_of(arm, arms)
        if baseline is not None and arm.finished and not arm.diverged and arm.max_iters == baseline.max_iters:
            ends = {seed: loss for seed, loss in arm.last_losses.items() if loss}
            places += [(id(arm), (id(baseline), seed)) for seed in ends]
            values += [percent_above(loss, 1) for loss in ends.values()]
    if not values:
        return None, 0
    means = {one for place in places for one in place}
    design = np.array([[one in place for one in means] for place in places], dtype=float)
    fitted, _, rank, _ = np.linalg.lstsq(design, np.array(values))
    freedom = len(values) - int(rank)
    rest = np.array(values) - design @ fitted
    return (math.sqrt(2 * float(rest @ rest) / freedom) if freedom else None), freedom


def gap_of(arm: Arm, arms: list[Arm]) -> Gap | None:
    """The arm's Gap to its baseline, or None where there is nothing to compare."""
    baseline = baseline_of(arm, arms)
    return None if baseline is None else gap_between(arm, baseline, arms)


def gap_between(arm: Arm, other: Arm, arms: list[Arm]) -> Gap | None:
    """How far `arm` is above another one of `arms`: the mean over the seeds that both have, else of their means."""
    common = set(arm.losses) & set(other.losses)
    if not common:
        return None
    step = max(common)
    found = paired(arm, other, step)
    percent = statistics.fmean(found) if found else percent_above(arm.losses[step], other.losses[step])
    same_size = [one for one in arms if one.size_class == arm.size_class]
    deviation, freedom = noise(same_size) if other is not arm else (None, 0)
    return Gap(percent, step, step == arm.max_iters == other.max_iters, len(found), deviation, freedom)


def is_control(arm: Arm, baseline: Arm | None) -> bool:
    """Whether it is a dense model of another depth than its baseline."""
    return arm.is_standard_tp and baseline is not None and arm.n_layer != baseline.n_layer


def by_size_class(arms: list[Arm]) -> list[list[Arm]]:
    """The arms of each size, the smallest first."""
    classes = sorted({arm.size_class for arm in arms})
    return [[arm for arm in arms if arm.size_class == one] for one in classes]


def group_baseline(group: list[Arm], arms: list[Arm]) -> Arm | None:
    """The baseline of the first arm of `group` that has one."""
    return next(filter(None, (baseline_of(arm, arms) for arm in group)), None)


def differ(arms: list[Arm], *names: str) -> bool:
    """Whether the arms differ in any of these fields."""
    return len({tuple(getattr(arm, name) for name in names) for arm in arms}) > 1


def too_short_note(arms: list[Arm], baseline: Arm | None) -> str:
    """A text that says so where some arms were trained on too few tokens to tell variants apart.

    Per parameter of the baseline, or else of the smallest arm: controls have slightly more.
    """
    n_params = baseline.n_params if baseline is not None else min(arm.n_params for arm in arms)
    fewest = f"{min(arm.tokens for arm in arms) / n_params:.2g}"
    return f"too short to tell: {fewest} tokens per parameter" if float(fewest) < LEAST_TOKENS else ""
