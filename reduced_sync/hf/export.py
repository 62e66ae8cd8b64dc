"""A checkpoint as a Hugging Face folder: config.json, safetensors, tokenizer, generation_config.json, a model card."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from reduced_sync import checkpoint as ckpt
from reduced_sync import preparing
from reduced_sync.dropping.log import beside_dense, read_drop_log, table_cell
from reduced_sync.files import fsync_folder, temporary_folder
from reduced_sync.hf.families import MODEL_TYPE, hf_config
from reduced_sync.hf.tokenizer import Tokens, write_pretrained
from reduced_sync.hf.weights import hf_tensors, shards_to_dense
from reduced_sync.train.log import read_log
from reduced_sync_model import GPT, GPTConfig

ROOT = Path(__file__).parents[2]
CODE = [ROOT / "reduced_sync_model.py", Path(__file__).with_name("modeling_reduced_sync.py")]
END, PADS = "<|endoftext|>", ("<|pad|>", "\u2400")  # U+2400 is the picture of a null


def export(path: Path, target: Path) -> str:
    """Write the model of the checkpoint in `path` to the new folder `target`; returns a line that says what it is.

    Raises ValueError or OSError; there is no `target` then.
    """
    if target.exists() or target.is_symlink():
        raise ValueError(f"to={str(target)!r} exists already: choose another folder, or remove it")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"to={str(target)!r}: there is no folder {target.absolute().parent}")
    saved, config, meta = ckpt.load_with_tokens(path)
    broken = [name for name, tensor in saved["model"].items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"checkpoint {path}: {broken[0]} is not finite: the training diverged")
    tokenizer, tokens = hugging_face_tokenizer(meta, config)
    generation = generation_config(meta, config, tokenizer, tokens)
    try:
        family, hf = hf_config(config)
        state = hf_tensors(shards_to_dense(saved["model"], config), family, config)
        what, keys, code = hf.architectures[0], hf.to_dict(), []
        if config.position == "rope":
            keys["rope_theta"] = config.rope_theta  # where transformers 4 looks for it
    except ValueError as reason:
        what, keys, code = f"with its code ({reason})", our_config(config), CODE
        state = {f"model.{name}": tensor.contiguous() for name, tensor in saved["model"].items()}
    keys |= {key: getattr(generation, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = card(target.absolute().name, path, saved, config, meta, bool(code), tokenizer.pad_token is not None)

    try:
        with temporary_folder(target.absolute()) as temporary:
            (temporary / "config.json").write_text(json.dumps(keys, indent=1) + "\n", encoding="utf-8")
            write_weights(state, temporary / "model.safetensors")
            # its writer lets only us read it
            shutil.copymode(temporary / "config.json", temporary / "model.safetensors")
            write_pretrained(tokenizer, generation, temporary)
            (temporary / "README.md").write_text(text, encoding="utf-8")
            for file in code:
                shutil.copy(file, temporary)
            fsync_folder(temporary)
            temporary.rename(target)
    except OSError as error:
        raise OSError(f"to={str(target)!r} cannot be written: {error.strerror or error}") from None
    return f"{target}: {what}"


def our_config(config: GPTConfig) -> dict:
    """config.json of a folder that carries its code."""
    auto_map = {"AutoConfig": "ReducedSyncConfig", "AutoModelForCausalLM": "ReducedSyncForCausalLM"}
    return {
        "architectures": ["ReducedSyncForCausalLM"],
        "auto_map": {key: f"modeling_reduced_sync.{name}" for key, name in auto_map.items()},
        "dtype": "float32",
        "model_type": MODEL_TYPE,
    } | dataclasses.asdict(config)


def write_weights(state: dict, path: Path) -> None:
    """Write tensors as safetensors. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(state, path, {"format": "pt"})
    except SafetensorError as error:  # its writer raises nothing else
        raise OSError(error) from None


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def hugging_face_tokenizer(meta: dict, config: GPTConfig) -> tuple[Any, Tokens]:
    """(tokenizer of transformers, Tokens) for `meta` of Tokens, of a model of GPTConfig `config`.

    It pads on the left, as generating needs it. Raises ValueError where a tokenizer is not there.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = Tokens(meta, config.vocab_size)
    if tokens.kind not in ("gpt2", "char"):
        tokenizer = tokens.pretrained
        tokenizer.padding_side = "left"
        if not tokens.has_row(tokenizer.pad_token_id):  # transformers would not load a model with that
            tokenizer.pad_token = tokenizer.eos_token if tokens.has_row(tokenizer.eos_token_id) else None
        return tokenizer, tokens
    options = dict(padding_side="left", model_input_names=["input_ids", "attention_mask"])
    options |= dict(clean_up_tokenization_spaces=False, model_max_length=config.block_size)
    if tokens.kind == "gpt2":
        files = preparing.gpt2_files()
        vocab = json.loads(files["encoder.json"].read_text(encoding="utf-8"))
        lines = files["vocab.bpe"].read_text(encoding="utf-8").split("\n")[1:]  # the first is its version
        merges = [tuple(line.split(" ")) for line in lines if line]
        backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        options |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), END)
    else:
        chars = meta["chars"]
        # without merges each character is a token; one that is none is dropped: a server cannot end with an error
        backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(chars)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
        pads = [pad for pad in PADS if not set(pad) <= set(chars)]  # no text looks like it
        if pads and len(chars) < config.vocab_size:  # an id to spare
            options |= dict(pad_token=pads[0])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options), tokens


def generation_config(meta: dict, config: GPTConfig, tokenizer: Any, tokens: Tokens) -> Any:
    """What generate() needs to know: the ids that end a text, and those that no text has, never to be chosen.

    And what the generation_config.json of a pretrained model says besides.
    """
    from transformers import GenerationConfig

    keys = tokens.generation.to_diff_dict() if tokens.generation else {}
    keys.pop("_from_model_config", None)  # transformers would put the ids of config.json in place of these
    ends = sorted(tokens.ends)
    begins = keys.get("bos_token_id"), tokenizer.bos_token_id
    pads = tokenizer.pad_token_id, keys.get("pad_token_id"), *ends
    suppressed = sorted({*tokens.suppressed, *range(meta["vocab_size"], config.vocab_size)})
    keys |= dict(eos_token_id=ends[0] if len(ends) == 1 else ends or None, suppress_tokens=suppressed or None)
    keys |= dict(bos_token_id=next(filter(tokens.has_row, begins), None))
    return GenerationConfig(**keys | dict(pad_token_id=next(filter(tokens.has_row, pads), None)))


# ---------------------------------------------------------------------------------------------------------------------
# The model card


def validation_loss(path: Path, saved: dict) -> str:
    """The last validation loss of a checkpoint, with its step: from the log beside it, which has it to four digits."""
    log = path.parent / "log.txt"
    if log.is_file():
        for step, _, loss in reversed(read_log(log).evaluations):
            if step == saved["evaluated"]:
                return f"{loss:.4f} nats per token (perplexity {torch.tensor(loss).exp():.2f}) at step {step}"
    if saved["best_val_loss"] < float("inf"):
        return f"{saved['best_val_loss']:.4f} nats per token, the lowest of the run"
    return "not evaluated"


def dropped_rows(path: Path, keys: dict, syncs: int) -> dict[str, str]:
    """What the card says of a model whose syncs drop_syncs.py has dropped, in place of data, tokens and loss."""
    trained = texts = "not known"
    if (path.parent / "log.txt").is_file():
        log = read_drop_log(path.parent / "log.txt")
        distilled, finetuned = log.tokens.get("distil", 0), log.tokens.get("finetune", 0)
        trained = f"{distilled:,} tokens block to block, {finetuned:,} tokens towards the model with all syncs"
        dense = log.perplexities[0][3] if log.perplexities else {}
        last = next((found for _, n, _, found in reversed(log.perplexities) if n == syncs), {})
        cells = [f"{table_cell(name)} {beside_dense(value, dense[name])}" for name, value in last.items()]
        texts = ", ".join(cells) or texts
    return {
        "data": f"calibrated on {table_cell(keys['calibration']) or 'the data of the run'}",
        "trained": trained,
        "perplexity, and above that of all syncs": texts,
    }


CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A GPT cut into tensor-parallel shards; its sync rule says where they synchronize.

| | |
|---|---|
{table}

## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{no_trust})
model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
prompts = tokenizer({prompts})
print(tokenizer.batch_decode(model.generate(**prompts, max_new_tokens=50)))
```

## Serve it

{serve}
"""


