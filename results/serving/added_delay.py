"""A plugin of vLLM for measure.py alone: every all-reduce on a CPU takes ADDED_DELAY_US longer, as on a slower link."""

import functools
import os
import time


@functools.cache  # vLLM calls it in each of its processes, in some more than once
def register():
    import torch
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    delay, all_reduce = float(os.environ.get("ADDED_DELAY_US", 0)) / 1e6, CpuCommunicator.all_reduce

    @torch.library.custom_op("added_delay::wait", mutates_args=("x",))  # an operator stays in a compiled graph
    def wait(x: torch.Tensor) -> None:
        end = time.perf_counter() + delay
        time.sleep(max(0, delay - 200e-6))  # as a rank sleeps that waits for a network, but it can oversleep
        while time.perf_counter() < end:
            pass

    def delayed(self, input_):
        input_ = all_reduce(self, input_)
        wait(input_)
        return input_

    if delay:
        CpuCommunicator.all_reduce = delayed
