"""Run a study: train each arm at each size at its best learning rate, with several seeds, then compare them all.

$ python study.py config/study_demo.py
$ python study.py config/study_pypi.py --device=cpu --out_dir=out-mine

A study file is a config file with the keys of Study, below: it declares sizes and arms, each a dict of training keys.
An arm at a size is first trained with seed 1 at half, once and twice the learning_rate that it is given. While the best
rate is at the edge, another one follows beyond it, up to twelve in all. Once the best lies inside, the other seeds are
trained at it.

Each run is an ordinary train_reduced_sync.py run in its own folder, out_dir/SIZE-ARM-lrRATE-seedSEED. They start
in the order of sizes and arms, as many at once as the cores (or the GPUs, times runs_per_gpu) allow, each using
`processes` of them.
Ctrl-C stops all runs after their step, a second one within seconds. After any stop, continue with the same command:
finished runs are left alone, and started ones continue from their checkpoint. Several study.py may share the runs.
"""

from reduced_sync.cli import set_up

if __name__ == "__main__":  # before the imports that take seconds: Ctrl-C ends them in silence
    set_up(keeps_running=True)

import contextlib
import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from reduced_sync.cli import one_line, one_line_errors, stop_signals
from reduced_sync.compare.figures import draw_comparison
from reduced_sync.compare.report import report, write_csv
from reduced_sync.compare.runs import best_rate, load_runs
from reduced_sync.configurator import configure, option
from reduced_sync.data import Corpus
from reduced_sync.distributed import ERROR_FILE, choose_device
from reduced_sync.train.experiment import Config, check_config, model_keys
from reduced_sync.train.log import ARCHITECTURE, changes, read_log
from reduced_sync_model import GPTConfig, SyncRule

HERE = Path(__file__).parent
MOST_RATES = 12  # a thousandfold beyond the first: where the best is still at the edge, no rate is the answer
COUNTED = ("eval_interval", "gradient_accumulation_steps", "batch_size", "block_size")


@dataclass
class Study:
    """Every key of a study file."""

    out_dir: str = option("out-study", "folder for the runs and the comparison", is_path=True)
    common: dict | None = option(None, "training keys of all runs")
    sizes: dict | None = option(None, "name -> training keys of a size: n_layer, n_embd, max_iters ...")
    arms: dict | None = option(None, "name -> training keys of an arm; its key `sizes` lists those to train")
    seeds: int = option(1, "number of seeds: seed 1 chooses the learning rate, the others use it", least=1)
    tune: bool = option(True, "find each arm's learning rate; else train at the one given")
    processes: int = option(1, "processes per run; above 1, torchrun starts each run", least=1)
    runs_per_gpu: int = option(1, "small runs can share a GPU", least=1)
    device: str | None = option(None, "cuda or cpu, in place of what the runs say")
    tolerance: float = option(2.0, "largest gap to the baseline, in percent, that counts as equal", least=0)


class Plan(NamedTuple):
    """The runs of a sweep as far as they are known by now, in their order, and how many more there will be at least."""

    runs: list["Run"]
    more: int


