"""A compiled model in a captured step: few compilations."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.imbsam.capture.nets import assert_same, batches, captured, of_rows, pair, state

pytestmark = pytest.mark.slow


def net(dropout: float) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4))


@pytest.mark.parametrize(("method", "graphs"), [("imbsam 4", 4), ("sam", 1), ("imbsam batch", 1)])
def test_scratch_buffers_cost_no_compilation(method, graphs):
    """One for each number of rows: the whole batch, 12, 6 and 8."""
    torch.compiler.reset()
    own, eager = pair(method, lambda: net(0.3))
    counter = CompileCounterWithBackend("aot_eager")
    own.module.compile(backend=counter, dynamic=False)
    step = captured(own)
    for i, (x, y) in enumerate(batches(10)):
        torch.manual_seed(i)
        loss = step(x, y)
        torch.manual_seed(i)
        assert_same(loss, eager.backward(of_rows(eager.module, x, y), y))
        torch.testing.assert_close(state(own), state(eager), rtol=1e-12, atol=1e-14)
        own.module.zero_grad()
        eager.module.zero_grad()
    assert counter.frame_count == graphs
