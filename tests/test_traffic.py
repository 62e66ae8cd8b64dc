"""The count of a training step's memory traffic, and the bars for reduced syncs."""

import pytest
import torch

from reduced_sync.traffic import step_traffic

pytestmark = pytest.mark.timeout(200)


def test_a_step_moves_what_is_counted_by_hand():
    def make_loss():
        x, w = torch.randn(64, 32), torch.randn(32, 16, requires_grad=True)
        return lambda: (x @ w).sin().sum()

    x, w, y, scalar = (4 * n for n in (64 * 32, 32 * 16, 64 * 16, 1))
    traffic = step_traffic(make_loss, torch.float32)
    assert traffic.extern == (x + w + y) + (x + y + w)  # y = x @ w, w's gradient
    assert traffic.fused == (y + scalar) + (y + scalar + y)  # the loss, y's gradient