class Sweep:
    """An arm at a size: the runs that find its learning rate, and its seeds at the best one."""

    def __init__(self, study, name, keys):
        self.study, self.name, self.keys, self.runs = study, name, keys, {}
        for key in ("max_iters", "n_layer", "n_embd", "learning_rate", *(key for key in COUNTED if key in keys)):
            value, kinds = keys.get(key), (int, float) if key == "learning_rate" else (int,)
            if type(value) not in kinds or not 0 < value < math.inf:
                wanted = "number" if key == "learning_rate" else "integer"
                raise ValueError(f"{name}: {key}={value!r} must be a positive {wanted}")
        for key in ("out_dir", "seed", "min_lr"):
            if key in keys:
                raise ValueError(f"{name}: {key} is the study's own")
        self.run_at(keys["learning_rate"], 1)

    def run_at(self, rate: float, seed: int) -> "Run":
        """The run at this learning rate, which falls to a tenth, with this seed."""
        if (rate, seed) not in self.runs:
            keys = self.keys | dict(learning_rate=rate, min_lr=rate / 10, seed=seed)
            self.runs[rate, seed] = Run(self.study, f"{self.name}-lr{rate:g}-seed{seed}", keys)
        return self.runs[rate, seed]

    def trains(self) -> dict:
        """Its first run's config without out_dir, and with the sync rule spelled canonically."""
        (first, *_) = self.runs.values()
        config = dataclasses.asdict(first.config)
        return config | dict(out_dir=None, sync=str(SyncRule.parse(config["sync"], config["n_layer"])))

    def plan(self) -> Plan:
        """What it trains, by the losses that are known by now."""
        first = float(self.keys["learning_rate"])
        rates, seeds = [first, first / 2, 2 * first] if self.study.tune else [first], range(2, self.study.seeds + 1)
        while True:
            runs = [self.run_at(rate, 1) for rate in rates]
            if not all(run.finished or run.diverged for run in runs):
                return Plan(runs, len(seeds))
            best, bracketed = best_rate({rate: {1: run.loss} for rate, run in zip(rates, runs, strict=True)})
            if bracketed or not self.study.tune:
                return Plan(runs + [self.run_at(best, seed) for seed in seeds], 0)
            if len(rates) >= MOST_RATES:
                return Plan(runs, 0)
            rates.append(2 * best if best == max(rates) else best / 2)


def sweeps_of(study: Study) -> list[Sweep]:
    """Every arm at every size. Raises ValueError for a study that cannot be run."""
    if not study.out_dir:
        raise ValueError("out_dir is empty: it must name a folder")
    for key in ("sizes", "arms"):
        if not getattr(study, key):
            raise ValueError(f"{key} is empty: a study names some, each with a dict of training keys")
    for kind, named in (("size", study.sizes), ("arm", study.arms)):
        for name, keys in named.items():
            if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]+", name) or not isinstance(keys, dict):
                raise ValueError(f"{kind} {name!r}: a name is of letters, digits and . + - _, and names a dict")
    found = []
    for name, keys in study.arms.items():
        own = keys.get("sizes", [])
        if not isinstance(own, list | tuple) or not all(size in list(study.sizes) for size in own):
            raise ValueError(f"arm {name!r}: sizes={own!r} must be a list of names among {', '.join(study.sizes)}")
    for size, size_keys in study.sizes.items():
        for name, keys in study.arms.items():
            if size in keys.get("sizes", study.sizes):
                keys = {key: value for key, value in keys.items() if key != "sizes"}
                found.append(Sweep(study, f"{size}-{name}", (study.common or {}) | size_keys | keys))
    names = {}
    for sweep in found:
        if sweep.name in names.values():
            raise ValueError(f"two pairs of a size and an arm make the name {sweep.name}: rename one of them")
        if (other := names.setdefault(repr(sweep.trains()), sweep.name)) != sweep.name:
            raise ValueError(f"{other} and {sweep.name} train the same: leave one out, by its sizes")
    return found


