"""Memory traffic of a training step: the bytes that the kernels which Inductor makes of it read and write.

Nothing is computed and nothing allocated: tensors are fake, and compiling ends when the kernels are scheduled, before
there is code. Lowered for a CPU, whose kernels stand for a GPU's: they fuse a little less.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from functorch.compile import make_boxed_func
from torch._inductor import compile_fx
from torch._inductor import config as inductor_config
from torch._inductor.exc import InductorError
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from reduced_sync_model import GPT, GPTConfig


@dataclass
class Traffic:
    """Bytes read and written: by Inductor's own kernels, and by the library's (matrix products, attention)."""

    fused: int = 0
    extern: int = 0

    @property
    def total(self) -> int:
        return self.fused + self.extern


class _Scheduled(Exception):
    """Ends compiling."""


def training_traffic(config: GPTConfig, batch_size: int) -> Traffic:
    """The traffic of a training micro-step of `batch_size` x block_size tokens under bfloat16 autocast."""

    def make_loss() -> Callable[[], torch.Tensor]:
        model, ids = GPT(config), torch.zeros(batch_size, config.block_size, dtype=torch.long)

        def loss():  # as train_reduced_sync.py compiles it, without the logits
            return model(ids, ids)[1]

        return loss

    return step_traffic(make_loss, torch.bfloat16)


def step_traffic(make_loss: Callable[[], Callable[[], torch.Tensor]], dtype: torch.dtype) -> Traffic:
    """The traffic of one forward and backward pass, with autocast to `dtype` unless that is float32.

    make_loss() makes tensors, all of them fake, and returns the function that is compiled: the loss, of no arguments.
    """
    traffic = Traffic()

    def schedule(graph: GraphModule, inputs: list, **options) -> Callable:
        """Count a graph's kernels in place of making them; fake tensors then go through the graph as it was."""
        original = copy.deepcopy(graph)  # lowering changes it
        with inductor_config.patch(_post_fusion_custom_pass=add_up, fx_graph_cache=False):
            try:
                compile_fx.compile_fx_inner(graph, inputs, **options)
            except InductorError as error:
                if not isinstance(error.inner_exception, _Scheduled):
                    raise
        return make_boxed_func(original.forward)

    def add_up(nodes: list[BaseSchedulerNode]) -> None:
        for node in nodes:
            if isinstance(node, ExternKernelSchedulerNode):
                traffic.extern += node.get_read_write_buffers_sizes()
            else:
                traffic.fused += node.get_read_write_buffers_sizes()
        raise _Scheduled

    torch.compiler.reset()
    with FakeTensorMode():
        loss_of = torch.compile(make_loss(), backend=partial(compile_fx.compile_fx, inner_compile=schedule))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = loss_of()
        loss.backward()
    return traffic
