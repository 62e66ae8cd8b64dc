"""An experiment: every key of the training script, what it may be, and what follows from it."""

import dataclasses
import math
from dataclasses import dataclass

from reduced_sync.configurator import option
from reduced_sync.distributed import DTYPE_HELP, WORLD_SIZE, check_tp_size
from reduced_sync_model import GPTConfig, SyncRule


@dataclass
class Config:
    """Every key. The defaults are the 124M experiment on eight GPUs; names that nanoGPT has mean the same."""

    # files and logging
    out_dir: str = option("out", "folder of log.txt and the checkpoints", is_path=True)
    eval_interval: int = option(500, "steps between evaluations; there is always one at the last step", least=1)
    log_interval: int = option(10, "steps between `iter` lines", least=1)
    eval_iters: int = option(
        200, "fixed batches of each split in an evaluation; 0: all of val, and as many of train", least=0
    )
    eval_only: bool = option(False, "evaluate once and stop")
    always_save_checkpoint: bool = option(
        True, "save after every evaluation, not only after a new best validation loss"
    )
    checkpoint_minutes: float = option(0.0, "minutes between additional checkpoints; 0: none", least=0)
    init_from: str = option(
        "scratch", "scratch, resume, or the folder or hub name of a GPT-2, Llama, Mistral, Qwen or export", is_path=True
    )
    wandb_log: bool = option(False, "also log to Weights & Biases")
    wandb_project: str = option("reduced-sync", "project name in Weights & Biases")
    wandb_run_name: str | None = option(None, "run name in Weights & Biases; None: out_dir")
    # data: 12 sequences x 1024 tokens x 40 micro-steps = 491,520 tokens per step, shared by the data-parallel ranks
    dataset: str = option("openwebtext", "folder under data/, or an absolute path")
    gradient_accumulation_steps: int = option(40, "micro-steps per step, over all replicas together", least=1)
    batch_size: int = option(12, "sequences per micro-step", least=1)
    block_size: int = option(1024, "tokens of a sequence", least=1)
    # model
    sync: str = option("baseline", "baseline, spd, grouped-N (N syncs) or one of 2 1 0 a per layer, and maybe +METHOD")
    n_shard: int = option(2, "shards that the model is cut into: part of the architecture", least=1)
    n_layer: int = option(12, "layers", least=1)
    n_head: int = option(12, "attention heads of the whole model", least=1)
    n_embd: int = option(768, "width of the residual stream", least=1)
    dropout: float = option(0.0, "0 is usual for pretraining; above 0 needs tp_size 1", least=0)
    bias: bool = option(False, "biases in linear layers and layer norms")
    # the layers of Llama's family beside GPT-2's; config/modern.py sets them all
    norm: str = option("layernorm", "normalization", allowed=("layernorm", "rmsnorm"))
    position: str = option("learned", "a learned embedding, or rotary", allowed=("learned", "rope"))
    rope_theta: float = option(10000.0, "the base of rope's frequencies", least=1)
    mlp: str = option("gelu", "plain, or gated", allowed=("gelu", "swiglu"))
    n_hidden: int = option(
        0, "hidden width of the MLP; 0: chosen to match the parameter count of GPT-2's block", least=0
    )
    n_kv_head: int = option(0, "heads of keys and values; 0: n_head", least=0)
    tie_embeddings: bool = option(True, "share one matrix between input and output tokens")
    # AdamW and its schedule
    learning_rate: float = option(6e-4, "peak learning rate", least=0)
    max_iters: int = option(20000, "steps of the run", least=1)
    weight_decay: float = option(0.1, "on matrices and embeddings", least=0)
    beta1: float = option(0.9, "AdamW", least=0, below=1)
    beta2: float = option(0.95, "AdamW", least=0, below=1)
    grad_clip: float = option(1.0, "largest global norm of the gradient; 0: no clipping", least=0)
    decay_lr: bool = option(True, "cosine schedule; False: learning_rate throughout")
    warmup_iters: int = option(2000, "steps of linear warm-up", least=0)
    lr_decay_iters: int | None = option(None, "step at which min_lr is reached; None: max_iters", least=1)
    min_lr: float = option(6e-5, "learning rate at the end of the schedule; a tenth of learning_rate is usual", least=0)
    max_bad_steps: int = option(25, "stop after this many steps in a row whose loss or gradient is not finite", least=1)
    seed: int = option(1337, "for the initial weights, the batches and dropout", least=0)
    # system
    tp_size: int = option(1, "tensor-parallel ranks; 1 is fastest, and the result is the same", least=1)
    backend: str | None = option(None, "nccl or gloo; None: nccl on CUDA")
    device: str | None = option(None, "cuda, cuda:N or cpu; None: cuda where there is one")
    dtype: str | None = option(None, DTYPE_HELP)
    compile: bool | None = option(None, "torch.compile; None: on CUDA")
    timeout_s: int = option(
        600,
        "seconds that ranks wait for each other before the run ends",
        least=1,
        below=10**6,
    )


MODERN = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu"}  # config/modern.py's block


def model_keys(keys: dict) -> dict:
    """The fields of GPTConfig among an experiment's `keys`. What is missing is the vocabulary, which is the data's.

    The neurons of swiglu are by default as many as make a block's parameters those of GPT-2's, 12*n_embd^2: a multiple
    of 48, which can be cut into up to 16 shards.
    """
    shape = {field.name: keys[field.name] for field in dataclasses.fields(GPTConfig) if field.name in keys}
    if shape.get("mlp") == "swiglu" and not shape.get("n_hidden"):
        kv_heads = (shape.get("n_kv_head") or shape["n_head"]) / shape["n_head"]
        shape["n_hidden"] = max(1, round(shape["n_embd"] * (10 - 2 * kv_heads) / 3 / 48)) * 48
    return shape


def check_config(config: Config) -> None:
    """Raise ValueError for values and combinations, but of the model, that cannot be trained."""
    if not config.out_dir:
        raise ValueError("out_dir is empty: it must name a folder")
    rule = SyncRule.parse(config.sync, config.n_layer)
    if config.n_shard == 1 and not rule.method_name and str(rule) != "baseline":
        raise ValueError(
            f"sync={config.sync!r} would be the baseline with n_shard=1, which has no syncs: take --n_shard=2 or more"
        )
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
    check_tp_size(config.tp_size)
    if config.gradient_accumulation_steps % (dp_size := WORLD_SIZE // config.tp_size):
        raise ValueError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps} is not divisible by the {dp_size} "
            f"data-parallel replicas (world size {WORLD_SIZE} / tp_size {config.tp_size})"
        )


def learning_rate_at(config: Config, step: int) -> float:
    """Linear warm-up, then cosine decay to min_lr."""
    if not config.decay_lr:
        return config.learning_rate
    end = config.lr_decay_iters or config.max_iters
    return cosine_schedule(step, config.learning_rate, config.min_lr, config.warmup_iters, end)


def cosine_schedule(step: int, peak: float, least: float, warmup: int, end: int) -> float:
    """The learning rate at `step`: linear to `peak` in `warmup` steps, then a cosine down to `least` at step `end`."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if step > end:
        return least
    ratio = (step - warmup) / max(1, end - warmup)
    return least + 0.5 * (1 + math.cos(math.pi * ratio)) * (peak - least)
