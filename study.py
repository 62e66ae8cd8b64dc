"""Run a study: train the missing runs of those that a study file lists, then compare them all.

$ python study.py config/study_cpu.py
$ python study.py config/study_pypi.py --device=cpu --out_dir=out-mine

A study file is a config file with the keys of Study, below. Each run is an ordinary train_reduced_sync.py run in its
own folder, out_dir/NAME. Runs start in the order of the file, as many at once as there are cores (or GPUs) for
`processes` each. Finished runs are left alone and started ones continue from their checkpoint, so the same command
continues after any stop: Ctrl-C (twice ends at once), a closed terminal, a kill, or another study.py that is training
some of the runs.
"""

from reduced_sync.cli import set_up

if __name__ == "__main__":  # before the imports that take seconds: Ctrl-C ends them in silence
    set_up(goes_on=True)

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from reduced_sync.cli import one_line, one_line_errors, stop_signals
from reduced_sync.compare.figures import draw_comparison
from reduced_sync.compare.report import report, write_csv
from reduced_sync.compare.runs import load_runs
from reduced_sync.configurator import configure, describe, option
from reduced_sync.data import Corpus
from reduced_sync.distributed import ERROR_FILE, choose_device
from reduced_sync.train.experiment import Config
from reduced_sync.train.log import read_log
from reduced_sync_model import SyncRule

HERE = Path(__file__).parent


@dataclass
class Study:
    """Every key of a study file."""

    out_dir: str = option("out-study", "folder for the runs and the comparison", is_path=True)
    runs: list | None = option(None, "list of dicts: name, max_iters, n_layer, n_embd, any training key")  # noqa: RUF009
    processes: int = option(1, "processes per run; above 1, torchrun starts each run", least=1)
    device: str | None = option(None, "cuda or cpu, in place of what the runs say")
    tolerance: float = option(2.0, "percent above the baseline that count as equal", least=0)


def check_study(study: Study) -> None:
    """Raise ValueError for a study that cannot be run."""
    if not study.out_dir:
        raise ValueError("out_dir is empty: it must name a folder")
    if not study.runs:
        raise ValueError("runs is empty: a study lists one dict a run")
    names = []
    for run in study.runs:
        if not isinstance(run, dict) or not isinstance(run.get("name"), str) or not run["name"]:
            raise ValueError(f"a run is a dict with a name, not {run!r}")
        names.append(run["name"])
        if Path(run["name"]).name != run["name"] or run["name"] == "..":
            raise ValueError(f"run {run['name']!r}: its name is that of a folder in out_dir, without a /")
        counted = ("eval_interval", "gradient_accumulation_steps", "batch_size", "block_size")
        for key in ("max_iters", "n_layer", "n_embd", *(key for key in counted if key in run)):
            if type(run.get(key)) is not int or run[key] < 1:
                raise ValueError(f"run {run['name']!r}: {key}={run.get(key)!r} must be a positive integer")
        if "out_dir" in run:
            raise ValueError(f"run {run['name']!r}: out_dir is the study's own; give the run a name")
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"several runs are named {', '.join(sorted(twice))}")


