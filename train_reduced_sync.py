"""Train a reduced-sync GPT.

On one device, then on eight (each GPU a data-parallel replica that holds all shards):
$ python train_reduced_sync.py config/train_spd_12sync.py
$ torchrun --standalone --nproc_per_node=8 train_reduced_sync.py config/train_spd_12sync.py

On two CPU cores, with the Shakespeare characters, as two replicas or as two tensor-parallel ranks:
$ torchrun --standalone --nproc_per_node=2 train_reduced_sync.py config/train_spd_12sync.py config/on_cpu.py
$ torchrun --standalone --nproc_per_node=2 train_reduced_sync.py config/train_spd_12sync.py config/on_cpu.py --tp_size=2

Go on after a stop: the same command and --init_from=resume. Then: tail -f out-*/log.txt; python compare.py out-*
"""

import dataclasses
import datetime
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import reduced_sync_model as rsm
from reduced_sync import checkpoint as ckpt
from reduced_sync import parallel
from reduced_sync.accelerators import model_flops_utilisation
from reduced_sync.commands import one_line, set_up, stop_signals
from reduced_sync.config import configure, describe, option
from reduced_sync.data import Corpus
from reduced_sync.parallel import LOCAL_WORLD_SIZE, RANK, RESTART_COUNT, WORLD_SIZE
from reduced_sync.run_log import RunLog, changes, drop_lines_after, iter_line, step_line
from reduced_sync.weights import GPT2_SHAPES, from_pretrained


@dataclass
class Config:
    """Every key. The defaults are the 124M experiment on eight GPUs; names and meanings are nanoGPT's."""

    # files and logging
    out_dir: str = option("out", "folder of log.txt and the checkpoints", is_path=True)
    eval_interval: int = option(500, "steps between evaluations; there is always one at the last step")
    log_interval: int = option(10, "steps between `iter` lines")
    eval_iters: int = option(200, "fixed batches of each split in an evaluation; 0: the whole of val, as many of train")
    eval_only: bool = option(False, "evaluate once and stop")
    always_save_checkpoint: bool = option(
        True, "save after every evaluation, not only when the validation loss is a new best"
    )
    checkpoint_interval: int = option(0, "steps between further checkpoints; 0: none")
    checkpoint_minutes: float = option(0.0, "minutes between further checkpoints; 0: none")
    init_from: str = option("scratch", "scratch, resume, gpt2, gpt2-medium, gpt2-large or gpt2-xl")
    wandb_log: bool = option(False, "log to Weights & Biases as well")
    wandb_project: str = option("reduced-sync", "its project")
    wandb_run_name: str | None = option(None, "its run name; None: out_dir")
    # data: 12 sequences x 1024 tokens x 40 micro-steps = 491,520 tokens a step, shared by the data-parallel ranks
    dataset: str = option("openwebtext", "folder under data/, or an absolute path")
    gradient_accumulation_steps: int = option(40, "micro-steps of a step, all replicas together")
    batch_size: int = option(12, "sequences of a micro-step")
    block_size: int = option(1024, "tokens of a sequence")
    # model
    architecture: str = option("baseline", "baseline, spd, grouped (layers_per_group) or selective (sync_pattern)")
    layers_per_group: int = option(0, "grouped: layers between two syncs")
    sync_pattern: str = option("", "selective: one of 2 1 0 a per layer")
    parallel_block: bool = option(False, "attention and MLP read the same stream; patterns of 1 and 0")
    merge: str = option("sum", "what a sync adds: the sum of the shards' deltas, or desync: their mean before the last")
    overlap: str = option("", "ladder or delayed: a sync is in flight while the next sublayer runs")
    n_shard: int = option(2, "shards that the transformer is cut into: part of the architecture")
    n_layer: int = option(12, "layers")
    n_head: int = option(12, "attention heads of the whole model")
    n_embd: int = option(768, "width of the residual stream")
    dropout: float = option(0.0, "for pretraining 0 is good; above 0 needs tp_size 1")
    bias: bool = option(False, "biases in linear layers and layer norms")
    # AdamW and its schedule
    learning_rate: float = option(6e-4, "peak learning rate")
    max_iters: int = option(20000, "steps of the run")
    weight_decay: float = option(0.1, "on matrices and embeddings")
    beta1: float = option(0.9, "AdamW")
    beta2: float = option(0.95, "AdamW")
    grad_clip: float = option(1.0, "largest global norm of the gradient; 0: no clipping")
    decay_lr: bool = option(True, "cosine schedule; False: learning_rate throughout")
    warmup_iters: int = option(2000, "steps of linear warm-up")
    lr_decay_iters: int | None = option(None, "step at which min_lr is reached; None: max_iters")
    min_lr: float = option(6e-5, "a tenth of learning_rate, as in Chinchilla")
    max_bad_steps: int = option(25, "stop after this many steps in a row with a non-finite loss or gradient")
    seed: int = option(1337, "of the initial weights, the batches and dropout")
    # system
    tp_size: int = option(1, "tensor-parallel ranks; 1 trains fastest, the result does not depend on it")
    backend: str | None = option(None, "nccl or gloo; None: nccl on CUDA")
    device: str | None = option(None, "cuda, cuda:N or cpu; None: cuda where there is one")
    dtype: str | None = option(None, "float32, bfloat16 or float16; None: bfloat16 on CUDA, float32 on CPU")
    compile: bool | None = option(None, "torch.compile; None: on CUDA")
    timeout_s: int = option(600, "seconds that ranks wait for one another, at the start and later, before the run ends")


