"""torch.compile: the same gradients, even if its graphs cannot be used twice."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from imbsam import CCSAM, FocalSAM, ImbSAM

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", [ImbSAM, FocalSAM, CCSAM])
@pytest.mark.parametrize("context_rows", ["batch", 0])
def test_compiled_gradient_is_the_eager_one(method, context_rows):
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))
    compiled = torch.compile(copy.deepcopy(eager))
    x, y = torch.randn(24, 6), torch.tensor(([0] * 5 + [1] * 3 + [2] * 2 + [3] * 2) * 2)
    grads = []
    for model in (eager, compiled):
        sam = method(model, [200, 60, 15, 4], rho=0.5, context_rows=context_rows)
        sam.backward(lambda rows, m=model: F.cross_entropy(m(x[rows]), y[rows], reduction="none"), y)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)


def test_no_compilation_after_the_warm_up():
    """The number of tail rows changes from batch to batch; the compiler must not see a new shape each time."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 2))
    model.compile(backend=counter)
    sam = ImbSAM(model, [200, 4])
    x = torch.randn(128, 6)

    def step(tail_rows: int) -> None:
        y = (torch.arange(128) < tail_rows).long()
        sam.backward(lambda rows: F.cross_entropy(model(x[rows]), y[rows], reduction="none"), y)

    for tail_rows in (0, 1, 5, 17, 40):
        step(tail_rows)
    warm = counter.frame_count
    for tail_rows in range(100):
        step(tail_rows)
    assert 0 < warm <= 4
    assert counter.frame_count == warm
