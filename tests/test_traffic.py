"""The count of a training step's memory traffic, and the bars for reduced syncs."""

import pytest
import torch

from reduced_sync.traffic import step_traffic, training_traffic
from reduced_sync_model import GPTConfig

pytestmark = pytest.mark.timeout(200)


def test_a_step_moves_what_is_counted_by_hand():
    def make_loss():
        x, w = torch.randn(64, 32), torch.randn(32, 16, requires_grad=True)
        return lambda: (x @ w).sin().sum()

    x, w, y, scalar = (4 * n for n in (64 * 32, 32 * 16, 64 * 16, 1))
    traffic = step_traffic(make_loss, torch.float32)
    assert traffic.extern == (x + w + y) + (x + y + w)  # y = x @ w, w's gradient
    assert traffic.fused == (y + scalar) + (y + scalar + y)  # the loss, y's gradient


def test_local_streams_move_little_more():
    def bytes_moved(n_shard, sync):  # GPT-2's width; layers repeat, and the head is the same for all
        config = GPTConfig(n_layer=3, vocab_size=64, n_shard=n_shard, sync=sync)
        return training_traffic(config, batch_size=12).total

    dense = bytes_moved(1, "baseline")
    ratios = [bytes_moved(n_shard, "grouped-1") / dense for n_shard in (2, 4)]
    assert ratios[0] < 1.25 and ratios[1] < 1.75, ratios
