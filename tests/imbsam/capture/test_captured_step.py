"""A captured step gives what the eager engine gives: on the CPU the passes are called where a GPU replays a graph."""

from typing import Any

import pytest
import torch
from torch import Tensor

from imbsam.batch import SharpGradient
from tests.imbsam.capture.nets import METHODS, Net, assert_same, batches, captured, of_rows, pair, state, train


@pytest.mark.parametrize("method", METHODS)
def test_a_training_is_the_eager_engines_to_the_last_bit(method):
    own, eager = pair(method)
    wanted = train(eager, lambda x, y: eager.backward(of_rows(eager.module, x, y), y))
    assert_same(train(own, captured(own)), wanted)


@pytest.mark.parametrize("method", ["imbsam batch", "imbsam 4"])
def test_activation_checkpointing_moves_the_buffers_as_in_the_eager_engine(method):
    own, eager = pair(method, lambda: Net(checkpointed=True))
    wanted = train(eager, lambda x, y: eager.backward(of_rows(eager.module, x, y), y), steps=2)
    assert_same(train(own, captured(own), steps=2), wanted)


class OnceOnly(torch.autograd.Function):
    """A graph with donated buffers, as torch.compile builds them: it refuses to be used twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch._C._autograd._get_current_graph_task_keep_graph():
            raise RuntimeError("This backward function was compiled with non-empty donated buffers")
        return grad


class Compiled(Net):
    def forward(self, x: Tensor) -> Tensor:
        return OnceOnly.apply(super().forward(x))


@pytest.mark.parametrize("method", ["imbsam batch", "focal"])
def test_graph_that_serves_only_once(method):
    own, eager = pair(method, Compiled)
    wanted = train(eager, lambda x, y: eager.backward(of_rows(eager.module, x, y), y), steps=3)
    step = captured(own)
    assert_same(train(own, step, steps=3), wanted)
    sources = {recording.passes.source for recording in step._static._recordings.values()}
    assert SharpGradient.OWN_FORWARD in sources


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_count_as_one_batch(method):
    """The third has no sharp row, and takes part in the extra passes of the others with weights of 0."""
    own, eager = pair(method)
    parts = [batches(6)[i] for i in (0, 5, 2)]
    step = captured(own)
    for _ in range(2):
        torch.manual_seed(1)
        loss = step(parts)
        torch.manual_seed(1)
        assert loss == eager.backward([(of_rows(eager.module, x, y), y) for x, y in parts])
        assert_same(state(own), state(eager))  # the second time added to the first


@pytest.mark.parametrize("method", ["plain", "sam", "imbsam 4"])
@pytest.mark.parametrize("zeroed", [None, False])
def test_grad_is_added_to(method, zeroed):
    """Also where it is the tensor that the step itself writes to."""
    own, eager = pair(method)
    step, found = captured(own), []
    for sam, backward in (
        (own, step),
        (eager, lambda x, y: eager.backward(of_rows(eager.module, x, y), y)),
    ):
        torch.manual_seed(1)
        sam.module.head.weight.grad = head = torch.ones_like(sam.module.head.weight)
        for x, y in batches(3):
            if zeroed is False:
                sam.module.zero_grad(set_to_none=False)
            backward(x, y)
        assert sam.module.head.weight.grad is head
        found.append(state(sam))
    assert_same(*found)
