"""Drop the syncs of a trained model (SPD, arXiv 2502.20727), and repair it.

$ python models/smollm2/prepare.py && python data/prose/prepare.py
$ python drop_syncs.py config/spd_smollm2.py
$ torchrun --standalone --nproc_per_node=3 drop_syncs.py config/spd_smollm2.py --tp_size=3

The model is the folder or hub name of a GPT-2 or Llama, or an out_dir of ours that was trained with all syncs. Its
blocks lose the sync after their attention (the pattern's 2 becomes 1), those that need it least first. The stages, each
of which you can switch off: arrange heads and neurons on the shards; measure each block's sensitivity; choose the
blocks; distil each dropped block to compute what it did before; finetune the whole model towards the one with all
syncs. out_dir/log.txt and dropping.png have the perplexity of the evaluation texts after each stage. sample.py reads
out_dir/ckpt.pt.

To continue after a stop, add --init_from=resume to the same command.
"""

from reduced_sync.cli import set_up

if __name__ == "__main__":  # before the imports that take seconds: Ctrl-C ends them in silence
    set_up(keeps_running=True)

import dataclasses
import datetime
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import reduced_sync_model as rsm
from reduced_sync import checkpoint as ckpt
from reduced_sync import distributed
from reduced_sync.cli import StopSignal
from reduced_sync.configurator import configure, option
from reduced_sync.distributed import RANK, WORLD_SIZE
from reduced_sync.files import lock_folder, replace_file
from reduced_sync.hf.tokenizer import write_pretrained
from reduced_sync.spd import distillation, placement, texts
from reduced_sync.spd.figures import draw_dropping
from reduced_sync.spd.log import perplexity_line, read_drop_log, sensitivity_line, table_of
from reduced_sync.spd.source import Source
from reduced_sync.train.log import RunLog
from reduced_sync.train.recorder import conditions

STAGES = ("arrange", "sensitivity", "drop", "distil", "finetune", "finished")
AFTER = {"drop": "dropped", "distil": "distilled", "finetune": "finetuned"}
MAY_CHANGE = "out_dir init_from tp_size device backend timeout_s checkpoint_minutes".split()  # at a resume


@dataclass
class Config:
    """Every key."""

    out_dir: str = option("out-spd", "folder of log.txt and the checkpoints", is_path=True)
    init_from: str = option("", "the model: a folder or hub name, or an out_dir of ours; or resume", is_path=True)
    n_shard: int = option(2, "shards that the model is cut into", least=1)
    # texts
    calibration: str = option(
        "", "text files, as a shell pattern; empty: train.bin of an out_dir's dataset", is_path=True
    )
    evaluation: str = option("", "text files, as a shell pattern; empty: val.bin of an out_dir's dataset", is_path=True)
    block_size: int = option(256, "tokens of a window, for calibration and evaluation", least=2)
    calibration_windows: int = option(128, "windows to distil on", least=1)
    evaluation_tokens: int = option(20480, "tokens of each evaluation text; 0: all", least=0)
    batch_size: int = option(8, "windows computed at once when nothing is trained", least=1)
    # stages
    arrange: str = option("affinity", "how neurons stand on shards", allowed=("as_is", "affinity"))
    arrange_heads: str = option(
        "affinity",
        "how KV groups stand on shards",
        allowed=("as_is", "affinity", "scatter"),
    )
    arrange_windows: int = option(16, "windows to arrange by", least=1)
    sensitivity_windows: int = option(40, "windows to measure sensitivity on; 0: drop the last blocks first", least=0)
    drop: int | None = option(None, "number of blocks that lose a sync; None: all", least=0)
    sync: str | None = option(None, "instead of `drop`: the pattern to drop to, of 2 and 1")
    max_loss_percent: float | None = option(
        None,
        "instead of `drop`: drop as many blocks as possible while calibration perplexity rises by at most this "
        "percentage (before repair)",
        least=0,
    )
    distil_epochs: int = option(4, "passes over the calibration windows for each dropped block; 0: none", least=0)
    distil_batch_size: int = option(4, "windows per step", least=1)
    distil_learning_rate: float = option(1e-4, "peak", least=0)
    finetune_steps: int = option(0, "steps that train the whole model towards the dense one's distributions", least=0)
    finetune_batch_size: int = option(4, "windows per step", least=1)
    finetune_learning_rate: float = option(1e-4, "peak", least=0)
    elastic: bool = option(False, "train dropped blocks with and without their sync, for any number of dropped blocks")
    curve: tuple = option((), "numbers of dropped blocks with which the result is evaluated as well")
    seed: int = option(1337, "for the order of windows, and for those that finetuning draws", least=0)
    # system
    tp_size: int = option(1, "tensor-parallel ranks", least=1)
    checkpoint_minutes: float = option(10.0, "minutes between checkpoints inside a stage", least=0)
    backend: str | None = option(None, "nccl or gloo; None: nccl on CUDA")
    device: str | None = option(None, "cuda, cuda:N or cpu; None: cuda where there is one")
    dtype: str | None = option(None, "float32, bfloat16 or float16; None: bfloat16 on CUDA, float32 on CPU")
    timeout_s: int = option(1800, "seconds that ranks wait for one another", least=1, below=10**6)


