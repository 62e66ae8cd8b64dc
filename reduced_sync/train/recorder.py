"""What a run leaves to be read: log.txt, the terminal, Weights & Biases. Only rank 0 writes."""

import contextlib
import dataclasses
import datetime
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import reduced_sync_model as rsm
from reduced_sync import distributed
from reduced_sync.cli import one_line
from reduced_sync.files import set_aside
from reduced_sync.hardware import ACCELERATORS
from reduced_sync.train.experiment import Config, learning_rate_at
from reduced_sync.train.log import RunLog, drop_lines_after, iter_line, step_line


def _git(*arguments):
    """What git prints about the project's folder; nothing where there is no repository."""
    command = ["git", "-C", str(Path(__file__).parents[2]), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return ""


def environment(layout: distributed.Layout) -> dict:
    """What a run's numbers depend on besides its config, for the header of its log: code, device and float type."""
    commit = _git("rev-parse", "--verify", "-q", "HEAD") or "unknown"
    dirty = _git("status", "--porcelain", "-uno")
    device = f"{layout.device.type} ({distributed.device_name(layout.device)})"
    return {
        "torch": torch.__version__,
        "git commit": commit + (" (dirty)" if dirty else ""),
        "device": f"{device}, {torch.get_num_threads()} threads per process",
        "dtype": str(layout.dtype).removeprefix("torch."),
    }


def header_of(config: Config, model: rsm.GPT, layout: distributed.Layout, meta: dict, step: int) -> dict:
    """The header of log.txt, which describes the run. config.init_from says where its weights first came from."""
    rule, n_params = model.config.rule, model.get_num_params(non_embedding=False)
    most = 2 * model.config.n_layer
    payload = config.batch_size * config.block_size * config.n_embd * 4
    return {
        "started" if step == 0 else f"resumed at step {step}": datetime.datetime.now().isoformat(" ", "seconds"),
        "sync": rule,
        "drawn": rule.diagram,
        "syncs": f"{rule.syncs} of {most} ({100 * (1 - rule.syncs / most):.1f}% fewer)",
        "hidden syncs": rule.hidden,
        "parameters": f"{n_params / 1e6:.2f}M ({n_params})",
        "vocab_size": model.config.vocab_size,  # sizes that the config does not have
        "head_size": model.config.head_size,
        "layout": f"dp {layout.dp_size} x tp {layout.tp_size}, {config.n_shard // layout.tp_size} shards per rank",
        "sync payload": f"float32, {payload} bytes"
        + (" (one rank holds all shards: nothing is sent)" if layout.tp_size == 1 else ""),
        **environment(layout),
        "train data": f"sha256 {meta.get('train_sha256', 'unknown')}",
        "val data": f"sha256 {meta.get('val_sha256', 'unknown')}",
        "tokens a step": config.gradient_accumulation_steps * config.batch_size * config.block_size,
        "config": dataclasses.asdict(config),
    }


class WandB:
    """Weights & Biases, where asked for. Whatever fails there is said once and never stops the run."""

    def __init__(self, config):
        self.run = None
        if config.wandb_log:
            self.attempt(lambda: self.start(config))

    def start(self, config: Config) -> None:
        """Open the run there."""
        import wandb

        sys.stdin = open(os.devnull)  # no terminal: without a login it would ask, and the other ranks wait
        name = config.wandb_run_name or config.out_dir
        self.run = wandb.init(project=config.wandb_project, name=name, config=dataclasses.asdict(config))

    def log(self, values: dict, step: int) -> None:
        """Send {name: number} of `step`, where there is a run."""
        if self.run is not None:
            self.attempt(lambda: self.run.log(values, step=step))

    def attempt(self, action: Callable[[], None]) -> None:
        """Do it; where it fails, say why and go on without Weights & Biases."""
        try:
            action()
        except Exception as error:
            print(f"wandb failed, going on without it: {one_line(error)}", file=sys.stderr)
            self.run = None


def model_flops_utilization(model: rsm.GPT, sequences: float, seconds: float, device_name: str) -> float | None:
    """MFU: the share of its device's bfloat16 peak that one rank attains, or None where the peak is not known.

    sequences: those of block_size that this rank's TP group trains on in so many seconds. Flops as in PaLM (arXiv
    2204.02311, appendix B).
    """
    peak = next((a.peak_flops for name, a in ACCELERATORS.items() if name in device_name), None)
    if peak is None:
        return None
    c = model.config
    flops_per_token = 6 * model.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size
    return flops_per_token * c.block_size * sequences / model.tp_size / seconds / peak


class Recorder:
    """Writes the lines of a training script's Trainer, on rank 0; on the others it does nothing.

    `notes`: what else its log is to say at its head.
    """

    def __init__(self, trainer: Any, notes: dict):
        self.config, self.model, self.layout = config, model, layout = trainer.config, trainer.model, trainer.layout
        self.device_name = distributed.device_name(layout.device)
        self.last, self.updates = time.monotonic(), 0  # the last `iter` line, and the updates since
        self.log = None
        if distributed.RANK > 0:
            return
        path, step = Path(config.out_dir) / "log.txt", trainer.progress.step
        if path.exists():
            drop_lines_after(path, step, trainer.progress.evaluated) if step else set_aside(path)
        self.log, self.wandb = RunLog(path), WandB(config)
        origin = dataclasses.replace(config, init_from=trainer.saved_config["init_from"])
        self.log.header(header_of(origin, model, layout, trainer.corpus.meta, step) | notes)
        if trainer.changed:
            self.log.header({f"changed since step {step}": trainer.changed})
            print(f"resumed at step {step} with other settings: {trainer.changed}", flush=True)
        self.bar = tqdm(initial=step, total=config.max_iters, unit="step", disable=None, dynamic_ncols=True)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside, a checkpoint above all, is no part of a step's time; the log is on the disk before."""
        begin = time.monotonic()
        if self.log:
            self.log.sync()
        yield
        self.last += time.monotonic() - begin

    def evaluation(self, step: int, train_loss: float, val_loss: float) -> None:
        """The line of an evaluation after `step` updates; losses in nats per token. Raises OSError."""
        if self.log:
            self._say(step_line(step, train_loss, val_loss), {"train/loss": train_loss, "val/loss": val_loss}, step)
            self.log.sync()

    def update(self, step: int, loss: float, norm: float, skipped: int) -> None:
        """The line of update `step` where it is due: at every log_interval, and where it was skipped.

        `skipped`: the number of updates skipped so far where this is one of them, else 0. `norm`: that of the
        gradient before clipping. Raises OSError.
        """
        self.updates += 1
        if not self.log:
            return
        self.bar.update()
        if step % self.config.log_interval == 0 or skipped:
            now, c = time.monotonic(), self.config
            seconds, windows = (now - self.last) / self.updates, c.gradient_accumulation_steps * c.batch_size
            mfu = model_flops_utilization(self.model, windows / self.layout.dp_size, seconds, self.device_name)
            tokens = windows * c.block_size
            values = {"train/iter_loss": loss, "lr": learning_rate_at(c, step), "grad_norm": norm}
            line = iter_line(step, loss, seconds, tokens, norm, mfu, skipped)
            self._say(line, values | {"tok/s": tokens / seconds}, step)
            self.last, self.updates = now, 0

    def close(self, message: str = "") -> None:
        """The end of the run, and a last line on the terminal."""
        if self.log:
            self.bar.close()
            self.log.close()
            if message:
                print(message, flush=True)

    def _say(self, line, values, step):
        self.log.line(line)
        self.bar.write(line, file=sys.stdout)
        sys.stdout.flush()
        self.wandb.log(values, step)