def sync_pattern(config):
    """The validated pattern that the architecture keys ask for. Raises ValueError."""
    if config.architecture not in ("baseline", "spd", "grouped", "selective"):
        raise ValueError(
            f"architecture={config.architecture!r}: allowed are baseline, spd, grouped (with layers_per_group) and "
            "selective (with sync_pattern)"
        )
    if config.sync_pattern and config.architecture != "selective":
        raise ValueError(f"sync_pattern goes with architecture='selective', not {config.architecture!r}")
    if config.layers_per_group and config.architecture != "grouped":
        raise ValueError(f"layers_per_group goes with architecture='grouped', not {config.architecture!r}")
    if config.architecture == "grouped":
        return rsm.grouped(config.n_layer, config.layers_per_group)
    if config.architecture == "selective":
        return rsm.selective(config.n_layer, config.sync_pattern)
    return rsm.parse_pattern(config.architecture, config.n_layer)


def check(config):
    """Raise ValueError for values and combinations that cannot be trained, before any process group exists."""
    positive = "eval_interval log_interval gradient_accumulation_steps batch_size block_size n_layer n_head"
    not_negative = "eval_iters checkpoint_interval checkpoint_minutes weight_decay grad_clip warmup_iters"
    least = dict.fromkeys(f"{positive} n_embd n_shard tp_size max_bad_steps max_iters timeout_s".split(), 1)
    least |= dict.fromkeys(f"{not_negative} learning_rate min_lr seed beta1 beta2".split(), 0)
    if config.lr_decay_iters is not None:
        least["lr_decay_iters"] = 1
    limits = {"beta1": 1, "beta2": 1, "timeout_s": 10**6}  # 11 days
    for key, lowest in least.items():
        if not lowest <= getattr(config, key) < limits.get(key, 2**63):
            limit = limits.get(key, "2^63")
            raise ValueError(f"{key}={getattr(config, key)} must be at least {lowest}, and below {limit}")
    if not config.out_dir:
        raise ValueError("out_dir is empty: it must name a folder")
    if config.decay_lr and not config.eval_only:
        if config.min_lr > config.learning_rate:
            raise ValueError(
                f"min_lr={config.min_lr} is above learning_rate={config.learning_rate}: a tenth of it is usual, "
                f"--min_lr={config.learning_rate / 10:g}"
            )
        if config.warmup_iters > (end := min(config.max_iters, config.lr_decay_iters or config.max_iters)):
            raise ValueError(
                f"warmup_iters={config.warmup_iters} is past step {end}, where the run or its decay ends: for a short "
                f"run add --warmup_iters={end // 10}"
            )
    if config.init_from not in ("scratch", "resume", *GPT2_SHAPES):
        raise ValueError(f"init_from={config.init_from!r}: allowed are scratch, resume, {', '.join(GPT2_SHAPES)}")
    if config.n_shard % config.tp_size:
        raise ValueError(f"n_shard={config.n_shard} is not divisible by tp_size={config.tp_size}")
    if WORLD_SIZE % config.tp_size:
        raise ValueError(f"the world size, {WORLD_SIZE} processes, is not divisible by tp_size={config.tp_size}")
    if config.gradient_accumulation_steps % (dp_size := WORLD_SIZE // config.tp_size):
        raise ValueError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps} is not divisible by the {dp_size} "
            f"data-parallel replicas (world size {WORLD_SIZE} / tp_size {config.tp_size})"
        )
    if config.dropout > 0 and config.tp_size > 1:
        raise ValueError(
            f"dropout={config.dropout} with tp_size={config.tp_size}: ranks would drop differently; use tp_size=1"
        )
    if LOCAL_WORLD_SIZE % config.tp_size:
        raise ValueError(
            f"tp_size={config.tp_size} does not divide the {LOCAL_WORLD_SIZE} processes of a node: a TP group would "
            "span nodes"
        )


