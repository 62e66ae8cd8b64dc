"""Runs as their logs tell of them: those that differ in their seed alone are one Arm; baselines, noise, gaps."""

import itertools
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from reduced_sync.train.log import changes, read_log, settings
from reduced_sync_model import SyncRule

LEAST_TOKENS = 10  # a parameter; shorter runs cannot tell variants apart: EXPERIMENT_SUMMARY.md
HEADER = "syncs parameters dtype config".split()  # lines that a header must have, and keys of its config
CONFIG = """sync n_shard n_layer n_head n_embd dataset seed learning_rate min_lr max_iters
gradient_accumulation_steps batch_size block_size eval_iters""".split()
SIZES = "n_shard n_layer n_head n_embd max_iters gradient_accumulation_steps batch_size block_size".split()
# what a log means that lacks them
BLOCK = {"norm": "layernorm", "position": "learned", "mlp": "gelu", "n_hidden": 0, "n_kv_head": 0}


@dataclass
class Arm:
    """Runs that differ in their seed alone: the header's facts, and evaluations as {seed: {step: validation loss}}."""

    names: list
    config: dict  # the header's, and the sizes of the model that the header itself has
    n_params: int
    dtype: str
    settings: dict  # all that should be the same in runs that are compared
    data: tuple  # name, sha256 of train, sha256 of val; None for one that is not known
    changed: str  # settings that changed where the run was resumed
    seeds: dict
    update_seconds: dict  # {seed: the median time of an update}, of the seeds whose logs have times
    scale: int = 0  # from number_scales
    tpots: dict = field(default_factory=dict)  # {setting: seconds per token}, from compare/frontier.py

    def __post_init__(self):
        self.n_shard, self.n_layer, self.n_head, self.n_embd, self.max_iters = (
            self.config[key] for key in ("n_shard", "n_layer", "n_head", "n_embd", "max_iters")
        )
        self.learning_rate = float(self.config["learning_rate"])
        self.block = {key: self.config.get(key, default) for key, default in BLOCK.items()}
        self.rule = SyncRule.parse(self.config["sync"], self.n_layer)

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
    def syncs(self) -> int:
        """All-reduces of a forward pass."""
        return self.rule.syncs

    @property
    def hidden(self) -> int:
        """Those of them in flight while the next sublayer runs."""
        return self.rule.hidden

    @property
    def size(self) -> str:
        """Layers x width, and the family of blocks unless it is GPT-2's."""
        return f"{self.n_layer}x{self.n_embd} {self.family}".rstrip()

    @property
    def family(self) -> str:
        """Empty for GPT-2's block, `modern` for Llama's, or what a mixture has of that."""
        other = [self.block[key] for key in ("norm", "position", "mlp") if self.block[key] != BLOCK[key]]
        return "modern" if len(other) == 3 else " ".join(other)

    @property
    def reduction(self) -> float:
        """Percent fewer syncs than standard TP with as many layers."""
        return 100 * (1 - self.syncs / (2 * self.n_layer))

    @property
    def blocking(self) -> int:
        """The syncs that nothing runs behind."""
        return self.syncs - self.hidden

    @property
    def count(self) -> str:
        """The syncs in words, hidden ones apart."""
        return count_text(self.syncs, self.hidden)

    @property
    def counted(self) -> list[dict[int, float]]:
        """The losses of the finished seeds, or of all where none has finished."""
        return [losses for losses in self.seeds.values() if self.max_iters in losses] or list(self.seeds.values())

    @property
    def losses(self) -> dict[int, float]:
        """The mean over the seeds that count, at the steps that all of them have evaluated."""
        steps = set.intersection(*map(set, self.counted))
        return {step: statistics.fmean(losses[step] for losses in self.counted) for step in sorted(steps)}

    @property
    def step(self) -> int:
        """The last step that all counted seeds have evaluated."""
        return max(self.losses, default=0)

    @property
    def finished(self) -> bool:
        """Whether the counted seeds have evaluated the last step."""
        return self.max_iters in self.losses

    @property
    def last_loss(self) -> float:
        """The loss by which arms are put in order: infinite where there is none, or it is not a number."""
        loss = self.losses.get(self.step, math.inf)
        return math.inf if math.isnan(loss) else loss

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds of the last loss; None for one seed, and where a loss is not finite."""
        last = [losses[self.step] for losses in self.counted] if self.losses else []
        return statistics.stdev(last) if len(last) > 1 and all(map(math.isfinite, last)) else None

    @property
    def all_synced(self) -> bool:
        """Whether it is standard tensor parallelism: all syncs, and none hidden."""
        return set(self.rule.pattern) == {"2"} and not self.hidden


@dataclass
class Gap:
    """How far an arm's loss is above the baseline's, in percent, at the last step that both have evaluated."""

    percent: float
    step: int
    final: bool  # both have finished
    margin: float | None  # half of the 95 % confidence interval; None where no noise is known


def count_text(syncs: int, hidden: int) -> str:
    """So many syncs in words, those of them that are hidden apart."""
    return f"{syncs - hidden} and {hidden} hidden" if hidden else str(syncs)


def load_runs(paths: Iterable[str | Path]) -> tuple[list[Arm], list[str]]:
    """The runs in `paths`, folders with a log.txt or logs, as Arms: by size, n_shard and most syncs first.

    What is named twice is taken once. With them comes a line for each path that is no run: why it was skipped. Raises
    ValueError with one clear line where nothing else is left.
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
            if same_experiment(other, arm) and not set(other.seeds) & set(arm.seeds):
                other.names += arm.names
                other.seeds |= arm.seeds
                other.update_seconds |= arm.update_seconds
                other.settings = arm.settings | other.settings  # what one of them knows
                if None in other.data:
                    other.data = arm.data
                break
        else:
            arms.append(arm)
    if skipped and not arms:
        raise ValueError(skipped[0] + (f" (and {len(skipped) - 1} more that are no runs)" if skipped[1:] else ""))
    number_scales(arms)
    return sorted(arms, key=lambda arm: (arm.scale, arm.n_shard, -arm.syncs, arm.names)), skipped


