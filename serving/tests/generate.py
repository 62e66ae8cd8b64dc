"""Greedy ids of folders by vLLM, in this process or, under torchrun, in as many as there are ranks.

generate.py REQUEST RESULT: REQUEST has a JSON object of folders, prompts (lists of ids), new_tokens, and further
options of vLLM. RESULT gets a list, one entry a folder: the model's class, ids and logprobs of each prompt, the forward
passes and their all-reduces, all alike on every rank.
"""

import json
import os
import sys
from pathlib import Path

import torch

kept = []  # the process group ends with the vLLM that began it, and the others use it, too


def generate(folder, request):
    """The entry of one folder."""
    from vllm import LLM, SamplingParams

    options = dict(tensor_parallel_size=int(os.environ.get("WORLD_SIZE", 1)), enforce_eager=True)
    if "WORLD_SIZE" in os.environ:
        options |= dict(distributed_executor_backend="external_launcher")
    # several requests wait, prompts are computed in parts, and what they start with alike is computed once
    options |= dict(max_num_seqs=2, max_num_batched_tokens=16, enable_chunked_prefill=True, enable_prefix_caching=True)
    options |= dict(dtype="float32", kv_cache_memory_bytes=64 << 20, skip_tokenizer_init=True, seed=0)
    llm = LLM(model=folder, **options | request["options"])
    kept.append(llm)
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model

    forwards, forward = [], model.forward

    def counted_forward(*args, **keys):
        forwards.append(1)
        return forward(*args, **keys)

    model.forward = counted_forward
    parameters = dict(temperature=0, max_tokens=request["new_tokens"], ignore_eos=True, detokenize=False, logprobs=0)
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    outputs = [output.outputs[0] for output in llm.generate(prompts, SamplingParams(**parameters), use_tqdm=False)]

    # one more, shorter, since each pass takes long with a profiler
    forwards.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        llm.generate(prompts[:1], SamplingParams(**parameters | dict(max_tokens=3)), use_tqdm=False)
    # vLLM's own between processes of one machine, and what torch.distributed would do without it
    names = ("_C::shm_allreduce", "c10d::allreduce_")
    found = dict(
        model=type(model).__name__,
        ids=[list(output.token_ids) for output in outputs],
        logprobs=[
            [step[i].logprob for step, i in zip(output.logprobs, output.token_ids, strict=True)] for output in outputs
        ],
        forwards=len(forwards),
        all_reduces=sum(event.count for event in profile.key_averages() if event.key in names),
    )
    if "WORLD_SIZE" in os.environ:
        ranks = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, found)
        assert all(rank == found for rank in ranks), ranks
    return found


def main(request, result):
    request, found = json.loads(Path(request).read_text()), []
    for folder in request["folders"]:
        found.append(generate(folder, request))
    if os.environ.get("RANK", "0") == "0":
        Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
