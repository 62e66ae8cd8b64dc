"""Drop the syncs of a trained model (SPD, arXiv 2502.20727), and repair it.

$ python models/smollm2/prepare.py && python data/prose/prepare.py
$ python drop_syncs.py config/spd_smollm2.py
$ torchrun --standalone --nproc_per_node=3 drop_syncs.py config/spd_smollm2.py --tp_size=3      # or tensor-parallel

The model is the folder or hub name of a GPT-2, Llama, Mistral or Qwen, or an out_dir of ours that was trained with all
syncs. The stages: arrange heads and neurons on the shards; drop the syncs that the model needs least, first those after
attention, then those after MLPs; distil each group of layers between two syncs to compute what it did before; finetune
the whole model towards its teacher, the model with all syncs; report how close it has come. out_dir/log.txt and
dropping.png have the perplexities of the evaluation texts on the way. sample.py reads out_dir/ckpt.pt.

To continue after a stop, add --init_from=resume to the same command.
"""

from reduced_sync.cli import set_up

if __name__ == "__main__":  # before the imports that take seconds: Ctrl-C ends them in silence
    set_up(keeps_running=True)

import dataclasses
import datetime
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator
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
from reduced_sync.decoding import cast_matrices
from reduced_sync.distributed import DTYPE_HELP, RANK, WORLD_SIZE
from reduced_sync.dropping import distillation, placement, quality, texts
from reduced_sync.dropping.figures import draw_dropping
from reduced_sync.dropping.log import agreement_line, perplexity_line, read_drop_log, sensitivity_line, table_of
from reduced_sync.dropping.source import Source
from reduced_sync.files import lock_folder, replace_file, set_aside
from reduced_sync.hf.tokenizer import write_pretrained
from reduced_sync.train.experiment import cosine_schedule
from reduced_sync.train.log import RunLog
from reduced_sync.train.recorder import environment

MAY_CHANGE = "out_dir init_from tp_size device compile checkpoint_minutes".split()  # at a resume
SEARCHED, SAME = 2**26, 64  # tokens of a calibration text in which the first ones of evaluation texts are looked for
TIMEOUT_S = 1800  # that ranks wait for one another: rank 0 writes the whole model


@dataclass
class Config:
    """Every key."""

    out_dir: str = option("out-spd", "folder of log.txt and the checkpoints", is_path=True)
    init_from: str = option("", "the model: a folder or hub name, or an out_dir of ours; or resume", is_path=True)
    n_shard: int = option(2, "shards that the model is cut into", least=1)
    # texts
    calibration: str = option("", "text files, as a shell pattern; empty: an out_dir's train.bin", is_path=True)
    evaluation: str = option("", "text files, as a shell pattern; empty: an out_dir's val.bin", is_path=True)
    block_size: int = option(256, "tokens of a window, for calibration and evaluation", least=2)
    evaluation_tokens: int = option(20480, "tokens of each evaluation text; 0: all", least=0)
    batch_size: int = option(8, "windows computed at once", least=1)
    # stages
    arrange: str = option("affinity", "how heads and neurons get to shards", allowed=("as_is", "affinity", "scatter"))
    calibration_windows: int = option(32, "windows by which heads, neurons and syncs are chosen", least=1)
    drop: int | None = option(None, "syncs to drop, those after attention first; None: all after attention", least=0)
    sync: str | None = option(None, "instead of `drop`: the pattern to end with, spelled as in training")
    distil_tokens: int = option(131072, "tokens to distil on; 0: leave it out", least=0)
    distil_learning_rate: float = option(3e-4, "peak", least=0)
    finetune_tokens: int = option(262144, "tokens to finetune on; 0: leave it out", least=0)
    finetune_learning_rate: float = option(3e-4, "peak", least=0)
    step_windows: int = option(8, "windows of an optimizer step, over all replicas together", least=1)
    seed: int = option(1337, "for the windows to train on", least=0)
    # system
    tp_size: int = option(1, "tensor-parallel ranks", least=1)
    checkpoint_minutes: float = option(10.0, "minutes between checkpoints inside a stage; 0: none", least=0)
    device: str | None = option(None, "cuda, cuda:N or cpu; None: cuda where there is one")
    dtype: str | None = option(None, DTYPE_HELP)
    compile: bool | None = option(None, "torch.compile for finetuning; None: on CUDA")