class Run:
    """One run of the study: where it stands, its process while it has one, and why it failed if it did.

    Raises ValueError for keys that the training script does not have, and syncs that it does not know.
    """

    def __init__(self, study, keys):
        self.study, self.name = study, keys["name"]
        self.keys = {key: value for key, value in keys.items() if key != "name"}
        self.out_dir = Path(study.out_dir) / self.name
        device = {"device": study.device} if study.device else {}
        settled = self.keys | device | {"out_dir": self.out_dir}
        self.arguments = [f"--{key}={value}" for key, value in settled.items()]
        try:
            self.config = configure(Config, self.arguments)
            SyncRule.parse(self.config.sync, self.config.n_layer)
        except ValueError as error:
            raise ValueError(f"run {self.name!r}: {error}") from None
        self.process = self.slot = self.failure = None
        self.told = 0  # signals passed on to its process
        self.step, self.evaluated, self.finished = 0, 0, False
        self.step_work = keys["n_layer"] * keys["n_embd"] ** 2  # about a step's share of the time

    def look(self) -> None:
        """Read from its log where it stands. Raises ValueError for the log of another run."""
        try:
            log = read_log(self.out_dir / "log.txt")
        except FileNotFoundError:
            return
        config = log.header.get("config", {})
        for key in self.keys:
            value = getattr(self.config, key)  # as the training script reads it: a number from a text, too
            if config and config.get(key) != value:
                found = f"{self.out_dir} holds a run with {key}={config.get(key)!r}, not {value!r}"
                raise ValueError(f"{found}: rename the run, or remove the folder")
        self.step = max((step for step, *_ in log.iterations + log.evaluations), default=0)
        self.evaluated = len(log.evaluations)
        self.finished = any(step == self.keys["max_iters"] for step, *_ in log.evaluations)

    def tokens_left(self) -> tuple[int, int]:
        """(tokens to train on, tokens to evaluate on) until it is finished. Raises ValueError for unusable data."""
        config = self.config
        corpus = Corpus(config.dataset, config.block_size)
        windows = sum(
            len(corpus.evaluation_starts(split, config.eval_iters, config.batch_size)) for split in corpus.splits
        )
        evaluations = -(-config.max_iters // config.eval_interval) + 1 - self.evaluated
        sequences = (config.max_iters - self.step) * config.gradient_accumulation_steps * config.batch_size
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
        """Send its process those of the signals that it has not had; the second one ends a run without saving."""
        for number in signals[self.told :]:
            self.process.send_signal(number)
        self.told = len(signals)

    def ended(self) -> bool:
        """Whether its process has ended; `failure` then says why, where it did not finish or stop as asked."""
        if self.process.poll() is None:
            return False
        if self.process.returncode:
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


def slots(processes: int) -> tuple[list[list[str]], bool]:
    """(the GPUs or cores for each of the runs that go on at once, as lists of strings; whether they are GPUs)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = torch.cuda.device_count()
    units = (visible.split(",") if visible else list(map(str, range(gpus)))) if gpus else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    units = units or list(map(str, range(cores)))
    if len(units) < processes and gpus:
        raise ValueError(f"processes={processes}, but there are {len(units)} GPUs")
    return [units[i : i + processes] for i in range(0, max(1, len(units) - processes + 1), processes)], bool(gpus)


def run_missing(runs: list[Run], free: list[list[str]], gpus: bool) -> bool:
    """Train what has not finished. Returns whether it was interrupted; failures are the runs' own.

    Raises ValueError for data and devices that are not there. Whatever it raises, no run goes on.
    """
    interrupts = []
    before = {n: signal.signal(n, lambda number, frame: interrupts.append(number)) for n in stop_signals()}
    for run in runs:
        run.look()
    waiting = [run for run in runs if not run.finished]
    for choice in {(run.config.device, run.config.dtype, run.config.backend) for run in waiting}:
        choose_device(*choice)
    plan = [run.tokens_left() for run in waiting]
    running = []
    total, past = sum(run.step_work * run.keys["max_iters"] for run in runs), _work_done(runs)
    begin = time.monotonic()

    def left():
        """The time left, by the work done since `begin`."""
        now = _work_done(runs)
        if now <= past:
            return ""
        minutes = (total - now) * (time.monotonic() - begin) / (now - past) / 60
        return f", about {minutes / 60:.1f} h left" if minutes > 90 else f", about {minutes:.0f} min left"

    print(f"{len(runs)} runs, {len(runs) - len(waiting)} finished already, {len(free)} at once", flush=True)
    trained, evaluated = (sum(tokens) for tokens in zip(*plan, strict=True)) if plan else (0, 0)
    print(f"to train on {trained:,} tokens, to evaluate on {evaluated:,}", flush=True)
    bar = tqdm(total=1, initial=past / total, disable=None, bar_format="{percentage:5.1f}% |{bar}| {postfix}")
    try:
        while waiting or running:
            for run in list(running):
                if not run.ended():
                    continue
                running.remove(run)
                free.append(run.slot)
                run.look()
                bar.write(f"{_outcome(run, runs)}{left()}", file=sys.stdout)
                sys.stdout.flush()
            for run in list(waiting) if not interrupts else ():
                if free and not run.is_held():
                    waiting.remove(run)
                    run.start(free.pop(0), gpus)
                    running.append(run)
            if interrupts and not running:
                break
            for run in running:
                run.pass_on(interrupts)
                run.look()
            bar.n = _work_done(runs) / total
            names = ", ".join(f"{run.name} {run.step}/{run.keys['max_iters']}" for run in running)
            bar.set_postfix_str(f"{names or 'waiting for another study.py'}{left()}")
            time.sleep(1)
    finally:
        while running := [run for run in running if run.process.poll() is None]:  # after an error of our own
            interrupts = interrupts or [signal.SIGINT]  # so they save
            for run in running:
                run.pass_on(interrupts)
            time.sleep(0.1)
        bar.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    return bool(interrupts)


def _outcome(run, runs):
    """How a run has ended, one of all `runs`, as a line."""
    if run.finished:
        return f"{run.name}: finished ({sum(run.finished for run in runs)} of {len(runs)})"
    return f"{run.name}: failed: {run.failure}" if run.failure else f"{run.name}: stopped, goes on next time"


def _work_done(runs):
    return sum(run.step_work * run.step for run in runs)


def main(argv: list[str]) -> int:
    """The exit status: 130 where the study was stopped, 1 where a run failed."""
    if "--help" in argv or "-h" in argv or not argv:
        print(__doc__, "Keys:\n", describe(Study), sep="\n")
        return 0
    with one_line_errors():
        study = configure(Study, argv)
        check_study(study)
        runs = [Run(study, keys) for keys in study.runs]
        interrupted = run_missing(runs, *slots(study.processes))
        finished = [run.out_dir for run in runs if run.finished]
        if interrupted:
            print(f"stopped, {len(finished)} of {len(runs)} runs finished; the same command goes on", file=sys.stderr)
            return 130
        if finished:
            arms, skipped = load_runs(finished)
            for line in skipped:
                print(f"skipped: {line}", file=sys.stderr)
            print(report(arms, study.tolerance))
            write_csv(arms, f"{study.out_dir}/table.csv")
            draw_comparison(arms, f"{study.out_dir}/comparison.png", study.tolerance)
            print(f"figure: {study.out_dir}/comparison.png")
        for run in runs:
            if run.failure:
                print(f"error: {one_line(f'{run.name}: {run.failure}')}", file=sys.stderr)
    return int(any(run.failure for run in runs))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
