"""config.json of an exported folder, with the names that vLLM has for its keys, and what of it cannot be served."""

import torch
from transformers import PretrainedConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from vllm_reduced_sync.old_keys import complete_config  # a link, as the next one, to what the training uses
from vllm_reduced_sync.reduced_sync_model import SyncRule

SERVED = ("", "parallel", "desync", "tracks")  # methods; the others hide all-reduces, and vLLM's waits for its result


class ReducedSyncConfig(PretrainedConfig):
    """The keys of GPTConfig in reduced_sync_model.py. export.py writes all of them."""

    model_type = "reduced_sync"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "head_dim": "head_size",
        "intermediate_size": "n_hidden",
        "max_position_embeddings": "block_size",
    }

    def __init__(self, **keys):
        super().__init__(**complete_config(keys))

    @property
    def rule(self):
        """Where the shards synchronize: a SyncRule."""
        return SyncRule.parse(self.sync, self.n_layer)

    @property
    def num_key_value_heads(self):
        """Those of all shards together: where there are fewer heads than shards, each shard has a copy of its own."""
        return max(self.n_kv_head, self.n_shard)


class Checks(VerifyAndUpdateConfig):
    """Asked by vLLM before any worker starts."""

    @staticmethod
    def verify_and_update_config(vllm_config):
        """Turns off what would compute something else on a CPU. Raises ValueError for what cannot be served."""
        config, tp_size = vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size
        if config.rule.method_name not in SERVED:
            allowed = ", ".join(SERVED[1:])
            raise ValueError(f"sync={config.sync!r} cannot be served; allowed after the pattern: {allowed}")
        if config.n_shard % tp_size:
            allowed = [n for n in range(1, config.n_shard + 1) if config.n_shard % n == 0]
            raise ValueError(
                f"tensor_parallel_size={tp_size} does not divide n_shard={config.n_shard}; allowed: {allowed}"
            )
        quantization, dtype = vllm_config.model_config.quantization, vllm_config.model_config.dtype
        if quantization not in (None, "compressed-tensors"):  # vLLM's own scales are those of whole matrices
            raise ValueError(
                f"quantization={quantization!r} cannot be served; allowed: a folder of serving/quantize.py"
            )
        groups = (getattr(config, "quantization_config", None) or {}).get("config_groups", {}).values()
        few_bits = [group["weights"]["num_bits"] for group in groups if group["weights"]["num_bits"] < 8]
        if few_bits and current_platform.is_cpu() and dtype == torch.float32:  # vLLM would end at the first step
            raise ValueError(
                f"weights of {few_bits[0]} bits cannot be served on a CPU in float32: use --dtype bfloat16"
            )
        if current_platform.is_cpu():  # torch 2.13's Inductor fuses a sum before onednn_mm has written its terms
            vllm_config.compilation_config.inductor_compile_config.setdefault("max_fusion_size", 1)
        sizes = CPUAttentionBackend.get_supported_head_sizes()
        if current_platform.is_cpu() and config.head_size not in sizes:  # vLLM would start, and end at a request
            raise ValueError(f"head_size={config.head_size} cannot be served on a CPU; vLLM has {sizes}")
