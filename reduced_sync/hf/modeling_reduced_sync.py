"""The model of reduced_sync_model.py, which lies beside this file, for transformers: config, forward pass, generation.

export.py copies both files into a folder for AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True).
"""

import dataclasses

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .reduced_sync_model import GPT, GPTConfig, KVCache

CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"  # before transformers 5.24


class ReducedSyncConfig(PretrainedConfig):
    """GPTConfig's fields, and the names that transformers has for them. Raises ValueError for what cannot be built."""

    model_type = "reduced_sync"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "head_dim": "head_size",
        "intermediate_size": "n_hidden",
        "max_position_embeddings": "block_size",
        "tie_word_embeddings": "tie_embeddings",
    }

    def __init__(self, **keys):
        names = [field.name for field in dataclasses.fields(GPTConfig)]
        gpt = GPTConfig(**{name: keys.pop(name) for name in names if name in keys})
        keys |= dataclasses.asdict(gpt)
        super().__init__(**keys | {"tie_word_embeddings": gpt.tie_embeddings})

    def gpt(self):
        """The GPTConfig."""
        return GPTConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(GPTConfig)})


class Cache(KVCache):
    """A KVCache as generate() handles one. S shards' rows of a batch B are S*B rows."""

    is_compileable = is_croppable = False
    is_linear = (False,)

    def __init__(self, model, batch_size):
        super().__init__(model, batch_size)
        self.batch_size = batch_size

    def get_seq_length(self, layer=0):
        return self.length

    def reorder_cache(self, rows):
        """Row i becomes what row rows[i] was, of rows (B,): beam search goes on with the best."""
        for tensor in (tensor for pair in self.layers for tensor in pair):
            held = tensor.unflatten(0, (-1, self.batch_size))[..., : self.length, :]  # (S, B, K, length, D)
            held.copy_(held[:, rows])


class ReducedSyncForCausalLM(PreTrainedModel, GenerationMixin):
    """A GPT of reduced_sync_model.py, all its shards in one process, with transformers' interface."""

    config_class = ReducedSyncConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"model.lm_head.weight": "model.transformer.wte.weight"}  # noqa: RUF012
    _is_stateful = True  # the cache cannot be cut, as assisted generation would
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.model = GPT(config.gpt())
        self.post_init()

    def _init_weights(self, module):
        """Nothing: GPT has made its initial weights."""

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False  # forward() makes its own

    @classmethod
    def is_backend_compatible(cls):
        """vLLM asks before it would serve by this class, as it does where its plugin is missing. Raises ValueError."""
        raise ValueError("vLLM serves this model by the plugin in serving/ of the project that made it: install that")

    def get_input_embeddings(self):
        return self.model.transformer.wte

    def set_input_embeddings(self, value):
        self.model.transformer.wte = value

    def get_output_embeddings(self):
        return self.model.lm_head

    def set_output_embeddings(self, value):
        self.model.lm_head = value

    def forward(  # noqa: PLR0913  transformers' own
        self,
        input_ids,
        attention_mask=None,
        labels=None,
        use_cache=False,
        cache=None,
        past_key_values=None,
        logits_to_keep=0,
        return_dict=True,
        num_items_in_batch=None,
        **others,
    ):
        """Token ids (B, T) -> CausalLMOutputWithPast with logits (B, T, vocab_size), or of the last logits_to_keep.

        attention_mask (B, T, or all tokens with a cache): 0 where a row starts with padding. labels (B, T): the ids
        themselves, -100 for no target; with them comes the mean loss. With use_cache comes a cache, to be handed back
        with the next ids. num_items_in_batch: the mean is over so many. Raises ValueError for padding between tokens,
        for a cache of another kind, and for inputs and outputs that this model does not have.
        """
        others.pop("cache_position", None)  # of transformers 5.0; the cache says it, too
        if unknown := [key for key, value in others.items() if value is not None and value is not False]:
            raise ValueError(f"this model takes no {', '.join(unknown)}")
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = Cache(self.model, len(input_ids))
        if not isinstance(cache, Cache | None):
            raise ValueError(f"the cache is a {type(cache).__name__}: this model takes those that it has returned")
        past_length = 0 if cache is None else cache.length
        x = self.model.hidden_states(input_ids, cache, *positions_and_mask(attention_mask, input_ids, past_length))
        kept = x[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else x[:, logits_to_keep]
        logits = self.model.lm_head(self.model.transformer.ln_f(kept))
        loss = None
        if labels is not None:
            keys = dict(vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch)
            loss = self.loss_function(logits=logits, labels=labels, **keys)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
        return output if return_dict else output.to_tuple()


def positions_and_mask(attention_mask, input_ids, past_length):
    """What hidden_states() takes for ids (B, T) behind `past_length` in a cache, some rows of which start with padding.

    attention_mask (B, past_length+T) or None. Nothing sees padding, and positions are counted behind it. (None, None)
    where there is none. Raises ValueError where padding stands between tokens.
    """
    B, T = input_ids.shape
    if attention_mask is None or attention_mask.all():
        if not past_length or T == 1:
            return None, None
        attention_mask = input_ids.new_ones(B, past_length + T)
    if attention_mask.shape != (B, past_length + T):
        raise ValueError(f"attention_mask of {tuple(attention_mask.shape)}: it must be of {(B, past_length + T)}")
    started = attention_mask.cumsum(1) > 0
    if ((attention_mask.long().diff(dim=1) > 0) & started[:, :-1]).any():
        raise ValueError("padding between tokens: pad prompts on the left, with tokenizer.padding_side='left'")
    start = (~started).sum(1)[:, None]  # (B, 1)
    key = torch.arange(past_length + T, device=input_ids.device)
    query = key[past_length:, None]
    mask = (key <= query) & (key >= start[:, None]) | (
        key == query
    )  # (B, T, past_length+T); padding has to see something
    return (key[past_length:] - start).clamp(min=0), mask
