"""Train a reduced-sync GPT.

On one device, or on eight (each GPU a data-parallel replica that holds all shards):
$ python train_reduced_sync.py config/train_spd_12sync.py
$ torchrun --standalone --nproc_per_node=8 train_reduced_sync.py config/train_spd_12sync.py

On two CPU cores, with the Shakespeare characters, as two replicas or as two tensor-parallel ranks:
$ torchrun --standalone --nproc_per_node=2 train_reduced_sync.py config/train_spd_12sync.py config/on_cpu.py
$ torchrun --standalone --nproc_per_node=2 train_reduced_sync.py config/train_spd_12sync.py config/on_cpu.py --tp_size=2

To continue after a stop, add --init_from=resume to the same command. To follow runs and compare them:
$ tail -f out-*/log.txt
$ python compare.py out-*
"""

from reduced_sync.cli import set_up

if __name__ == "__main__":  # before the imports that take seconds: Ctrl-C ends them in silence
    set_up(keeps_running=True)

import contextlib
import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import reduced_sync_model as rsm
from reduced_sync import checkpoint as ckpt
from reduced_sync import distributed
from reduced_sync.cli import StopSignal
from reduced_sync.configurator import configure
from reduced_sync.data import Corpus, vocabulary_hash
from reduced_sync.distributed import RANK, RESTART_COUNT
from reduced_sync.files import lock_folder
from reduced_sync.hf.weights import GPT2_SHAPES, from_pretrained, pretrained_fields
from reduced_sync.train.experiment import Config, check_config, learning_rate_at, model_keys
from reduced_sync.train.log import changes, step_line
from reduced_sync.train.recorder import Recorder


def check_shape(config: Config, pretrained: rsm.GPTConfig, keys: set[str]) -> None:
    """Raise ValueError where the user wrote another shape than that of pretrained weights, which is `pretrained`."""
    differing = []
    for key in sorted(keys & config.given):
        value, written = getattr(pretrained, key), getattr(config, key)
        if value != (written or getattr(dataclasses.replace(pretrained, **{key: written}), key)):  # 0: by other keys
            differing.append(f"{key}={value!r}, not {written!r}")
    if differing:
        raise ValueError(f"init_from={config.init_from!r} has {'; '.join(differing)}: leave such keys out")


def vocabulary_warning(config: Config, meta: dict) -> str:
    """Raise ValueError where the dataset's ids stand for other tokens than those of the pretrained model.

    Returns a line where that cannot be seen, else an empty one.
    """
    name = config.init_from
    tokenizer = str(Path(name).absolute()) if Path(name).is_dir() else "gpt2" if name in GPT2_SHAPES else name
    hashes = {
        f"dataset={config.dataset!r}": vocabulary_hash(meta.get("tokenizer"), meta),
        f"init_from={name!r}": vocabulary_hash(tokenizer, meta),
    }
    if unknown := [key for key, value in hashes.items() if value is None]:
        return f"the vocabulary of {' and '.join(unknown)} could not be checked; assuming it matches"
    if len(set(hashes.values())) > 1:
        raise ValueError(f"{' and '.join(hashes)} have other tokens: prepare the data with the tokenizer of the model")
    return ""


class Prepared(NamedTuple):
    """What a run starts from."""

    device_choice: tuple  # of distributed.choose_device
    corpus: Corpus
    notes: dict  # for the log
    model_config: rsm.GPTConfig
    saved: dict | None  # the checkpoint to go on from