def number_scales(arms: list[Arm]) -> None:
    """Number the scales of the arms from 1 on, each family's from its smallest.

    Arms are of one scale, and compared, that have one family of blocks and as many parameters: up to 4 % more than the
    smallest of them. Shards' norms and biases, and the rounded width of a dense control, are within 2 % of the middle.
    """
    family, smallest, scale = None, 0, 0
    for arm in sorted(arms, key=lambda arm: (arm.family, arm.n_params)):
        if arm.family != family or arm.n_params > 1.04 * smallest:
            family, smallest, scale = arm.family, arm.n_params, scale + 1
        arm.scale = scale


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
    if missing := [f"# {key}:" for key in HEADER if key not in header]:
        raise ValueError(f"it has no line {', '.join(missing)}" if header else "there is none, yet")
    config = header["config"]
    if missing := [key for key in CONFIG if key not in config]:
        raise ValueError(f"its config has no {', '.join(missing)}")
    config = config | {key: int(header[key]) for key in ("vocab_size", "head_size") if key in header}
    for key in SIZES:
        if type(config[key]) is not int or config[key] < 1:
            raise ValueError(f"{key}={config[key]!r} must be a positive integer")
    # a config says which dtype was asked for, its header what that came to
    configs = [part["config"] | {"dtype": part.get("dtype")} for part in log.headers.values() if "config" in part]
    own = settings(configs[-1])
    own["min_lr / learning_rate"] = f"{own.pop('min_lr') / (float(config['learning_rate']) or 1):.4g}"
    own |= {key: value for key, value in configs[0].items() if key == "init_from" and value != "resume"}
    seed = own.pop("seed")
    if (n_params := int(header["parameters"].split("(")[1].rstrip(")"))) < 1:
        raise ValueError(f"parameters {n_params}")
    times = [ms for _, _, ms, _, _ in log.iterations[1:] if ms > 0]  # the first one compiles
    hashes = [header.get(f"{split} data", "").removeprefix("sha256 ") for split in ("train", "val")]
    arm = Arm(
        names=[" ".join(name.splitlines())],  # a cell of tables
        config=config,
        n_params=n_params,
        dtype=header["dtype"],
        settings=own,
        data=(config["dataset"], *(digest if digest not in ("", "unknown") else None for digest in hashes)),
        changed=", ".join(filter(None, itertools.starmap(changes, itertools.pairwise(configs)))),
        seeds={seed: {step: loss for step, _, loss in log.evaluations}},
        update_seconds={seed: statistics.median(times) / 1000} if times else {},
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


def same_experiment(a: Arm, b: Arm) -> bool:
    """Whether two arms differ in their seed alone. What an older log does not say is no difference."""
    shared = a.settings.keys() & b.settings.keys()
    equal = all(a.settings[key] == b.settings[key] for key in shared) and same_data(a, b)
    return a.model == b.model and equal and not a.changed and not b.changed


def baseline_of(arm: Arm, arms: list[Arm]) -> Arm | None:
    """The baseline to compare `arm` with, or None if there is none or more than one that it could be.

    Evaluated on the same tokens; of the same size, dtype and n_shard where there is one; among several learning rates,
    or several n_shard that are not the arm's own, the one with the lowest loss.
    """
    synced = [other for other in arms if other.all_synced]
    deepest = {scale: max(a.n_layer for a in synced if a.scale == scale) for scale in {a.scale for a in synced}}
    baselines = [other for other in synced if other.n_layer == deepest[other.scale] and comparable(other, arm)]
    for name in ("scale", "dtype", "n_shard"):
        baselines = [other for other in baselines if getattr(other, name) == getattr(arm, name)] or baselines
    choices = {(other.learning_rate, other.n_shard) for other in baselines}
    if len(choices) == len(baselines) > 1:
        baselines = [min(baselines, key=lambda other: (not other.finished, other.last_loss))]
    return baselines[0] if len(baselines) == 1 else None


def noise(arms: list[Arm]) -> tuple[float | None, int]:
    """(standard deviation of a run's last loss over seeds in percent of it, degrees of freedom), pooled."""
    several = [arm for arm in arms if arm.finished and arm.deviation is not None and arm.losses[arm.step]]
    freedom = sum(len(arm.counted) - 1 for arm in several)
    squares = sum((len(arm.counted) - 1) * (arm.deviation / arm.losses[arm.step]) ** 2 for arm in several)
    return (100 * math.sqrt(squares / freedom) if freedom else None), freedom


def gap(arm: Arm, arms: list[Arm]) -> Gap | None:
    """The arm's Gap to its baseline, or None where there is nothing to compare."""
    reference = baseline_of(arm, arms)
    common = set(arm.losses) & set(reference.losses) if reference is not None else set()
    if not common:
        return None
    step, margin = max(common), None
    loss, baseline = arm.losses[step], reference.losses[step]
    percent = 100 * (loss / baseline - 1) if baseline else 0.0 if loss == 0 else math.inf  # a memorised text
    deviation, freedom = noise([other for other in arms if other.size in (arm.size, reference.size)])
    if deviation is not None and reference is not arm:
        from scipy.stats import t

        margin = t.ppf(0.975, freedom) * deviation * math.sqrt(1 / len(arm.counted) + 1 / len(reference.counted))
    return Gap(percent, step, arm.finished and reference.finished, margin)


def loss_at_equal_time(arm: Arm, arms: list[Arm]) -> float | None:
    """The arm's loss when it has trained for as long as its baseline did; None where the logs do not tell.

    Training time is updates times their median time: without compilation, evaluations and saving. Between evaluations
    the loss is interpolated; of an arm that has finished by then it is the last one.
    """
    reference = baseline_of(arm, arms)
    if reference is None or not reference.finished or not reference.update_seconds or not arm.update_seconds:
        return None
    times = [statistics.fmean(a.update_seconds.values()) for a in (reference, arm)]
    step, losses = reference.max_iters * (times[0] / times[1]), list(arm.losses.items())
    if step >= arm.step:
        return arm.losses[arm.step] if arm.finished else None
    for (start, loss), (end, after) in itertools.pairwise(losses):
        if start <= step <= end:
            return loss + (after - loss) * (step - start) / (end - start)
    return None


def by_scale(arms: list[Arm]) -> list[list[Arm]]:
    """The arms of each size, the smallest first."""
    return [[arm for arm in arms if arm.scale == scale] for scale in sorted({arm.scale for arm in arms})]


def reference_of(group: list[Arm], arms: list[Arm]) -> Arm | None:
    """The baseline of the first arm of `group` that has one."""
    return next(filter(None, (baseline_of(arm, arms) for arm in group)), None)


def differ(arms: list[Arm], *names: str) -> bool:
    """Whether the arms differ in any of these fields."""
    return len({tuple(getattr(arm, name) for name in names) for arm in arms}) > 1


def too_short(arms: list[Arm]) -> str:
    """A text that says so where some arms were trained on too few tokens to tell variants apart."""
    fewest = f"{min(arm.tokens / arm.n_params for arm in arms):.2g}"
    return f"too short to tell: {fewest} tokens a parameter" if float(fewest) < LEAST_TOKENS else ""
