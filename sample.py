"""Generate text from a trained model, or from a pretrained GPT-2, Llama, Mistral, Qwen2 or Qwen3.

$ python sample.py --out_dir=out-spd-12sync --start="To be"
$ python sample.py --init_from=gpt2 --start=FILE:prompt.txt --num_samples=3      # FILE:- is standard input
$ python sample.py --init_from=FOLDER_OR_HUB_NAME                  # a model of save_pretrained or of export.py

Tensor-parallel, with any number of processes that divides the model's n_shard; the text is the same. The `--` keeps
torchrun from taking --start for an option of its own:
$ torchrun --standalone --nproc_per_node=2 -- sample.py --out_dir=out-spd-12sync --start="To be"

The first sample is printed as it is generated; the others are computed in the same batch and follow. Keys as in
nanoGPT.
"""

from reduced_sync.cli import set_up

if __name__ == "__main__":  # before the imports that take seconds: Ctrl-C ends them in silence
    set_up()

import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import reduced_sync_model as rsm
from reduced_sync import checkpoint as ckpt
from reduced_sync import distributed, preparing
from reduced_sync.configurator import configure, option
from reduced_sync.decoding import cast_matrices, for_decoding, generate, sample_tokens
from reduced_sync.distributed import DTYPE_HELP, RANK, WORLD_SIZE
from reduced_sync.hf.tokenizer import Tokens, pretrained_meta
from reduced_sync.hf.weights import from_pretrained, pretrained_fields


@dataclass
class Config:
    """Every key; names, meanings and most defaults are nanoGPT's."""

    init_from: str = option(
        "resume",
        "resume: out_dir's ckpt.pt; or folder or hub name of a GPT-2, Llama, Mistral, Qwen or export",
        is_path=True,
    )
    out_dir: str = option("out", "folder of the checkpoint", is_path=True)
    start: str = option("\n", "the prompt; FILE:NAME reads it from a file, FILE:- from standard input")
    num_samples: int = option(1, "number of samples, computed as one batch", least=1)
    max_new_tokens: int = option(500, "most tokens of a sample; an end-of-text token ends it earlier", least=1)
    temperature: float = option(0.8, "lower: more predictable, higher: more varied; 0: the likeliest token", least=0)
    top_k: int = option(200, "choose among this many of the likeliest tokens; 0: among all", least=0)
    top_p: float = option(1.0, "choose among the likeliest tokens that add up to this probability; 1: among all")
    seed: int = option(1337, "for the random choices", least=0)
    device: str | None = option(None, "cuda, cuda:N or cpu; None: cuda where there is one")
    dtype: str | None = option(None, DTYPE_HELP)
    compile: bool = option(False, "torch.compile: takes a minute to start, and then is faster on some machines")
    backend: str | None = option(None, "nccl or gloo; None: nccl on CUDA")


def check_config(config: Config) -> None:
    """Raise ValueError for values that mean nothing."""
    if 0 < config.temperature < 0.001:
        raise ValueError(f"temperature={config.temperature} must be 0, for the likeliest token, or at least 0.001")
    if not 0 < config.top_p <= 1:
        raise ValueError(f"top_p={config.top_p} must be above 0 and at most 1")


def load(config: Config) -> tuple[dict | None, rsm.GPTConfig, dict]:
    """(checkpoint or None, GPTConfig, meta of the tokens) of what config names. Raises ValueError or OSError."""
    if config.init_from != "resume":
        _, fields = pretrained_fields(config.init_from)
        model_config = rsm.GPTConfig(**{"n_shard": WORLD_SIZE} | fields)
        saved, meta = None, pretrained_meta(config.init_from, model_config.vocab_size)
    else:
        saved, model_config, meta = ckpt.load_with_tokens(Path(config.out_dir) / "ckpt.pt")
    if model_config.n_shard % WORLD_SIZE:
        name = config.init_from if saved is None else Path(config.out_dir) / "ckpt.pt"
        raise ValueError(f"n_shard={model_config.n_shard} of {name} is not divisible by {WORLD_SIZE} processes")
    return saved, model_config, meta