def trained_rows(path: Path, saved: dict, meta: dict) -> dict[str, str]:
    """What the card says of a training run's data, tokens and loss."""
    keys, step = saved["config"], saved["step"]
    last = keys.get("max_iters", step)
    n_tokens = step * math.prod(keys.get(key, 0) for key in ("gradient_accumulation_steps", "batch_size", "block_size"))
    return {
        "data": table_cell(meta.get("source", meta["tokenizer"])),
        "trained": f"{n_tokens:,} tokens, {step:,} steps" + (f" of {last:,}: unfinished" if step < last else ""),
        "validation loss": validation_loss(path, saved),
    }


def serving_text(name: str, config: GPTConfig, has_code: bool) -> str:
    """How to serve the folder."""
    if not has_code:
        return f"vLLM, transformers and lm-eval load it without our code: `vllm serve {name}`."
    own = "transformers 5 serves it with the code that is in this folder: read it, then allow it by\n"
    own += "`trust_remote_code=True`. vLLM "
    if config.rule.method.hides:
        return f"{own}has no all-reduce that is in flight while it computes, as {config.rule.method_name} asks for."
    plugin = "needs the plugin of the project that made it, and then no code from this folder: there,\n"
    return f"{own}{plugin}`make serve MODEL={name}`, on as many tensor-parallel ranks as divide {config.n_shard}."