@dataclass
class Progress:
    """What is remembered from stage to stage besides the weights. A checkpoint has it, too."""

    stage: str = STAGES[0]  # the one to do next
    done: int = 0  # of its layers or steps
    groups: list = dataclasses.field(default_factory=list)  # the order of each layer's KV groups,
    neurons: list = dataclasses.field(default_factory=list)  # and of its neurons
    order: list = dataclasses.field(default_factory=list)  # layers, the least sensitive first
    sync: str = ""  # the rule that was chosen


class Prepared(NamedTuple):
    """What a run starts from."""

    hardware: tuple  # of distributed.choose_device
    source: Source
    saved: dict | None  # the checkpoint to go on from
    calibration: dict  # {name: token ids} of the texts to calibrate on,
    windows: dict  # and windows of them by the key that says how many
    evaluation: dict  # {name: windows} of the texts to evaluate on


def prepare(config: Config) -> Prepared:
    """Refuse what can be refused before a process group exists. Raises ValueError or OSError."""
    out_dir, saved = Path(config.out_dir), None
    if config.init_from == "resume":
        saved = ckpt.load(
            out_dir / "progress.pt", kinds=dict.fromkeys(("progress", "config", "model", "optimizer"), dict)
        )
        config.init_from = saved["config"]["init_from"]
        # distil_inputs: a key of older runs
        before, now = ({"distil_inputs": "teacher"} | keys for keys in (saved["config"], dataclasses.asdict(config)))
        if changed := [key for key in now if key not in MAY_CHANGE and now[key] != before.get(key)]:
            says = ", ".join(f"{key}={before.get(key)!r}, not {now[key]!r}" for key in changed)
            raise ValueError(f"{out_dir} was started with {says}: go on with the same, or choose another out_dir")
    elif any((out_dir / name).exists() for name in ("ckpt.pt", "progress.pt")):
        raise ValueError(f"out_dir={config.out_dir!r} holds a run already: --init_from=resume, or another out_dir")
    if not config.out_dir:
        raise ValueError("out_dir is empty: it must name a folder")
    if not config.init_from:
        raise ValueError("init_from is empty: it must name a trained model")
    if [config.drop, config.sync, config.max_loss_percent].count(None) < 2:
        raise ValueError("drop, sync and max_loss_percent are alternatives: choose one of them")
    source = Source(config.init_from)
    shape = rsm.GPTConfig(**source.fields | {"n_shard": config.n_shard})
    L, dp_size = shape.n_layer, WORLD_SIZE // config.tp_size
    if config.block_size > shape.block_size:
        raise ValueError(f"block_size={config.block_size} is above the {shape.block_size} positions of the model")
    if (config.drop or 0) > L or any(not isinstance(n, int) or not 0 <= n <= L for n in config.curve):
        raise ValueError(f"drop={config.drop}, curve={config.curve}: the model has {L} blocks")
    if config.sync is not None:
        rule = rsm.SyncRule.parse(config.sync, L)
        if rule.rival or set(rule.pattern) - set("12"):
            raise ValueError(f"sync={config.sync!r}: allowed are 2 and, for a dropped block, 1, one per layer")
    shape.check_tp_size(config.tp_size)
    if WORLD_SIZE % config.tp_size:
        raise ValueError(f"tp_size={config.tp_size} must divide {WORLD_SIZE} processes")
    for key in ("calibration_windows", "distil_batch_size", "finetune_batch_size"):
        if getattr(config, key) % dp_size:
            raise ValueError(f"{key}={getattr(config, key)} is not divisible by the {dp_size} replicas")
    hardware = distributed.choose_device(config.device, config.dtype, config.backend)
    calibration, evaluation = source.texts(config)
    T = config.block_size
    keys = ("arrange_windows", "calibration_windows", "sensitivity_windows")
    windows = {key: texts.spread_windows(calibration, n, T, key) for key in keys if (n := getattr(config, key))}
    evaluation = {name: texts.first_windows(ids, config.evaluation_tokens, T, name) for name, ids in evaluation.items()}
    return Prepared(hardware, source, saved, calibration, windows, evaluation)