def prepare(config: Config) -> Prepared:
    """Refuse what can be refused before a process group exists: keys, device, data, the model's shape, a checkpoint.

    Raises ValueError.
    """
    path = Path(config.out_dir) / "ckpt.pt"
    there = sorted(Path(config.out_dir).glob("*.pt"))  # a run's last, previous and best, and drop_syncs.py's
    if RESTART_COUNT > 0:  # torchrun --max-restarts: go on instead of starting over
        config.init_from = "resume" if path.exists() else config.init_from
    elif config.init_from != "resume" and there and not config.eval_only:
        go_on = "go on with --init_from=resume, or" if path in there else f"{there[0].name};"
        raise ValueError(f"out_dir={config.out_dir!r} holds a run already: {go_on} choose another out_dir")
    saved = ckpt.load(path, ckpt.TRAINING_KEYS) if config.init_from == "resume" else None
    origin = saved["config"].get("init_from", "scratch") if saved else config.init_from
    shape, notes = {}, {}
    if origin not in ("scratch", "resume"):  # what the user does not write is the pretrained model's
        fields = saved["model_args"] if saved else pretrained_fields(origin)[1]
        with ckpt.usable(path) if saved else contextlib.nullcontext():
            pretrained = rsm.GPTConfig(**fields)
        free = {"block_size", "dropout"} | {"n_shard", "sync"} - fields.keys()  # a dense model takes any rule
        shape = {key: value for key, value in dataclasses.asdict(pretrained).items() if key not in free}
        keys = shape.keys() & vars(config).keys()
        if not saved:  # check_model sees to a checkpoint's
            check_shape(config, pretrained, keys - {"sync"})
        vars(config).update({key: shape[key] for key in keys - config.given})
    check_config(config)
    shape |= model_keys(vars(config))
    model_config = rsm.GPTConfig(**shape)
    model_config.check_tp_size(config.tp_size)
    corpus = Corpus(config.dataset, config.block_size)
    device_choice = distributed.choose_device(config.device, config.dtype, config.backend)
    if "vocab_size" not in shape:  # a multiple of 64 is fast on GPUs: GPT-2's 50257 tokens become 50304
        model_config.vocab_size = -(-corpus.meta["vocab_size"] // 64) * 64
    if corpus.meta["vocab_size"] > model_config.vocab_size:
        raise ValueError(f"dataset={config.dataset!r} has more tokens than {origin}: {model_config.vocab_size}")
    if saved:
        ckpt.check_model(saved, model_config, path)
        ckpt.check_data(saved, corpus.meta, path)
    elif origin != "scratch":
        if "sync" in fields and model_config.sync != pretrained.sync:
            notes["converted"] = (
                f"init_from={origin!r} was trained with sync={pretrained.sync!r}, now {model_config.sync!r}"
            )
        if unknown := vocabulary_warning(config, corpus.meta):
            notes["tokens"] = unknown
    if RANK == 0:
        for key, note in notes.items():
            print(f"{key}: {note}", file=sys.stderr)
    return Prepared(device_choice, corpus, notes, model_config, saved)


@dataclass
class Progress:
    """What a run remembers from step to step besides weights and optimizer. A checkpoint has it, too."""

    step: int = 0  # updates made
    evaluated: int = -1  # the last step that was evaluated
    best_val_loss: float = float("inf")
    skipped: int = 0  # updates whose loss or gradient was not finite: in all,
    bad_steps: int = 0  # and in a row


def build_model(config: Config, model_config: rsm.GPTConfig, layout: distributed.Layout) -> rsm.GPT:
    """The model, on its device, with initial or pretrained weights. Raises ErrorOnAllRanks where there are none."""
    if config.init_from in ("scratch", "resume"):
        return rsm.GPT(model_config, layout.tp_group).to(layout.device)
    free = {key: getattr(model_config, key) for key in ("block_size", "dropout", "n_shard", "sync")}
    try:
        return from_pretrained(config.init_from, layout.tp_group, **free).to(layout.device)
    except (OSError, ValueError) as error:
        raise distributed.ErrorOnAllRanks(str(error)) from None


class Trainer:
    """What a run trains: model, optimizer and progress, on every rank."""

    def __init__(self, config, layout, prepared):
        self.config, self.layout, self.corpus = config, layout, prepared.corpus
        torch.manual_seed(config.seed)
        self.model = model = build_model(config, prepared.model_config, layout)
        betas, device_type = (config.beta1, config.beta2), layout.device.type
        self.optimizer = self.model.configure_optimizers(config.weight_decay, config.learning_rate, betas, device_type)
        self.scaler = distributed.gradient_scaler(layout)
        self.progress, self.changed, self.last_save = Progress(), "", time.monotonic()
        # what a checkpoint and the log remember of the config; `changed` is in what a resumed run differs
        self.saved_config = dataclasses.asdict(config) | {"dtype": str(layout.dtype).removeprefix("torch.")}
        if prepared.saved is not None:
            self.resume(prepared.saved)

        def loss_of(x, y):  # without the logits: as an output of a compiled graph they would get a gradient, all zeros
            return model(x, y)[1]  # not self.model: in a circle the process group would outlive the run

        self.loss_of = torch.compile(loss_of) if distributed.should_compile(config.compile, device_type) else loss_of

    def resume(self, saved: dict) -> None:
        """Go on from a checkpoint."""
        ckpt.restore(saved, self.model, self.optimizer)
        if saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.progress = Progress(**{field.name: saved[field.name] for field in dataclasses.fields(Progress)})
        # where the weights came from at first
        self.saved_config["init_from"] = saved["config"].get("init_from", "scratch")
        self.changed = changes(self.saved_config | saved["config"], self.saved_config)

    @torch.no_grad()
    def evaluate(self, stop: StopSignal) -> list[float] | None:
        """Mean loss per token, in nats, of the fixed windows of train and val, or None where all agreed to stop."""
        config, layout, losses = self.config, self.layout, []
        distributed.share_replicated(self.model, rsm.is_sharded, layout.tp_group)
        self.model.eval()
        for split in ("train", "val"):
            total, count = 0.0, 0
            part = (layout.dp_rank, layout.dp_size)
            n_windows = len(self.corpus.evaluation_starts(split, config.eval_iters, config.batch_size))
            batches = self.corpus.evaluation_batches(split, config.eval_iters, config.batch_size, *part)
            for x, y, n in distributed.until_stopped(batches, n_windows, config.batch_size, layout, stop):
                with layout.autocast():
                    loss = self.loss_of(x.to(layout.device), y.to(layout.device))
                total, count = total + loss.item() * n, count + n
            if stop.agreed:
                return None
            total, count = distributed.sum_over_world([total, count], layout.device)
            losses.append(total / count)
        self.model.train()
        return losses

    def evaluate_and_save(self, stop: StopSignal, record: Recorder) -> bool:
        """Evaluate, and save what has been evaluated. False where all agreed to stop: the resumed run evaluates."""
        losses, progress, config = self.evaluate(stop), self.progress, self.config
        if losses is None:
            return False
        train_loss, val_loss = losses
        is_best = val_loss < progress.best_val_loss
        progress.evaluated, progress.best_val_loss = progress.step, min(progress.best_val_loss, val_loss)
        record.evaluation(progress.step, train_loss, val_loss)
        at_end = progress.step >= config.max_iters
        if progress.step > 0 and (is_best or config.always_save_checkpoint or at_end):
            self.save(is_best)
        return True

    def accumulate(self) -> tuple[float, float]:
        """Make the step's gradients: this replica's share of the global batch, then the mean over replicas, clipped.

        Returns the mean loss of this rank's micro-steps, and the norm of the gradient before clipping.
        """
        config, layout, device, step = self.config, self.layout, self.layout.device, self.progress.step
        torch.manual_seed(distributed.seed_of(config.seed, step, layout.dp_rank))  # of dropout: nothing to save
        windows = config.gradient_accumulation_steps * config.batch_size
        micro_steps = config.gradient_accumulation_steps // layout.dp_size
        total, share = torch.zeros((), device=device), (layout.dp_rank, layout.dp_size)
        for x, y in self.corpus.train_batches(config.seed, step, windows, config.batch_size, *share):
            if device.type == "cuda":
                x, y = x.pin_memory(), y.pin_memory()
            with layout.autocast():
                loss = self.loss_of(x.to(device, non_blocking=True), y.to(device, non_blocking=True)) / micro_steps
            self.scaler.scale(loss).backward()
            total += loss.detach()
        distributed.average_gradients(self.model, layout.dp_group)
        self.scaler.unscale_(self.optimizer)
        norm = distributed.clip_gradients(self.model, config.grad_clip, rsm.is_sharded, layout.tp_group)
        return total.item(), norm

    def update(self, is_finite: bool) -> None:
        """Update the weights by their gradients, or skip a step whose loss or gradient is not finite."""
        rate = learning_rate_at(self.config, self.progress.step)
        distributed.step_optimizer(self.optimizer, self.scaler, rate, is_finite)
        self.progress.bad_steps = 0 if is_finite else self.progress.bad_steps + 1
        self.progress.skipped += not is_finite

    def save(self, is_best: bool = False) -> None:
        """Write ckpt.pt, on rank 0. Raises ErrorOnAllRanks where that fails."""
        distributed.share_replicated(self.model, rsm.is_sharded, self.layout.tp_group)
        state = ckpt.gather(self.model, self.optimizer) if self.layout.dp_rank == 0 else {}
        error, out_dir = "", self.config.out_dir
        if RANK == 0:
            state |= {"model_args": dataclasses.asdict(self.model.config), "config": self.saved_config}
            state |= {"data": self.corpus.meta, "scaler": self.scaler.state_dict()} | dataclasses.asdict(self.progress)
            try:
                ckpt.save(state, out_dir, is_best)
            except OSError as failure:
                error = f"saving to {out_dir} failed, the checkpoint before it is whole: {failure}"
        distributed.raise_together(error)
        self.last_save = time.monotonic()


def train(config: Config, prepared: Prepared) -> None:
    """The loop, on every rank."""
    layout = distributed.start(*prepared.device_choice, config.tp_size, config.timeout_s)
    stop = StopSignal()
    trainer = Trainer(config, layout, prepared)
    progress = trainer.progress
    distributed.check_same([dataclasses.replace(config, out_dir=""), progress], layout.device)

    if config.eval_only:
        losses = trainer.evaluate(stop)
        if losses is None:
            sys.exit(130)
        if RANK == 0:
            print(step_line(progress.step, *losses), flush=True)
        return
    if progress.step > config.max_iters or progress.evaluated == config.max_iters:
        if RANK == 0:
            print(f"{config.out_dir}: finished already, at step {progress.step} of {config.max_iters}: nothing to do")
        return

    def save_and_end():
        trainer.save()
        record.close(f"stopped at step {progress.step} and saved; go on with --init_from=resume")

    record = Recorder(trainer, prepared.notes)
    while True:
        at_end = progress.step >= config.max_iters
        if (progress.step % config.eval_interval == 0 or at_end) and progress.evaluated < progress.step:
            with record.pause():
                if not trainer.evaluate_and_save(stop, record):
                    return save_and_end()
        if at_end:
            break

        # forward, backward and update; whatever a rank finds, every rank decides alike
        loss, norm = trainer.accumulate()
        is_due = RANK == 0 and 0 < config.checkpoint_minutes * 60 <= time.monotonic() - trainer.last_save
        (loss, norm), (stopping, is_due) = distributed.agree(
            [loss, norm], [stop.asked is not None, is_due], layout.device
        )
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        trainer.update(is_finite)
        record.update(progress.step, loss, norm, skipped=0 if is_finite else progress.skipped)
        if progress.bad_steps >= config.max_bad_steps:
            raise distributed.ErrorOnAllRanks(
                f"step {progress.step}: loss {loss}, gradient norm {norm}: the last {progress.bad_steps} steps were "
                "not finite; lower learning_rate or resume from an earlier checkpoint"
            )
        progress.step += 1

        if stopping:
            return save_and_end()
        if is_due:
            with record.pause():
                trainer.save()
    record.close()


def main(argv):
    with distributed.report_errors():
        config = configure(Config, argv, __doc__)
        prepared = prepare(config)
        lock = lock_folder(config.out_dir) if RANK == 0 and not config.eval_only else None
        train(config, prepared)
        distributed.end()
        del lock  # held until here


if __name__ == "__main__":
    main(sys.argv[1:])