@dataclass
class Progress:
    """What is remembered from stage to stage besides the weights. A checkpoint has it, too."""

    stage: str = "dense"  # the one to do next, or that is being done
    done: int = 0  # of its layers or steps
    groups: list = dataclasses.field(default_factory=list)  # the order of each layer's KV groups,
    neurons: list = dataclasses.field(default_factory=list)  # and of its neurons
    sync: str = ""  # the rule that was chosen


class Prepared(NamedTuple):
    """What a run starts from."""

    device_choice: tuple  # of distributed.choose_device
    source: Source
    saved: dict | None  # the checkpoint to go on from
    calibration: dict  # {name: token ids} of the texts to calibrate on,
    windows: torch.Tensor  # and those of them to arrange and to choose by
    evaluation: dict  # {name: windows} of the texts to evaluate on
    inputs: dict  # {file or text: sha256}, which a resumed run must find again


def prepare(config: Config) -> Prepared:
    """Refuse what can be refused before a process group exists. Raises ValueError or OSError."""
    out_dir, saved = Path(config.out_dir), None
    device_choice = distributed.choose_device(config.device, config.dtype)
    config.dtype = str(device_choice[1]).removeprefix("torch.")  # what None comes to: a run keeps it on another device
    if config.init_from == "resume":
        if not (out_dir / "progress.pt").exists() and (out_dir / "ckpt.pt").exists():
            raise ValueError(f"{out_dir} has finished: nothing to do")
        kinds = dict.fromkeys(("progress", "config", "inputs", "model", "optimizer"), dict)
        saved = ckpt.load(out_dir / "progress.pt", kinds)
        before, now = saved["config"], dataclasses.asdict(config)
        before["dtype"] = before.get("dtype") or config.dtype  # what an older run did not settle
        if before.keys() != now.keys():
            raise ValueError(f"{out_dir / 'progress.pt'} was written by another version: choose another out_dir")
        config.init_from = before["init_from"]
        if changed := [key for key in now if key not in MAY_CHANGE and now[key] != before[key]]:
            says = ", ".join(f"{key}={before[key]!r}, not {now[key]!r}" for key in changed)
            raise ValueError(f"{out_dir} was started with {says}: go on with the same, or choose another out_dir")
    elif any((out_dir / name).exists() for name in ("ckpt.pt", "progress.pt")):
        raise ValueError(f"out_dir={config.out_dir!r} holds a run already: --init_from=resume, or another out_dir")
    if not config.out_dir:
        raise ValueError("out_dir is empty: it must name a folder")
    if not config.init_from:
        raise ValueError("init_from is empty: it must name a trained model")
    if config.drop is not None and config.sync is not None:
        raise ValueError("drop and sync are alternatives: choose one of them")
    source = Source(config.init_from)
    shape = rsm.GPTConfig(**source.fields | {"n_shard": config.n_shard})
    most, dp_size = 2 * shape.n_layer - 1, WORLD_SIZE // config.tp_size
    if config.block_size > shape.block_size:
        raise ValueError(f"block_size={config.block_size} is above the {shape.block_size} positions of the model")
    if (config.drop or 0) > most:
        raise ValueError(
            f"drop={config.drop}: of the model's {most + 1} syncs all but the last, {most}, can be dropped"
        )
    if config.sync is not None and (rule := rsm.SyncRule.parse(config.sync, shape.n_layer)).method_name:
        raise ValueError(f"sync={config.sync!r}: syncs can be dropped afterwards, but not made +{rule.method_name}")
    if config.n_shard == 1:
        raise ValueError("n_shard=1 has no syncs to drop: take 2 or more")
    shape.check_tp_size(config.tp_size)
    distributed.check_tp_size(config.tp_size)
    if config.step_windows % dp_size:
        raise ValueError(f"step_windows={config.step_windows} is not divisible by the {dp_size} replicas")
    calibration, evaluation = source.texts(config)
    inputs = source.hashes()
    for key, ids_of in (("calibration", calibration), ("evaluation", evaluation)):
        for name, ids in ids_of.items():
            inputs[f"{key} text {name}"] = hashlib.sha256(np.ascontiguousarray(ids)).hexdigest()
    if saved and (changed := sorted(dict(inputs.items() ^ saved["inputs"].items()))):
        raise ValueError(f"{out_dir} was started with other content of {', '.join(changed)}: choose another out_dir")
    T = config.block_size
    windows = texts.spread_windows(calibration, config.calibration_windows, T, "calibration_windows")
    evaluation = {name: texts.first_windows(ids, config.evaluation_tokens, T, name) for name, ids in evaluation.items()}
    return Prepared(device_choice, source, saved, calibration, windows, evaluation, inputs)