class Stopped(Exception):
    """A signal has asked for a stop, and the run is saved."""


class Dropping:
    """One run: the model on its way through the stages."""

    def __init__(self, config, prepared):
        self.config = config
        hardware, self.source, saved, self.calibration, self.all_windows, self.evaluation = prepared
        self.windows = self.all_windows["calibration_windows"]
        self.layout = distributed.start(*hardware, config.tp_size, config.timeout_s)
        self.stop, self.last_save = StopSignal(), time.monotonic()
        self.progress = Progress(**saved["progress"]) if saved else Progress()
        self.model = self.build_arranged()
        self.optimizer = None
        self.log = None
        if RANK == 0:
            if saved is None:  # what a run left that had not saved
                (Path(config.out_dir) / "log.txt").unlink(missing_ok=True)
            self.log = RunLog(Path(config.out_dir) / "log.txt")
            self.log.header(self.header(resumed=saved is not None))
        for name, held_out in self.evaluation.items():
            ids = held_out.flatten().numpy()
            for other, known in self.calibration.items():
                if np.array_equal(known[: len(ids)], ids):
                    self.say(f"warning: the evaluation text {name!r} is the calibration text {other!r}: not held out")
        if saved and saved["model"]:
            ckpt.restore(saved, self.model)
        self.saved_optimizer = saved["optimizer"] if saved else {}

    def build_arranged(self) -> rsm.GPT:
        """The model with all syncs, arranged as far as progress says."""
        try:
            model = self.source.build(self.config.n_shard, self.layout.tp_group)
        except (OSError, ValueError) as error:
            raise distributed.SameOnAllRanks(str(error)) from None
        for i, (groups, neurons) in enumerate(zip(self.progress.groups, self.progress.neurons, strict=True)):
            dense = placement.permuted(placement.dense_block(model, i), model.config, groups, neurons)
            placement.set_dense_block(model, i, dense)
        return model.to(self.layout.device).eval()

    def header(self, resumed: bool) -> dict:
        """What describes the run, for its log."""
        began = "resumed" if resumed else "started"
        n = self.model.get_num_params(non_embedding=False)
        return {
            began: datetime.datetime.now().isoformat(" ", "seconds"),
            "model": self.source.name,
            "parameters": f"{n / 1e6:.2f}M ({n})",
            "layout": f"dp {self.layout.dp_size} x tp {self.layout.tp_size}",
            **conditions(self.layout),
            "calibration tokens": self.windows.numel(),
            "evaluation tokens": {name: windows.numel() for name, windows in self.evaluation.items()},
            "config": dataclasses.asdict(self.config),
        }

    def say(self, line: str) -> None:
        """A line of the log and of the terminal, on rank 0."""
        if self.log:
            self.log.line(line)
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def bar(self, items: Iterable) -> tqdm:
        """The items with a progress bar on rank 0's terminal."""
        return tqdm(items, desc=self.progress.stage, disable=None if RANK == 0 else True, leave=False)

    def evaluate(self, stage: str, pattern: str, stop: StopSignal | None = None) -> None:
        """Say the perplexities of all evaluation texts under a pattern, unless all ranks agree to `stop` before."""
        model, perplexities = self.model.with_sync(pattern), {}
        for name, windows in self.evaluation.items():
            loss = distillation.mean_loss(model, windows, self.config.batch_size, self.layout, stop)
            if loss is None:
                return
            perplexities[name] = math.exp(min(loss, 700.0))
        self.say(perplexity_line(stage, model.config.rule.syncs, 2 * len(pattern), perplexities))

    def save(self, final: bool = False) -> None:
        """Write progress.pt, and at the end ckpt.pt, which sample.py reads. Raises SameOnAllRanks where that fails."""
        self.last_save = time.monotonic()
        trained = self.progress.stage in STAGES[3:]  # before, the weights are the source's
        state = {"model": {}, "optimizer": {}}
        if trained and self.layout.dp_rank == 0:
            state = ckpt.gather(self.model, self.optimizer)
        error = ""
        if RANK == 0:
            state |= {"config": dataclasses.asdict(self.config), "progress": dataclasses.asdict(self.progress)}
            out_dir = Path(self.config.out_dir)
            try:
                if final:
                    model_args = dataclasses.asdict(self.model.with_sync(self.progress.sync).config)
                    state |= {"model_args": model_args, "data": self.source.meta}
                    if self.source.meta["tokenizer"] not in ("gpt2", "char"):
                        tokens = self.source.tokens
                        write_pretrained(tokens.pretrained, tokens.generation, out_dir / ckpt.TOKENIZER_FOLDER)
                    ckpt.save(state, out_dir, is_best=False)
                    (out_dir / "progress.pt").unlink(missing_ok=True)
                else:
                    replace_file(out_dir / "progress.pt", lambda file: torch.save(state, file))
            except (OSError, RuntimeError) as failure:
                error = f"saving to {out_dir} failed, what was saved before is whole: {failure}"
        distributed.raise_together(error)

    def step_done(self, done: int) -> None:
        """Remember that so much of the stage is done, and save where it is due. Raises Stopped."""
        self.progress.done = done
        due = RANK == 0 and time.monotonic() - self.last_save > self.config.checkpoint_minutes * 60
        asked = [self.stop.asked is not None, due]
        _, (stopping, due) = distributed.agree([], asked, self.layout.device)  # every rank decides alike
        if stopping or due:
            self.save()
        if stopping:
            raise Stopped

    def run(self) -> None:
        """All stages from where the run stands. Raises Stopped."""
        progress, stages = self.progress, [self.arrange, self.sensitivity, self.drop, self.distil, self.finetune]
        if (progress.stage, progress.done) == (STAGES[0], 0):
            self.evaluate("dense", "2" * self.model.config.n_layer, self.stop)
            if self.stop.agreed:
                self.save()
                raise Stopped
        for do, stage, following in zip(stages, STAGES, STAGES[1:], strict=False):
            if STAGES.index(stage) < STAGES.index(progress.stage):
                continue
            begin = time.monotonic()
            if n_tokens := do():
                self.say(f"{stage}: {time.monotonic() - begin:.1f} s, {n_tokens} tokens")
            progress.stage, progress.done = following, 0
            if stage == "drop" or (n_tokens and stage in AFTER):
                self.evaluate(AFTER[stage], self.pattern)
            if following != STAGES[-1]:
                self.save()
        last = "finetune" if self.config.finetune_steps else "distil" if self.config.distil_epochs else "drop"
        for n in self.config.curve:
            self.evaluate(AFTER[last], self.dropped(n))
        self.save(final=True)
        if RANK == 0:
            log = read_drop_log(Path(self.config.out_dir) / "log.txt")
            draw_dropping({"": log}, Path(self.config.out_dir) / "dropping.png")
            print(table_of({Path(self.config.out_dir).name: log}))

    @property
    def pattern(self) -> str:
        """Where the model syncs, once that is decided."""
        return rsm.SyncRule.parse(self.progress.sync, self.model.config.n_layer).pattern

    def dropped(self, n: int) -> str:
        """The pattern with the n blocks dropped that are first in order."""
        first = set(self.progress.order[:n])
        return "".join("1" if i in first else "2" for i in range(self.model.config.n_layer))

    # --- the stages: each returns the tokens it has used, 0 if it is left out. Those with steps raise Stopped

    @torch.no_grad()
    def arrange(self) -> int:
        """Order the heads and neurons of every layer, the dense function unchanged."""
        config, model, progress = self.config, self.model, self.progress
        if config.arrange == config.arrange_heads == "as_is" or config.n_shard == 1:
            return 0
        windows = self.all_windows["arrange_windows"]
        batches = [model.embed(idx.to(self.layout.device)) for idx in windows.split(config.batch_size)]
        for i in self.bar(range(model.config.n_layer)):
            if i >= len(progress.groups):
                by = config.arrange_heads, config.arrange
                groups, neurons = placement.arrange(model, i, batches, *by, self.layout)
                progress.groups.append(groups)
                progress.neurons.append(neurons)
                self.step_done(i + 1)
            with self.layout.autocast():
                batches = [model.run_blocks(x, range(i, i + 1)) for x in batches]
        return windows.numel()

    def sensitivity(self) -> int:
        """The order in which blocks are dropped."""
        L = self.model.config.n_layer
        self.progress.order = list(range(L))[::-1]
        if self.config.sensitivity_windows == 0:
            return 0
        windows = self.all_windows["sensitivity_windows"]
        batch_size, layout = self.config.batch_size, self.layout
        measured = distillation.sensitivities(self.model, windows, batch_size, layout, self.bar, self.stop)
        if measured is None:
            self.save()
            raise Stopped
        s, perplexities = measured
        for i in range(L):
            self.say(sensitivity_line(i, s[i], perplexities[i]))
        self.progress.order = sorted(range(L), key=lambda i: (s[i], i))
        return windows.numel()

    def drop(self) -> int:
        """The pattern."""
        config, L = self.config, self.model.config.n_layer
        self.progress.sync = config.sync or self.dropped(L if config.drop is None else config.drop)
        if config.max_loss_percent is not None:
            low, high = 0, L  # the largest number within the limit, taken to grow with the number
            limit = self.calibration_loss(0) + math.log(1 + config.max_loss_percent / 100)
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if self.calibration_loss(middle) <= limit else (low, middle - 1)
            self.progress.sync = self.dropped(low)
        self.say(f"pattern: {self.pattern}, order {' '.join(map(str, self.progress.order))}")
        return 0 if config.max_loss_percent is None else self.windows.numel()

    def calibration_loss(self, n: int) -> float:
        """Mean loss on the calibration windows with n blocks dropped."""
        model = self.model.with_sync(self.dropped(n))
        return distillation.mean_loss(model, self.windows, self.config.batch_size, self.layout)

    def distil(self) -> int:
        """Block to block: each dropped block learns what it computed before, on the same windows."""
        config, model, done = self.config, self.model, self.progress.done
        if config.distil_epochs == 0 or "1" not in self.pattern:
            return 0
        teacher = self.build_arranged() if done else model  # a layer not yet trained is the teacher's own
        mine = list(distillation.share(self.windows, config.batch_size, self.layout))
        with torch.no_grad():
            exact = torch.cat([teacher.embed(idx).cpu() for idx in mine])  # (windows, T, C)
        for i in self.bar(range(model.config.n_layer)):
            before = exact
            synced = (teacher if i < done else model).with_sync("baseline")
            exact = distillation.run_layer(synced, i, before, config.batch_size, self.layout)
            if i >= done:
                if self.pattern[i] == "1":
                    first, last = distillation.distil(model, i, before, exact, config, self.layout)
                    self.say(f"distil: block {i}, relative error {first:.3e} to {last:.3e}")
                self.step_done(i + 1)
        return self.windows.numel() * config.distil_epochs

    def finetune(self) -> int:
        """The whole model towards the distributions of the one with all syncs, on other windows at each step."""
        config, model, layout = self.config, self.model, self.layout
        if config.finetune_steps == 0 or "1" not in self.pattern:
            return 0
        teacher = self.build_arranged()
        descent = distillation.Descent(model, config.finetune_learning_rate, config.finetune_steps, layout)
        self.optimizer = descent.optimizer
        if self.progress.done:
            ckpt.restore_optimizer(self.saved_optimizer, model, self.optimizer)
        share = config.finetune_batch_size // layout.dp_size
        dropped = [i for i in self.progress.order if self.pattern[i] == "1"]
        for step in self.bar(range(self.progress.done, config.finetune_steps)):
            generator = torch.Generator().manual_seed(distributed.seed_of(config.seed, 1 << 20, step))
            idx = texts.random_windows(self.calibration, config.finetune_batch_size, config.block_size, generator)
            idx = idx[layout.dp_rank * share :][:share].to(layout.device)
            n = int(torch.randint(len(dropped) + 1, (), generator=generator)) if config.elastic else len(dropped)
            pattern = "".join("1" if i in dropped[:n] else "2" for i in range(model.config.n_layer))
            loss = distillation.divergence(model.with_sync(pattern), teacher, idx, layout)
            descent.update(step, loss)
            if step % 10 == 0:
                (mean,), _ = distributed.agree([loss.item()], [], layout.device)
                self.say(f"finetune: step {step}, divergence {mean:.4f}")
            self.step_done(step + 1)
        self.optimizer = None
        return config.finetune_steps * config.finetune_batch_size * config.block_size


def main(argv):
    with distributed.report_errors():
        config = configure(Config, argv, __doc__)
        prepared = prepare(config)
        lock = lock_folder(config.out_dir) if RANK == 0 else None
        try:
            Dropping(config, prepared).run()
        except Stopped:
            if RANK == 0:
                print("stopped and saved; go on with --init_from=resume", flush=True)
        distributed.end()
        del lock  # held until here


if __name__ == "__main__":
    main(sys.argv[1:])