class Run:
    """One run of the study: where it stands, its process while it has one, and why it failed if it did.

    Raises ValueError for keys that the training script does not have, and syncs that it does not know.
    """

    def __init__(self, study, name, keys):
        self.study, self.name, self.keys = study, name, keys
        self.out_dir = Path(study.out_dir) / self.name
        device = {"device": study.device} if study.device else {}
        settled = self.keys | device | {"out_dir": self.out_dir}
        self.arguments = [f"--{key}={value}" for key, value in settled.items()]
        try:
            self.config = configure(Config, self.arguments)
            GPTConfig(**model_keys(vars(self.config)))
            if study.processes == 1:  # else torchrun's processes check it
                check_config(self.config)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        self.process = self.slot = self.failure = None
        self.signals_sent, self.next_signal = 0, 0.0
        self.step, self.evaluated, self.finished, self.diverged, self.loss = 0, 0, False, False, math.inf
        self.step_work = keys["n_layer"] * keys["n_embd"] ** 2  # about a step's share of the time

    def read_progress(self) -> None:
        """Read from its log where it stands. Raises ValueError for the log of another run."""
        try:
            log = read_log(self.out_dir / "log.txt")
        except FileNotFoundError:
            return
        found = log.header.get("config", {})
        # an older log's later headers say `resume`: what the run began from is in the first one, if anywhere
        own, first = dataclasses.asdict(self.config), next(iter(log.headers.values()), {}).get("config", {})
        origin = first.get("init_from", "resume")
        found = found and found | {"init_from": own["init_from"] if origin == "resume" else origin}
        differs = [key for key in (*ARCHITECTURE, "dataset", "init_from") if found.get(key, own[key]) != own[key]]
        other = ", ".join(f"{key} {found[key]} -> {own[key]}" for key in differs)
        if found and (other := ", ".join(filter(None, [other, changes(found, own)]))):
            raise ValueError(f"{self.out_dir} holds another run ({other}): rename the arm, or remove the folder")
        self.step = max((step for step, *_ in log.iterations + log.evaluations), default=0)
        self.evaluated = len(log.evaluations)
        last = [loss for step, _, loss in log.evaluations if step == self.keys["max_iters"]]
        self.finished, self.diverged = bool(last), log.bad_steps >= self.config.max_bad_steps
        self.loss = last[0] if last and math.isfinite(last[0]) else math.inf

    def tokens_left(self, whole: bool = False) -> tuple[int, int]:
        """(tokens to train on, tokens to evaluate on) until it is finished, or of the whole of it.

        Raises ValueError for unusable data.
        """
        config = self.config
        corpus = Corpus(config.dataset, config.block_size)
        windows = sum(
            len(corpus.evaluation_starts(split, config.eval_iters, config.batch_size)) for split in corpus.splits
        )
        step, evaluated = (0, 0) if whole else (self.step, self.evaluated)
        evaluations = -(-config.max_iters // config.eval_interval) + 1 - evaluated
        sequences = (config.max_iters - step) * config.gradient_accumulation_steps * config.batch_size
        return sequences * config.block_size, evaluations * windows * config.block_size

    def is_held(self) -> bool:
        """Whether a live process that is not ours trains it."""
        import fcntl  # not on Windows, where the start says so

        with contextlib.suppress(FileNotFoundError), open(self.out_dir / ".lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def start(self, slot: list[str], gpus: bool) -> None:
        """Start or resume it on `slot`, the GPUs or cores of a run."""
        command = [sys.executable, str(HERE / "train_reduced_sync.py")]
        if self.study.processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.study.processes}"]
            command[1:1] = launcher
        command += self.arguments
        if (self.out_dir / "ckpt.pt").exists():
            command += ["--init_from=resume"]
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        environment[ERROR_FILE] = str((self.out_dir / "error.txt").absolute())
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        (self.out_dir / "error.txt").unlink(missing_ok=True)
        with open(self.out_dir / "output.txt", "w") as output:
            # a group of its own: a terminal's Ctrl-C reaches it through this process alone
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, process_group=0)
        self.slot = slot

    def pass_on(self, signals: list[int]) -> None:
        """Send its process the next of the signals that it has not had; the second one ends a run without saving."""
        now = time.monotonic()
        if len(signals) > self.signals_sent and now >= self.next_signal:
            number = signals[self.signals_sent]
            self.process.send_signal(number if number == signal.SIGINT else signal.SIGTERM)  # torchrun knows no other
            self.signals_sent, self.next_signal = self.signals_sent + 1, now + 2  # a run takes a sooner one for an echo

    def ended(self) -> bool:
        """Whether its process has ended; `failure` then says why, where it did not finish or stop as asked."""
        if self.process.poll() is None:
            return False
        self.read_progress()
        # an error after the last step or a stop means that saving failed
        as_asked = (self.finished or self.signals_sent) and not (self.out_dir / "error.txt").exists()
        if not (as_asked or self.diverged or self.is_held()):
            self.failure = f"{reason(self.out_dir, self.process.returncode)} (more in {self.out_dir / 'output.txt'})"
        self.process = None
        return True