class Stopped(Exception):
    """A signal has asked for a stop, and the run is saved."""


class Run:
    """A model on its way through the stages: what they share, on every rank."""

    def __init__(self, config, prepared):
        self.config = config
        device_choice, self.source, saved, self.calibration, self.windows, self.evaluation, self.inputs = prepared
        self.layout = distributed.start(*device_choice, config.tp_size, TIMEOUT_S)
        self.stop, self.last_save = StopSignal(), time.monotonic()
        self.progress = Progress(**saved["progress"]) if saved else Progress()
        distributed.check_same([dataclasses.replace(config, out_dir=""), self.progress], self.layout.device)
        self.model, self.teacher = self.build(), None
        self.saved, self.optimizer, self.scaler = saved, None, None  # the last two of a stage that trains
        if saved and saved["model"]:
            ckpt.restore(saved, self.model)
        self.log = None
        if RANK == 0:
            if saved is None:  # what a run left that had not saved
                set_aside(Path(config.out_dir) / "log.txt")
            self.log = RunLog(Path(config.out_dir) / "log.txt")
            n = self.model.get_num_params(non_embedding=False)
            facts = {
                "resumed" if saved else "started": datetime.datetime.now().isoformat(" ", "seconds"),
                "model": self.source.name,
                "parameters": f"{n / 1e6:.2f}M ({n})",
                "layout": f"dp {self.layout.dp_size} x tp {self.layout.tp_size}",
                **environment(self.layout),
                "calibration tokens": {name: len(ids) for name, ids in self.calibration.items()},
                "evaluation tokens": {name: windows.numel() for name, windows in self.evaluation.items()},
                "config": dataclasses.asdict(config),
            }
            self.log.header(facts)
            self.warn_of_known_texts()

    def warn_of_known_texts(self) -> None:
        """Say which evaluation texts begin somewhere in a calibration text."""
        for other, known in self.calibration.items():
            data = np.asarray(known[:SEARCHED]).tobytes()
            for name, held_out in self.evaluation.items():
                if held_out.flatten()[:SAME].numpy().astype(known.dtype).tobytes() in data:
                    self.say(f"warning: evaluation text {name!r} begins in calibration text {other!r}: not held out")

    def build(self) -> rsm.GPT:
        """The model with all syncs, arranged as far as progress says."""
        try:
            model = self.source.build(self.config.n_shard, self.layout.tp_group)
        except (OSError, ValueError) as error:
            raise distributed.ErrorOnAllRanks(str(error)) from None
        for i, (groups, neurons) in enumerate(zip(self.progress.groups, self.progress.neurons, strict=True)):
            dense = placement.permuted(placement.dense_block(model, i), model.config, groups, neurons)
            placement.set_dense_block(model, i, dense)
        return model.to(self.layout.device).eval()

    def build_teacher(self) -> None:
        """The model with all syncs apart from the one that is trained; its layers' matrices in fewer bits, if any."""
        if self.teacher is None:
            self.teacher = self.build()
            for block in self.teacher.transformer.h:
                cast_matrices(block, self.layout.dtype)

    @property
    def student(self) -> rsm.GPT:
        """The model with the syncs that were chosen."""
        return self.model.with_sync(self.progress.sync)

    def say(self, line: str) -> None:
        """A line of the log and of the terminal, on rank 0."""
        if self.log:
            self.log.line(line)
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def bar(self, total: int, what: str = "", initial: int = 0) -> tqdm:
        """A progress bar over tokens, with their rate and the time left, on rank 0's terminal."""
        name = f"{self.progress.stage} {what}".strip()
        keys = dict(unit="tok", unit_scale=True, leave=False, dynamic_ncols=True)
        return tqdm(desc=name, total=total, initial=initial, disable=None if RANK == 0 else True, **keys)

    def batches(self, windows: torch.Tensor, what: str) -> Iterator[torch.Tensor]:
        """Yield this replica's part of the windows (N, T), batch by batch, on its device. Raises Stopped."""
        layout, size = self.layout, self.config.batch_size
        mine = [batch for batch in windows[layout.dp_rank :: layout.dp_size].split(size) if len(batch)]
        with self.bar(windows.numel(), what) as bar:
            for idx in distributed.until_stopped(mine, len(windows), size, layout, self.stop):
                yield idx.to(layout.device)
                bar.update(idx.numel() * layout.dp_size)
        if self.stop.agreed:
            self.save()
            raise Stopped

    def evaluate(self, stage: str, sync: str) -> None:
        """Say the perplexities of all evaluation texts under a rule. Raises Stopped."""
        model, perplexities = self.model.with_sync(sync), {}
        for name, windows in self.evaluation.items():
            loss = distillation.mean_loss(model, self.batches(windows, f"perplexity {name}"), self.layout)
            perplexities[name] = math.exp(min(loss, 700.0))
        self.say(perplexity_line(stage, model.config.rule.syncs, 2 * model.config.n_layer, perplexities))

    def save(self, final: bool = False) -> None:
        """Write progress.pt, and at the end ckpt.pt, which sample.py reads. Raises ErrorOnAllRanks where that fails."""
        self.last_save = time.monotonic()
        distributed.share_replicated(self.model, rsm.is_sharded, self.layout.tp_group)
        trained = self.progress.stage in ("distil", "finetune", "report")  # before, the weights are the source's
        state = {"model": {}, "optimizer": {}}
        if trained and self.layout.dp_rank == 0:
            state = ckpt.gather(self.model, self.optimizer)
        error, out_dir = "", Path(self.config.out_dir)
        if RANK == 0:
            state |= {"config": dataclasses.asdict(self.config), "progress": dataclasses.asdict(self.progress)}
            state |= {"inputs": self.inputs}
            try:
                if final:
                    state |= {"model_args": dataclasses.asdict(self.student.config), "data": self.source.meta}
                    if self.source.meta["tokenizer"] not in ("gpt2", "char"):
                        tokens = self.source.tokens
                        write_pretrained(tokens.pretrained, tokens.generation, out_dir / ckpt.TOKENIZER_FOLDER)
                    ckpt.save(state, out_dir, is_best=False)
                    (out_dir / "progress.pt").unlink(missing_ok=True)
                else:
                    state["scaler"] = self.scaler.state_dict() if self.scaler else {}
                    replace_file(out_dir / "progress.pt", lambda file: torch.save(state, file))
            except (OSError, RuntimeError) as failure:
                error = f"saving to {out_dir} failed, what was saved before is whole: {failure}"
        distributed.raise_together(error)

    def step_done(self) -> None:
        """Remember that one more layer or step is done, and save where it is due. Raises Stopped."""
        self.progress.done += 1
        due = RANK == 0 and 0 < self.config.checkpoint_minutes * 60 <= time.monotonic() - self.last_save
        asked = [self.stop.asked is not None, due]
        _, (stopping, due) = distributed.agree([], asked, self.layout.device)  # every rank decides alike
        if stopping or due:
            self.save()
        if stopping:
            raise Stopped