def card(name: str, path: Path, saved: dict, config: GPTConfig, meta: dict, has_code: bool, can_pad: bool) -> str:
    """README.md of the folder."""
    name = json.dumps(name, ensure_ascii=False)[1:-1]  # as it may stand in quotes and on one line
    with torch.device("meta"):
        n_params = GPT(config).get_num_params(non_embedding=False)
    keys, syncs = saved["config"], config.rule.syncs
    start = keys.get("init_from", "scratch")
    rows = {
        "sync rule": f"`{config.sync}`",
        "drawn (A attention, M MLP, \\| all-reduce)": f"`{config.rule.diagram}`".replace("|", "\\|"),
        "syncs of a forward pass": f"{syncs} of {2 * config.n_layer}",
        "n_shard": config.n_shard,
        "shape": f"{config.n_layer} layers x {config.n_embd}, {config.n_head} heads, {config.n_kv_head} of keys and "
        f"values, {config.n_hidden} neurons, {config.block_size} positions, {config.vocab_size} ids",
        "parameters": f"{n_params:,}",
        "weights from": start if start == "scratch" else f"`{table_cell(start)}`",
    }
    rows |= dropped_rows(path, keys, syncs) if "calibration" in keys else trained_rows(path, saved, meta)
    return CARD.format(
        name=name,
        table="\n".join(f"| {key} | {value} |" for key, value in rows.items() if value),
        trust=", trust_remote_code=True" if has_code else "",
        no_trust=", trust_remote_code=False" if has_code else "",  # without a word transformers asks
        prompts='["the", "a"], return_tensors="pt", padding=True' if can_pad else '"the", return_tensors="pt"',
        serve=serving_text(name, config, has_code),
    )
