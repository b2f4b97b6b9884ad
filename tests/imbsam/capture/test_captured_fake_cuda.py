"""The code around CUDA graphs, where there is no GPU: `torch.cuda` is a fake, and a replay runs the passes.

What this guards is our own bookkeeping: the order of warm-up, capture and replay, and the offsets of the generator's
states. What only a GPU can show is in test_captured_gpu.py.
"""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from imbsam import ImbSAM, SettingError
from imbsam.capture.captured_step import CapturedStep
from imbsam.capture.graphs import CudaGraphs
from tests.imbsam.capture.fake_cuda import DEFAULT, Dropout, install
from tests.imbsam.capture.nets import COUNTS, METHODS, assert_same, batches, losses_of, of_rows, pair


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), Dropout(), nn.Tanh(), Dropout(), nn.Linear(8, 4))


def graphs() -> CudaGraphs:
    return CudaGraphs(torch.device("cuda", 0))


@pytest.fixture(params=["one process", "split at the all-reduce"])
def group(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "one process":
        yield None
        return
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("method", METHODS)
def test_masks_weights_buffers_and_offset_are_the_eager_engines(method, group):
    own, eager = pair(method, net)
    own.process_group = eager.process_group = group
    step = CapturedStep(own, losses_of(own.module), batches(1)[0], graphs=graphs(), pass_sizes=range(2, 24, 2))
    optimizers = [torch.optim.SGD(s.module.parameters(), lr=0.1, momentum=0.9) for s in (own, eager)]
    state = DEFAULT.state
    for i, (x, y) in enumerate([*batches(5), *batches(5)]):
        if i == 6:
            DEFAULT.manual_seed(8)
        start = DEFAULT.get_offset()
        loss = step(x, y)
        end = DEFAULT.get_offset()
        DEFAULT.set_offset(start)
        assert loss == eager.backward(of_rows(eager.module, x, y), y)
        assert DEFAULT.get_offset() == end == start + 8
        assert DEFAULT.state is state
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert_same(own.module.state_dict(), eager.module.state_dict())


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("when", range(1, 13))
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_fails_in_a_warm_up_or_capture_leaves_everything_as_it_was(when, error):
    """Three passes a run: nine calls in the warm-up, then the capture."""
    own, _ = pair("imbsam 4", net)
    calls = []

    def losses(x: Tensor, y: Tensor) -> Tensor:
        values = losses_of(own.module)(x, y)
        calls.append(len(x))
        if len(calls) == when:
            raise error("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")
        return values

    step = CapturedStep(own, losses, batches(1)[0], graphs=graphs())
    before, offset, state = copy.deepcopy(own.module.state_dict()), DEFAULT.get_offset(), DEFAULT.state
    refused = error is RuntimeError and when > 9  # a RuntimeError in the warm-up is the user's own
    message = "the step cannot be captured: operation not permitted when stream is capturing; set capture=False"
    with pytest.raises(SettingError if refused else error, match=message if refused else None):
        step(*batches(1)[0])
    assert_same(own.module.state_dict(), before)
    assert DEFAULT.state is state
    assert DEFAULT.get_offset() == offset
    assert all(p.grad is None for p in own.module.parameters())
    step(*batches(1)[0])


@pytest.mark.usefixtures("fake_cuda")
def test_ctrl_c_around_w_plus_e_in_a_warm_up_or_capture():
    """Where the passes themselves have not begun, or have ended, to watch over the weights."""
    own, _ = pair("imbsam 4", net)
    before = copy.deepcopy(own.module.state_dict())
    for n in range(1, 1000):
        step = CapturedStep(own, losses_of(own.module), batches(1)[0], graphs=graphs())
        left = n

        def tracer(frame: Any, event: str, arg: Any) -> Any:
            nonlocal left
            if frame.f_code.co_name not in ("_ascended_gradient", "_ascend", "ascend"):
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return tracer

        old = sys.gettrace()
        sys.settrace(tracer)
        try:
            step(*batches(1)[0])
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(old)
        if left > 0:
            break
        assert_same(own.module.state_dict(), before)
        assert all(p.grad is None for p in own.module.parameters())
    assert n > 50


@pytest.mark.usefixtures("fake_cuda")
def test_numbers_drawn_on_the_host_are_refused_by_name():
    own, _ = pair("imbsam 4", lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 4)))
    step = CapturedStep(own, losses_of(own.module), batches(1)[0], graphs=graphs())
    before = torch.get_rng_state()
    with pytest.raises(SettingError, match="the forward draws random numbers on the host"):
        step(*batches(1)[0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("fake_cuda")
def test_each_shape_is_captured_once():
    own = ImbSAM(net().double(), COUNTS, context_rows=4)
    calls: list[int] = []

    def losses(x: Tensor, y: Tensor) -> Tensor:
        calls.append(len(x))
        return F.cross_entropy(own.module(x), y, reduction="none")

    step = CapturedStep(own, losses, batches(1)[0], graphs=graphs())
    for x, y in [*batches(5), *batches(5)]:
        step(x, y)
    # four shapes (none, 8, 16, and the batch where every row is sharp, twice), three times in the warm-up and once in
    # the capture; and once a step for its replay, which calls the passes here
    assert calls.count(24) == 4 * (3 + 1) + (3 + 1) + 10 + 2
