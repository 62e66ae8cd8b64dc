"""A plugin of vLLM: the folders that export.py writes with their code, served tensor-parallel by their sync pattern.

It brings the architecture, so the code in the folder is not run and trust_remote_code is not needed. Written for vLLM
0.32, whose internals the model class and register() use.
"""


def register():
    """What vLLM calls in each of its processes, some more than once."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_reduced_sync.config import Checks, ReducedSyncConfig

    AutoConfig.register(ReducedSyncConfig.model_type, ReducedSyncConfig, exist_ok=True)
    # by name: a worker that is forked must not touch CUDA before
    ModelRegistry.register_model("ReducedSyncForCausalLM", "vllm_reduced_sync.model:ReducedSyncForCausalLM")
    MODELS_CONFIG_MAP["ReducedSyncForCausalLM"] = Checks