def learning_rate(config, step):
    """Linear warm-up, then cosine decay to min_lr."""
    if not config.decay_lr:
        return config.learning_rate
    end = config.lr_decay_iters or config.max_iters
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if step > end:
        return config.min_lr
    ratio = (step - config.warmup_iters) / max(1, end - config.warmup_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (config.learning_rate - config.min_lr)


@torch.no_grad()
def evaluate(model, loss_of, corpus, config, layout):
    """Mean loss per token, in nats, of the fixed windows of train and val; loss_of(x, y) is the model's. All ranks."""
    model.eval()
    losses = []
    for split in ("train", "val"):
        total, count = 0.0, 0
        part = (layout.dp_rank, layout.dp_size)
        for x, y, n in corpus.evaluation_batches(split, config.eval_iters, config.batch_size, *part):
            with layout.autocast():
                loss = loss_of(x.to(layout.device), y.to(layout.device))
            total, count = total + loss.item() * n, count + n
        total, count = parallel.sum_over_world([total, count], layout.device)
        losses.append(total / count)
    model.train()
    return losses


def _git(*arguments):
    """What git prints about the project's folder; nothing where there is no repository."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return ""


def describe_run(config, model, layout, meta, step):
    """The header of log.txt."""
    commit = _git("rev-parse", "--verify", "-q", "HEAD") or "unknown"
    dirty = _git("status", "--porcelain", "-uno")
    pattern, n_params = model.config.sync_pattern, model.get_num_params(non_embedding=False)
    most = 2 * model.config.n_layer
    payload = config.batch_size * config.block_size * config.n_embd * 4
    device = f"{layout.device.type} ({parallel.device_name(layout.device)})"
    return {
        "started" if step == 0 else f"resumed at step {step}": datetime.datetime.now().isoformat(" ", "seconds"),
        "architecture": config.architecture,
        "sync_pattern": pattern,
        "drawn": rsm.draw_pattern(pattern),
        "syncs": f"{model.num_syncs} of {most} ({100 * (1 - model.num_syncs / most):.1f}% fewer)",
        "blocking syncs": model.num_syncs - model.num_hidden_syncs,
        "hidden syncs": model.num_hidden_syncs,
        "parameters": f"{n_params / 1e6:.2f}M ({n_params})",
        "layout": f"dp {layout.dp_size} x tp {layout.tp_size}, {config.n_shard // layout.tp_size} shards a rank",
        "sync payload": f"float32, {payload} bytes"
        + (" (one rank holds all shards: nothing is sent)" if layout.tp_size == 1 else ""),
        "torch": torch.__version__,
        "git commit": commit + (" (dirty)" if dirty else ""),
        "device": f"{device}, {torch.get_num_threads()} threads a process",
        "dtype": str(layout.dtype).removeprefix("torch."),
        "train data": f"sha256 {meta.get('train_sha256', 'unknown')}",
        "val data": f"sha256 {meta.get('val_sha256', 'unknown')}",
        "tokens a step": config.gradient_accumulation_steps * config.batch_size * config.block_size,
        "config": dataclasses.asdict(config),
    }


class StopSignal:
    """A stop signal asks for a stop after the step; a second one, a second or more later, ends at once.

    torchrun passes a Ctrl-C on to workers that the terminal has already told: that echo is not a second one.
    """

    def __init__(self):
        self.asked = None
        for number in stop_signals():
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        if self.asked is None:
            self.asked = time.monotonic()
        elif time.monotonic() - self.asked > 1:
            os._exit(128 + number)


class WandB:
    """Weights & Biases, where asked for. Whatever fails there is said once and never stops the run."""

    def __init__(self, config):
        self.run = None
        if config.wandb_log:
            self.attempt(lambda: self.start(config))

    def start(self, config):
        import wandb

        sys.stdin = open(os.devnull)  # no terminal: without a login it would ask, and the other ranks wait
        name = config.wandb_run_name or config.out_dir
        self.run = wandb.init(project=config.wandb_project, name=name, config=dataclasses.asdict(config))

    def log(self, values, step):
        if self.run is not None:
            self.attempt(lambda: self.run.log(values, step=step))

    def attempt(self, action):
        try:
            action()
        except Exception as error:
            print(f"wandb failed, going on without it: {one_line(error)}", file=sys.stderr)
            self.run = None


def open_out_dir(config):
    """Make out_dir and lock it for as long as this process lives. Raises ValueError if it holds another run."""
    import fcntl  # not on Windows, where the start says so

    out_dir = Path(config.out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = open(out_dir / ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel releases it when its holder dies
    except BlockingIOError:
        raise ValueError(f"out_dir={config.out_dir!r} is in use by another live run") from None
    except OSError as error:
        raise ValueError(f"out_dir={config.out_dir!r} cannot be written: {error.strerror}") from None
    return lock


def prepare(config):
    """Refuse what can be refused before a process group exists: keys, device, data, the model's shape, a checkpoint.

    Returns (device choice, corpus, GPTConfig, checkpoint or None). Raises ValueError.
    """
    path = Path(config.out_dir) / "ckpt.pt"
    if RESTART_COUNT > 0 and path.exists():  # torchrun --max-restarts: go on instead of starting over
        config.init_from = "resume"
    elif config.init_from != "resume" and path.exists() and not config.eval_only:
        raise ValueError(
            f"out_dir={config.out_dir!r} holds a run already: go on with --init_from=resume, or choose another out_dir"
        )
    if pretrained := config.init_from in GPT2_SHAPES:
        config.n_layer, config.n_head, config.n_embd = GPT2_SHAPES[config.init_from]
        config.bias = True
    check(config)
    model_args = "block_size n_layer n_head n_embd dropout bias n_shard parallel_block merge overlap".split()
    model_config = rsm.GPTConfig(**{key: getattr(config, key) for key in model_args}, sync_pattern=sync_pattern(config))
    choice = parallel.choose_device(config.device, config.dtype, config.backend)
    corpus = Corpus(config.dataset, config.block_size)
    # a multiple of 64 is fast on GPUs: GPT-2's 50257 tokens become 50304
    model_config.vocab_size = 50257 if pretrained else -(-corpus.meta["vocab_size"] // 64) * 64
    if corpus.meta["vocab_size"] > model_config.vocab_size:
        raise ValueError(f"dataset={config.dataset!r} has more tokens than {config.init_from}: 50257")
    saved = None
    if config.init_from == "resume":
        saved = ckpt.load(path)
        ckpt.check_model(saved, model_config, path)
        ckpt.check_data(saved, corpus.meta, path)
    return choice, corpus, model_config, saved


def train(config, choice, corpus, model_config, saved):
    """The loop, on every rank."""
    layout = parallel.start(*choice, config.tp_size, config.timeout_s)
    device, on_rank_0 = layout.device, RANK == 0
    stop = StopSignal()
    torch.manual_seed(config.seed)
    if config.init_from in GPT2_SHAPES:
        theirs = ("vocab_size", "n_layer", "n_head", "n_embd", "bias")
        choices = {key: value for key, value in dataclasses.asdict(model_config).items() if key not in theirs}
        try:
            model = from_pretrained(config.init_from, layout.tp_group, **choices)
        except OSError as error:
            raise parallel.SameOnAllRanks(f"init_from={config.init_from!r}: {error}") from None
    else:
        model = rsm.GPT(model_config, layout.tp_group)
    model.to(device)
    optimizer = model.configure_optimizers(
        config.weight_decay, config.learning_rate, (config.beta1, config.beta2), device.type
    )
    scaler = parallel.gradient_scaler(layout)
    step, evaluated, best_val_loss = 0, -1, float("inf")
    skipped = bad_steps = 0  # updates whose loss or gradient was not finite: in all, and in a row
    settled = dataclasses.asdict(config) | {"dtype": str(layout.dtype).removeprefix("torch.")}
    changed = ""
    if saved is not None:
        ckpt.restore(saved, model, optimizer)
        if saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])
        step, evaluated, best_val_loss = saved["step"], saved["evaluated"], saved["best_val_loss"]
        skipped, bad_steps = saved["skipped"], saved["bad_steps"]
        changed = changes(settled | saved["config"], settled)
        del saved

    def loss_of(x, y):  # without the logits: as an output of a compiled graph their gradient would be made, all zeros
        return model(x, y)[1]

    if config.compile or (config.compile is None and device.type == "cuda"):
        loss_of = torch.compile(loss_of)
    name = parallel.device_name(device)

    if config.eval_only:
        train_loss, val_loss = evaluate(model, loss_of, corpus, config, layout)
        if on_rank_0:
            print(step_line(step, train_loss, val_loss), flush=True)
        return
    if step >= config.max_iters and evaluated == step:
        if on_rank_0:
            print(f"{config.out_dir}: finished already, at step {step} of {config.max_iters}: nothing to do")
        return
    log = wandb = bar = None
    if on_rank_0:
        path = Path(config.out_dir) / "log.txt"
        if path.exists():
            drop_lines_after(path, step, evaluated) if step else path.unlink()
        log, wandb = RunLog(path), WandB(config)
        log.header(describe_run(config, model, layout, corpus.meta, step))
        if changed:
            log.header({f"changed since step {step}": changed})
            print(f"resumed at step {step} with other settings: {changed}", flush=True)
        bar = tqdm(initial=step, total=config.max_iters, unit="step", disable=None, dynamic_ncols=True)

    def say(line, values):
        log.line(line)
        bar.write(line, file=sys.stdout)
        sys.stdout.flush()
        wandb.log(values, step)

    def save(is_best=False):
        state = ckpt.gather(model, optimizer) if layout.dp_rank == 0 else {}
        error = ""
        if on_rank_0:
            state |= {"model_args": dataclasses.asdict(model_config), "config": settled}
            state |= {"data": corpus.meta, "step": step, "evaluated": evaluated, "best_val_loss": best_val_loss}
            state |= {"skipped": skipped, "bad_steps": bad_steps}
            try:
                ckpt.save(state | {"scaler": scaler.state_dict()}, config.out_dir, is_best)
            except OSError as failure:
                error = f"saving to {config.out_dir} failed, the checkpoint before it is whole: {failure}"
        parallel.raise_together(error)

    micro_steps = config.gradient_accumulation_steps // layout.dp_size
    windows = config.gradient_accumulation_steps * config.batch_size
    last_save = last_log = time.monotonic()
    updates = 0  # since last_log
    while True:
        due = step % config.eval_interval == 0 or step == config.max_iters
        if due and evaluated < step:
            paused = time.monotonic()
            train_loss, val_loss = evaluate(model, loss_of, corpus, config, layout)
            evaluated, is_best = step, val_loss < best_val_loss
            best_val_loss = min(best_val_loss, val_loss)
            if on_rank_0:
                say(step_line(step, train_loss, val_loss), {"train/loss": train_loss, "val/loss": val_loss})
            if step > 0 and (is_best or config.always_save_checkpoint or step == config.max_iters):
                save(is_best)
                last_save = time.monotonic()
            last_log += time.monotonic() - paused  # an evaluation is no part of a step's time
        if step >= config.max_iters:
            break

        # one update: this replica's share of the global batch, gradients summed over its micro-steps
        torch.manual_seed(parallel.seed_of(config.seed, step, layout.dp_rank))  # of dropout: nothing to save
        lr = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=device)
        part = (layout.dp_rank, layout.dp_size)
        for x, y in corpus.train_batches(config.seed, step, windows, config.batch_size, *part):
            if device.type == "cuda":
                x, y = x.pin_memory(), y.pin_memory()
            with layout.autocast():
                loss = loss_of(x.to(device, non_blocking=True), y.to(device, non_blocking=True)) / micro_steps
            scaler.scale(loss).backward()
            total += loss.detach()
        parallel.average_gradients(model, layout.dp_group)
        scaler.unscale_(optimizer)
        norm = parallel.clip_gradients(model, config.grad_clip, rsm.is_sharded, layout.tp_group)
        save_due = on_rank_0 and 0 < config.checkpoint_minutes * 60 <= time.monotonic() - last_save
        signals = [total.item() / WORLD_SIZE, norm / WORLD_SIZE, float(stop.asked is not None), float(save_due)]
        loss, norm, stopping, save_due = parallel.sum_over_world(signals, device)  # every rank decides alike
        if math.isfinite(loss) and math.isfinite(norm):
            optimizer.step()  # scaler.step would look for what all ranks have just agreed on
            bad_steps = 0
        else:
            skipped, bad_steps = skipped + 1, bad_steps + 1
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        updates += 1
        if on_rank_0:
            bar.update()
            if step % config.log_interval == 0 or bad_steps:
                now = time.monotonic()
                seconds, tokens = (now - last_log) / updates, windows * config.block_size
                mfu = model_flops_utilisation(model, windows / layout.dp_size, seconds, name)
                values = {"train/iter_loss": loss, "lr": lr, "grad_norm": norm, "tok/s": tokens / seconds}
                say(iter_line(step, loss, seconds, tokens, norm, mfu, bad_steps and skipped), values)
                last_log, updates = now, 0
        if bad_steps >= config.max_bad_steps:
            raise parallel.SameOnAllRanks(
                f"step {step}: loss {loss}, gradient norm {norm}: the last {bad_steps} steps were not finite; lower "
                "learning_rate or resume from an earlier checkpoint"
            )
        step += 1
        if stopping or save_due or (config.checkpoint_interval and step % config.checkpoint_interval == 0):
            save()
            last_save = time.monotonic()
        if stopping:
            if on_rank_0:
                bar.close()
                print(f"stopped at step {step} and saved; go on with --init_from=resume", flush=True)
            return
    if on_rank_0:
        bar.close()
        log.close()


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__, "Keys, as lines of a config file (key = value) or as arguments:\n", describe(Config), sep="\n")
        return
    with parallel.clear_errors():
        config = configure(Config, argv)
        prepared = prepare(config)
        lock = open_out_dir(config) if RANK == 0 and not config.eval_only else None
        train(config, *prepared)
        if dist.is_initialized():
            dist.destroy_process_group()
        del lock  # held until here


if __name__ == "__main__":
    set_up(goes_on=True)
    main(sys.argv[1:])