def build(config: Config, saved: dict | None, model_config: rsm.GPTConfig, layout: distributed.Layout) -> rsm.GPT:
    """The model on its device, in its number type. A dense one has as many shards as there are processes."""
    if saved is not None:
        model = rsm.GPT(model_config, layout.tp_group)
        ckpt.restore(saved, model)
    else:
        try:
            model = from_pretrained(config.init_from, layout.tp_group, n_shard=model_config.n_shard)
        except (OSError, ValueError) as error:
            raise distributed.ErrorOnAllRanks(str(error)) from None
    cast_matrices(model.eval().to(layout.device), layout.dtype)
    return for_decoding(model, config.compile)


def read_prompt(start: str) -> str:
    """The text that the key `start` asks for. Raises ValueError where there is none."""
    if not start.startswith("FILE:"):
        return preparing.decode_text(start.encode(errors="surrogateescape"), f"start={start!r}")
    name = start.removeprefix("FILE:")
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(os.path.expanduser(name)).read_bytes()
    except OSError as error:
        raise ValueError(f"start={start!r} cannot be read: {error}") from None
    return preparing.decode_text(data, f"start={start!r}")


def prompt_ids(config: Config, tokens: Tokens, block_size: int) -> list[int]:
    """The prompt's token ids, the same on every rank: rank 0 reads it. Raises ValueError on all where there is none."""
    answer = None
    if RANK == 0:
        try:
            ids = tokens.encode(read_prompt(config.start))
            if not ids:
                raise ValueError(f"start={config.start!r}: the prompt is empty")
            if len(ids) > block_size:
                print(f"the prompt has {len(ids)} tokens: its last {block_size}, a block, are used", file=sys.stderr)
            answer = ids[-block_size:]
        except ValueError as error:
            answer = str(error)
    answer = distributed.from_rank_0(answer)
    if isinstance(answer, str):
        raise distributed.ErrorOnAllRanks(answer)
    return answer


def sample(config: Config, model: rsm.GPT, tokens: Tokens, vocab_size: int, layout: distributed.Layout) -> None:
    """Generate and, on rank 0, print."""
    prompt = prompt_ids(config, tokens, block_size := model.config.block_size)
    if RANK == 0 and len(prompt) + config.max_new_tokens > block_size:
        print(f"past {block_size} tokens, a block, the window slides and each token takes longer", file=sys.stderr)
    idx = torch.tensor([prompt] * config.num_samples, device=layout.device)
    generator = torch.Generator(layout.device).manual_seed(config.seed)  # on every rank: all choose the same tokens
    suppressed = [token for token in tokens.suppressed if token < vocab_size]
    suppressed = torch.tensor(suppressed, dtype=torch.long, device=layout.device)
    keys = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    pick = partial(sample_tokens, **keys, generator=generator)

    def pick_finite(logits):
        if not logits.isfinite().all():
            raise distributed.ErrorOnAllRanks(
                "the model's logits are not finite: its training diverged, or dtype is too narrow for it"
            )
        return pick(logits.index_fill(1, suppressed, float("-inf")))

    text_of = tokens.decoder(prompt)

    def say(text):
        if RANK == 0:
            print(text, end="", flush=True)

    say(tokens.decode(prompt))
    samples = [[] for _ in range(config.num_samples)]
    ended = [False] * config.num_samples
    # ids that no text has, the padding of the vocabulary, are never chosen
    for new in generate(
        model, idx, config.max_new_tokens, lambda logits: pick_finite(logits[:, :vocab_size]), layout.autocast
    ):
        for i, token in enumerate(new.tolist()):
            ended[i] = ended[i] or token in tokens.ends
            if not ended[i]:
                samples[i].append(token)
                if i == 0:
                    say(text_of(token))
        if all(ended):
            break
    say(text_of(None) + "\n---------------\n")
    for others in samples[1:]:
        say(tokens.decode(prompt + others) + "\n---------------\n")


def main(argv):
    with distributed.report_errors():
        config = configure(Config, argv, __doc__)
        check_config(config)
        saved, model_config, meta = load(config)
        choice = distributed.choose_device(config.device, config.dtype, config.backend)
        tokens = Tokens(meta, model_config.vocab_size)
        layout = distributed.start(*choice, tp_size=WORLD_SIZE, timeout_s=600)
        model = build(config, saved, model_config, layout)
        sample(config, model, tokens, meta["vocab_size"], layout)
        distributed.end()


if __name__ == "__main__":
    main(sys.argv[1:])