def reason(out_dir: Path, status: int) -> str:
    """Why a run ended with this status: what it wrote down itself, else how, with the last line of its output."""
    with contextlib.suppress(FileNotFoundError):
        return (out_dir / "error.txt").read_text(errors="replace")
    end = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    lines = (out_dir / "output.txt").read_text(errors="replace").split("\n")
    last = [line.strip() for line in lines if any(map(str.isalnum, line))][-1:]
    return ", after the line: ".join([end, *last])


def slots(processes: int, runs_per_gpu: int, on_cpu: bool) -> tuple[list[list[str]], bool]:
    """(the GPUs or cores for each of the runs that go on at once, as lists of strings; whether they are GPUs)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = 0 if on_cpu else torch.cuda.device_count()
    units = (visible.split(",") if visible else list(map(str, range(gpus)))) if gpus else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    units = units or list(map(str, range(cores)))
    if len(units) < processes and gpus:
        raise ValueError(f"processes={processes}, but there are {len(units)} GPUs")
    whole = [units[i : i + processes] for i in range(0, max(1, len(units) - processes + 1), processes)]
    return whole * (runs_per_gpu if gpus else 1), bool(gpus)


class StudyProgress:
    """What is left to train of a study, in work and in time, and the bar that shows it."""

    def __init__(self, sweeps):
        self.sweeps, self.begin = sweeps, time.monotonic()
        self.past, _ = self.work()
        self.bar = tqdm(total=1, disable=None, bar_format="{percentage:5.1f}% |{bar}| {postfix}")

    def work(self) -> tuple[float, float]:
        """(work done, work in all, as far as it is known)."""
        done = total = 0
        for sweep in self.sweeps:
            runs, more = sweep.plan()
            done += sum(run.step_work * (run.keys["max_iters"] if run.diverged else run.step) for run in runs)
            total += sum(run.step_work * run.keys["max_iters"] for run in runs)
            total += more * runs[0].step_work * runs[0].keys["max_iters"]
        return done, total

    def left(self) -> str:
        """The time left, by the work done since the beginning."""
        done, total = self.work()
        if done <= self.past:
            return ""
        minutes = (total - done) * (time.monotonic() - self.begin) / (done - self.past) / 60
        return f", about {minutes / 60:.1f} h left" if minutes > 90 else f", about {minutes:.0f} min left"

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def show(self, running: list[Run]) -> None:
        """Move the bar."""
        done, total = self.work()
        self.bar.n = done / total
        names = ", ".join(f"{run.name} {run.step}/{run.keys['max_iters']}" for run in running)
        self.bar.set_postfix_str(f"{names or 'waiting for another study.py'}{self.left()}")


def run_missing(sweeps: list[Sweep], free: list[list[str]], gpus: bool) -> bool:
    """Train what has not finished. Returns whether it was interrupted; failures are the runs' own.

    Raises ValueError for data and devices that are not there. Whatever it raises, no run goes on.
    """
    interrupts, running = [], []
    before = {n: signal.signal(n, lambda number, frame: interrupts.append(number)) for n in stop_signals()}
    announce(sweeps, len(free))
    progress = StudyProgress(sweeps)
    try:
        while True:
            for run in list(running):
                if run.ended():
                    running.remove(run)
                    free.append(run.slot)
                    progress.line(f"{_outcome(run, sweeps)}{progress.left()}")
            for run in missing(sweeps) if free and not interrupts else ():
                if free and run not in running and not run.is_held():
                    run.read_progress()  # another study.py may have finished it
                    if not (run.finished or run.diverged):
                        run.start(free.pop(0), gpus)
                        running.append(run)
            if not running and (interrupts or not missing(sweeps)):
                break
            for run in running:
                run.pass_on(interrupts)
                run.read_progress()
            progress.show(running)
            time.sleep(1)
    finally:
        while running := [run for run in running if run.process.poll() is None]:  # after an error of our own
            interrupts = interrupts or [signal.SIGINT]  # so they save
            for run in running:
                run.pass_on(interrupts)
            time.sleep(0.1)
        progress.bar.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    return bool(interrupts)


def missing(sweeps: list[Sweep]) -> list[Run]:
    """The runs that are to be trained, as far as they are known by now."""
    runs = [run for sweep in sweeps for run in sweep.plan().runs]
    return [run for run in runs if not (run.finished or run.diverged or run.failure)]


def announce(sweeps: list[Sweep], at_once: int) -> None:
    """Say what will be trained. Raises ValueError for other runs' logs, and data and devices that are not there."""
    known = -1
    while known < (known := sum(len(sweep.plan().runs) for sweep in sweeps)):  # what has ended says which runs follow
        for sweep in sweeps:
            for run in sweep.plan().runs:
                run.read_progress()
    waiting, more = missing(sweeps), sum(sweep.plan().more for sweep in sweeps)
    for choice in {(run.config.device, run.config.dtype, run.config.backend) for run in waiting}:
        choose_device(*choice)
    plan = [run.tokens_left() for run in waiting]
    for sweep in sweeps:
        runs, seeds = sweep.plan()
        plan += [runs[0].tokens_left(whole=True)] * seeds
    finished = sum(run.finished or run.diverged for sweep in sweeps for run in sweep.plan().runs)
    print(f"at least {finished + len(waiting) + more} runs, {finished} finished already, {at_once} at once", flush=True)
    trained, evaluated = (sum(tokens) for tokens in zip(*plan, strict=True)) if plan else (0, 0)
    print(f"to train on {trained:,} tokens, to evaluate on {evaluated:,}", flush=True)