# ---------------------------------------------------------------------------------------------------------------------
# The stages: each goes on where progress.done says, and returns the tokens that it has used. They raise Stopped


@torch.no_grad()
def arrange(run: Run) -> int:
    """Order the heads and neurons of every layer, the dense function unchanged."""
    config, model, progress = run.config, run.model, run.progress
    if config.arrange == "as_is":
        return 0
    batches = [model.embed(idx.to(run.layout.device)) for idx in run.windows.split(config.batch_size)]
    with run.bar(model.config.n_layer * run.windows.numel()) as bar:
        for i in range(model.config.n_layer):
            if i >= progress.done:
                groups, neurons = placement.arrange(model, i, batches, config.arrange, run.layout)
                progress.groups.append(groups)
                progress.neurons.append(neurons)
                run.step_done()
            with run.layout.autocast():
                batches = [model.run_blocks(x, range(i, i + 1)) for x in batches]
            bar.update(run.windows.numel())
    return run.windows.numel()


def drop(run: Run) -> int:
    """Choose the pattern: as given, or with the least sensitive syncs dropped."""
    config, L, n_tokens = run.config, run.model.config.n_layer, 0
    if config.sync is not None:
        run.progress.sync = config.sync
    else:
        n = L if config.drop is None else config.drop
        before, after = ("2" * L, "1" * L) if n <= L else ("1" * L, "0" * (L - 1) + "1")
        n, n_layers = (n, L) if n <= L else (n - L, L - 1)  # of so many layers, n lose the sync in question
        order = list(range(n_layers))
        if 0 < n < n_layers:
            batches = run.batches(run.windows, "sensitivity")
            s, perplexities = distillation.sensitivities(run.model.with_sync(before), after, batches, run.layout)
            for i in range(n_layers):
                run.say(sensitivity_line("attention" if before[0] == "2" else "MLP", i, s[i], perplexities[i]))
            order.sort(key=lambda i: (math.isnan(s[i]), s[i], i))
            n_tokens = run.windows.numel()
        run.progress.sync = "".join(after[i] if i in order[:n] else before[i] for i in range(L))
    run.say(f"pattern: {run.student.config.rule.pattern}")
    run.evaluate("dropped", run.progress.sync)
    return n_tokens


