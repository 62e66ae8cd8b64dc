"""Text to token ids and back, as meta.json describes them: GPT-2's, characters, or those of a pretrained model."""

import codecs
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reduced_sync import preparing
from reduced_sync.hf.weights import GPT2_SHAPES


def pretrained_meta(name: str, vocab_size: int) -> dict:
    """meta of Tokens for the pretrained model `name`, as init_from takes it. A folder wins over a name."""
    if os.path.isdir(name):
        tokenizer = os.path.abspath(name)  # never "gpt2" or "char", which say how tokens are made
    else:
        tokenizer = "gpt2" if name in GPT2_SHAPES else name
    return {"tokenizer": tokenizer, "vocab_size": vocab_size}


class Tokens:
    """The tokens of `meta`: tokenizer "gpt2", "char" with its chars, or a folder or hub name that transformers loads.

    n_rows: rows of the model's embedding table; ids beyond it are refused. ends: the ids that end a text. suppressed:
    those never to be chosen, as the folder of a pretrained model lists them. Raises ValueError or OSError where a
    tokenizer is missing or damaged, or where such a list does not fit the model.
    """

    def __init__(self, meta: dict, n_rows: int = sys.maxsize):
        self.kind, self.n_rows = meta["tokenizer"], n_rows
        self.suppressed, self.generation = [], None
        if self.kind == "gpt2":
            self.encoding = preparing.gpt2_encoding()
            self.ends = {self.encoding.eot_token}
            self.bytes_of = self.encoding.decode_single_token_bytes
        elif self.kind == "char":
            self.ends = set()
            self.ids = {char: i for i, char in enumerate(meta["chars"])}
            self.bytes_of = [char.encode() for char in meta["chars"]].__getitem__
        else:
            self.pretrained, self.generation = load_pretrained(self.kind)
            self.suppressed = ids_of(self.generation, "suppress_tokens", self.kind)
            if beyond := [token for token in self.suppressed if not self.has_row(token)]:
                raise ValueError(
                    f"generation_config.json of {self.kind!r}: suppress_tokens lists {beyond[0]}, "
                    f"but the model has only the ids 0 to {n_rows - 1}"
                )
            # ends without a row, such as GPT2Config's default of 50256, cannot be generated
            self.ends = set(filter(self.has_row, ids_of(self.generation, "eos_token_id", self.kind)))
            self.ends = self.ends or set(filter(self.has_row, [self.pretrained.eos_token_id]))

    def has_row(self, token: int | None) -> bool:
        """Whether `token` is an id of the model's embedding table."""
        return token is not None and 0 <= token < self.n_rows

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Raises ValueError for a character or a token that the model does not have."""
        if self.kind == "char":
            if unknown := sorted(set(text) - set(self.ids)):
                known = "".join(self.ids)
                raise ValueError(f"the model does not know the character {unknown[0]!r}; it knows {known!r}")
            return [self.ids[char] for char in text]
        if self.kind == "gpt2":
            ids = self.encoding.encode(text, allowed_special={"<|endoftext|>"})
        else:
            alone = self.pretrained.backend_tokenizer.encode
            if lost := [c for c in sorted(set(text)) if not c.isspace() and not alone(c, add_special_tokens=False).ids]:
                raise ValueError(f"the model does not know the character {lost[0]!r}: its tokenizer leaves it out")
            ids = self.pretrained(text, verbose=False)["input_ids"]
        if beyond := set(ids) - set(filter(self.has_row, set(ids))):
            token = min(beyond)
            raise ValueError(
                f"the tokenizer gives {self.decode([token])!r} the id {token}, "
                f"but the model has only the ids 0 to {self.n_rows - 1}"
            )
        return ids

    def decoder(self, prompt: list[int]) -> Callable[[int | None], str]:
        """A function from the next id after `prompt` to the text that is whole with it, and from None to the rest."""
        if self.kind in ("gpt2", "char"):
            utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # a token may be part of a character
            return lambda token: utf8.decode(b"" if token is None else self.bytes_of(token), final=token is None)
        ids, said = list(prompt), self.decode(prompt)  # some drop the space that a text begins with

        def text_of(token):
            nonlocal said
            if token is not None:
                ids.append(token)
            text = self.decode(ids)
            if token is not None and text.endswith("\ufffd"):
                return ""
            new, said = text[len(said) :], text
            return new

        return text_of

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; bytes that are no character become U+FFFD."""
        if self.kind in ("gpt2", "char"):
            return b"".join(map(self.bytes_of, ids)).decode("utf-8", "replace")
        return self.pretrained.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def load_pretrained(name: str) -> tuple[Any, Any]:
    """(tokenizer, GenerationConfig) of a folder of save_pretrained or a hub name. Raises ValueError."""
    from transformers import AutoTokenizer, GenerationConfig
    from transformers.utils import cached_file

    # of the model's type, which it does not know, only the name is wanted
    log = logging.getLogger("transformers.configuration_utils")
    log.addFilter(lambda record: "to instantiate a model of type" not in record.getMessage())
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)  # its files are enough
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ValueError("it is none of the tokenizers library")
        if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
            raise ValueError("its vocabulary is empty")  # as where transformers finds no file
    except Exception as error:  # whatever a damaged file provokes, in the tokenizers library, too
        reason = f"its files cannot be read: {one_sentence(error)}"
        if os.path.isdir(name) and not os.path.exists(f"{name}/tokenizer.json"):
            reason = "the folder has no tokenizer.json"
        raise ValueError(f"no tokenizer in {name!r}: {reason}") from None
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # settings of its training, which transformers drops at each call
    backend.no_padding()
    for key in ("dropout", "alpha", "nbest_size"):  # of sampling: each rank would see other tokens
        if getattr(backend.model, key, None) is not None:
            setattr(backend.model, key, None)
    missing = dict(_raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
    for file in ("generation_config.json", "config.json"):  # the second in place of the first, as transformers does
        try:
            if path := cached_file(name, file, **missing):
                keys = dict(config_file_name=file, _from_model_config=file == "config.json")
                return tokenizer, GenerationConfig.from_pretrained(os.path.dirname(path), **keys)
        except Exception as error:  # whatever a damaged file provokes
            raise ValueError(f"{file} of {name!r} cannot be read: {one_sentence(error)}") from None
    return tokenizer, GenerationConfig()


def one_sentence(error: Exception) -> str:
    """The text of an error of many lines on one, with its type where that is needed to understand it."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (OSError, ValueError)) and text else f"{type(error).__name__}: {text}"


def ids_of(generation: Any, key: str, name: str) -> list[int]:
    """The token ids that a GenerationConfig has under `key`: none, one or a list. Raises ValueError, naming `name`."""
    value = getattr(generation, key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int for token in ids):
        raise ValueError(f"generation_config.json of {name!r}: {key}={value!r} must be a token id or a list of them")
    return ids


def write_pretrained(tokenizer: Any, generation: Any, folder: Path) -> None:
    """Write the files of a tokenizer of transformers, and generation_config.json. Raises OSError."""
    try:
        tokenizer.save_pretrained(folder)
        generation.to_json_file(folder / "generation_config.json")  # save_pretrained refuses what it has read
    except OSError:
        raise
    except Exception as error:  # the writer of the tokenizers library raises just this
        raise OSError(error) from None