def _outcome(run, sweeps):
    """How a run has ended, one of those of all `sweeps`, as a line."""
    if run.finished:
        plans = [sweep.plan() for sweep in sweeps]
        finished = sum(run.finished for runs, _ in plans for run in runs)
        return f"{run.name}: {run.loss:.4f} ({finished} of at least {sum(len(runs) + more for runs, more in plans)})"
    if run.diverged:
        return f"{run.name}: diverged"
    return f"{run.name}: failed: {run.failure}" if run.failure else f"{run.name}: stopped, goes on next time"


def main(argv: list[str]) -> int:
    """The exit status: 130 where the study was stopped, 1 where a run failed."""
    with one_line_errors():
        study = configure(Study, argv or ["--help"], __doc__)
        sweeps = sweeps_of(study)
        on_cpu = all(run.config.device == "cpu" for sweep in sweeps for run in sweep.runs.values())
        interrupted = run_missing(sweeps, *slots(study.processes, study.runs_per_gpu, on_cpu))
        runs = [run for sweep in sweeps for run in sweep.plan().runs]
        ended = [run.out_dir for run in runs if run.finished or run.diverged]
        if interrupted:
            print(
                f"stopped, {len(ended)} of {len(runs)} runs finished; run the same command to continue", file=sys.stderr
            )
            return 130
        if ended:
            arms, skipped = load_runs(ended)
            for line in skipped:
                print(f"skipped: {line}", file=sys.stderr)
            print(report(arms, study.tolerance))
            write_csv(arms, f"{study.out_dir}/table.csv", study.tolerance)
            draw_comparison(arms, f"{study.out_dir}/comparison.png", study.tolerance)
            print(f"figure: {study.out_dir}/comparison.png")
        for run in runs:
            if run.failure:
                print(f"error: {one_line(f'{run.name}: {run.failure}')}", file=sys.stderr)
    return int(any(run.failure for run in runs))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