def distil(run: Run) -> int:
    """Each group of layers learns to give what the teacher's gives for the teacher's input, all in the same steps."""
    groups = distillation.changed_groups(run.student.config.rule.pattern)
    modules = [distillation.part_of(run.model, layers) for layers in groups]
    return train(run, distillation.group_errors, modules, "distilled")


def finetune(run: Run) -> int:
    """All weights learn to give the teacher's distributions."""
    compile = distributed.should_compile(run.config.compile, run.layout.device.type)
    return train(run, distillation.divergences(compile), [run.model], "finetuned")


def report(run: Run) -> int:
    """Compare distributions and greedy text with the teacher's."""
    if run.student.config.sync == "baseline":
        return 0
    run.build_teacher()
    for name, windows in run.evaluation.items():
        batches, prompts = run.batches(windows, name), run.batches(quality.prompts_of(windows), f"{name}, greedy")
        divergence, same = quality.agreement(run.student, run.teacher, batches, run.layout)
        length = quality.agreed_length(run.student, run.teacher, prompts, run.layout)
        run.say(agreement_line(name, divergence, same, length, quality.CONTINUED))
    return sum(windows.numel() for windows in run.evaluation.values())


STAGES = dict(dense=lambda run: run.evaluate("dense", "baseline"))
STAGES |= dict(arrange=arrange, drop=drop, distil=distil, finetune=finetune, report=report)


