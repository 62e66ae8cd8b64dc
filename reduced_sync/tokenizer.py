"""Text to token ids and back, as meta.json describes them: GPT-2's, characters, or those of a pretrained model."""

import codecs
import logging
from collections.abc import Callable
from typing import Any

from reduced_sync import preparing

KEPT = "tokenizer"  # folder of an out_dir with the files of its model's own tokenizer


class Tokens:
    """The tokens of `meta`: tokenizer "gpt2", "char" with its chars, or a folder or hub name that transformers loads.

    ends: the ids that end a text. suppressed: those that no text of a pretrained model has, where its folder says so.
    Raises ValueError or OSError where a tokenizer is not there.
    """

    def __init__(self, meta: dict):
        self.kind, self.suppressed = meta["tokenizer"], []
        if self.kind == "gpt2":
            self.encoding = preparing.gpt2_encoding()
            self.ends = {self.encoding.eot_token}
            self.bytes_of = self.encoding.decode_single_token_bytes
        elif self.kind == "char":
            self.ends = set()
            self.ids = {char: i for i, char in enumerate(meta["chars"])}
            self.bytes_of = [char.encode() for char in meta["chars"]].__getitem__
        else:
            self.pretrained, self.ends, self.suppressed = load_pretrained(self.kind)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Raises ValueError for a character that the model does not know."""
        if self.kind == "gpt2":
            return self.encoding.encode(text, allowed_special={"<|endoftext|>"})
        if self.kind != "char":
            return self.pretrained.backend_tokenizer.encode(text).ids
        if unknown := sorted(set(text) - set(self.ids)):
            raise ValueError(f"the model does not know the character {unknown[0]!r}; it knows {''.join(self.ids)!r}")
        return [self.ids[char] for char in text]

    def stream(self) -> Callable[[int | None], str]:
        """A function from the next token id to the text that has become whole with it, and from None to the rest."""
        if self.kind in ("gpt2", "char"):
            decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may be part of a character
            return lambda token: decoder.decode(b"" if token is None else self.bytes_of(token), final=token is None)
        ids, said = [], ""

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


def load_pretrained(name: str) -> tuple[Any, set[int], list[int]]:
    """(tokenizer, ids that end a text, ids that no text has) of a folder of save_pretrained or a hub name.

    Raises ValueError, OSError.
    """
    from transformers import AutoTokenizer, GenerationConfig

    # of the model's type, which it does not know, only the name is wanted
    log = logging.getLogger("transformers.configuration_utils")
    log.addFilter(lambda record: "to instantiate a model of type" not in record.getMessage())
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)  # its files are enough
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ValueError("it is none of the tokenizers library")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"no tokenizer in {name!r}: {str(error).strip().splitlines()[0]}") from None
    try:
        generation = GenerationConfig.from_pretrained(name)
    except OSError:  # it is optional
        generation = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    ends = generation.eos_token_id
    return tokenizer, set(ends) if isinstance(ends, list) else {ends} - {None}, generation.suppress_tokens or []