def train(run: Run, losses: Callable, modules: list[torch.nn.Module], result: str) -> int:
    """Train the modules' parameters by AdamW on the stage's tokens, and evaluate the `result`. Raises Stopped.

    losses: (model, teacher, token ids, layout) -> one loss per module, a mean over the windows; its backward comes
    before the next loss. The learning rate: 5 % of the steps of warm-up to its peak, then a cosine to a tenth of it.
    Gradients are averaged over replicas, and each module's are clipped to norm 1. A step's windows are a function of
    (seed, stage, step).
    """
    config, layout, stage, first = run.config, run.layout, run.progress.stage, run.progress.done
    budget, peak = getattr(config, f"{stage}_tokens"), getattr(config, f"{stage}_learning_rate")
    student = run.student
    if budget == 0 or student.config.sync == "baseline":
        return 0
    run.build_teacher()
    share, tokens_of_step = config.step_windows // layout.dp_size, config.step_windows * config.block_size
    steps = -(-budget // tokens_of_step)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    run.optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    run.scaler = scaler = distributed.gradient_scaler(layout)
    if first:
        ckpt.restore_optimizer(run.saved["optimizer"], run.model, run.optimizer)
        scaler.load_state_dict(run.saved["scaler"])
    began = time.monotonic()
    with run.bar(steps * tokens_of_step, initial=first * tokens_of_step) as bar:
        for step in range(first, steps):
            generator = torch.Generator().manual_seed(distributed.seed_of(config.seed, list(STAGES).index(stage), step))
            idx = texts.random_windows(run.calibration, config.step_windows, config.block_size, generator)
            total = torch.zeros((), device=layout.device)
            for part in idx[layout.dp_rank * share :][:share].split(config.batch_size):
                for loss in losses(student, run.teacher, part.to(layout.device), layout):
                    loss = loss * (len(part) / share)
                    scaler.scale(loss).backward()
                    total += loss.detach() / len(modules)
            for module in modules:
                distributed.average_gradients(module, layout.dp_group)
            scaler.unscale_(run.optimizer)
            norms = [distributed.clip_gradients(module, 1.0, rsm.is_sharded, layout.tp_group) for module in modules]
            (mean, norm), _ = distributed.agree([total.item(), sum(norms)], [], layout.device)
            # of float16 the scale is lowered, and it goes on
            if not math.isfinite(norm) and not (scaler.is_enabled() and math.isfinite(mean)):
                raise distributed.ErrorOnAllRanks(
                    f"{stage}: step {step}: loss {mean}, gradient norm {norm}: lower {stage}_learning_rate"
                )
            rate = cosine_schedule(step, peak, peak / 10, max(1, steps // 20), steps)
            distributed.step_optimizer(run.optimizer, scaler, rate, math.isfinite(norm))
            bar.update(tokens_of_step)
            if step % max(1, steps // 10) == 0 or step + 1 == steps:
                speed = (step + 1 - first) * tokens_of_step / (time.monotonic() - began)
                run.say(f"{stage}: step {step} of {steps}, loss {mean:.4e}, {speed:.0f} tokens/s")
            run.step_done()
    run.optimizer = None
    run.evaluate(result, run.progress.sync)
    return steps * tokens_of_step


def drop_syncs(run: Run) -> None:
    """All stages from where the run stands. Raises Stopped."""
    progress, names = run.progress, list(STAGES)
    for stage in names[names.index(progress.stage) :]:
        progress.stage, begin = stage, time.monotonic()
        if n_tokens := STAGES[stage](run):
            run.say(f"{stage}: {time.monotonic() - begin:.1f} s, {n_tokens} tokens")
        progress.done = 0
        if stage != names[-1]:
            progress.stage = names[names.index(stage) + 1]
            run.save()
    run.save(final=True)
    if RANK == 0:
        out_dir = Path(run.config.out_dir)
        log = read_drop_log(out_dir / "log.txt")
        draw_dropping(log, out_dir / "dropping.png")
        print(table_of({out_dir.name: log}))


def main(argv):
    with distributed.report_errors():
        config = configure(Config, argv, __doc__)
        prepared = prepare(config)
        lock = lock_folder(config.out_dir) if RANK == 0 else None
        try:
            drop_syncs(Run(config, prepared))
        except Stopped:
            if RANK == 0:
                print("stopped and saved; go on with --init_from=resume", flush=True)
        distributed.end()
        del lock  # held until here


if __name__ == "__main__":
    main(sys.argv[1:])
