"""The code around CUDA graphs, where there is no GPU: `torch.cuda` is a fake, and a replay calls the passes.

What this guards is our own bookkeeping: the order of warm-up, capture and replay, and the offsets of the generator's
states. What only a GPU can show is in test_captured_gpu.py.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import imbsam.capture.graphs
import imbsam.step
from imbsam import ImbSAM, SettingError
from imbsam.capture.captured_step import CapturedStep
from imbsam.capture.graphs import CudaGraphs
from tests.imbsam.capture.nets import COUNTS, METHODS, assert_same, batches, losses_of, of_rows, pair


class State:
    def __init__(self, seed: int, offset: int) -> None:
        self.seed, self.offset = seed, offset


class Generator:
    """Draws masks that are a function of seed and offset, as Philox does."""

    def __init__(self, state: State) -> None:
        self.state = state

    def draw(self, like: Tensor) -> Tensor:
        cpu = torch.Generator().manual_seed(1000 * self.state.seed + self.state.offset)
        self.state.offset += 4
        return (torch.rand(like.shape, generator=cpu) > 0.3).to(like.dtype)

    def get_offset(self) -> int:
        return self.state.offset

    def set_offset(self, offset: int) -> None:
        self.state.offset = offset

    def initial_seed(self) -> int:
        return self.state.seed

    def manual_seed(self, seed: int) -> None:
        self.state.seed, self.state.offset = seed, 0

    def clone_state(self) -> "Generator":
        return Generator(State(self.state.seed, self.state.offset))

    def graphsafe_get_state(self) -> "Generator":
        return Generator(self.state)

    def graphsafe_set_state(self, other: "Generator") -> None:
        self.state = other.state


DEFAULT = Generator(State(7, 0))


class Dropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * DEFAULT.draw(x)


class OffsetOnly:
    """What the eager engine keeps of the random generators, on this GPU."""

    def __init__(self, devices: Any = None) -> None:
        self.offset = DEFAULT.get_offset()

    def now(self) -> "OffsetOnly":
        return OffsetOnly()

    def restore(self) -> None:
        DEFAULT.set_offset(self.offset)


class Stream:
    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass


class Graph:
    """Has the program that ran under the capture, and runs it again with the generator states of its own."""

    def __init__(self) -> None:
        self.states: list[Generator] = []
        self.run: Callable[[], None] | None = None

    def register_generator_state(self, state: Generator) -> None:
        assert state.state is not DEFAULT.state
        self.states.append(state)

    def replay(self) -> None:
        assert self.run is not None
        self.run()


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def capture(graph: Graph, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        own = DEFAULT.graphsafe_get_state()
        assert own.state is graph.states[0].state  # never the default one: a failed capture would spoil it
        yield

    real = CudaGraphs._capture

    def remembering(self: CudaGraphs, program: Callable[[], None], draws: Any) -> Graph:
        graph = real(self, program, draws)
        states = draws._states[-1]

        def run() -> None:
            kept, draws._states, draws._capturing, draws._next = draws._states, [states], True, 1
            DEFAULT.graphsafe_set_state(states[0])
            program()
            draws.end_capture()
            draws._states = kept

        graph.run = run
        return graph

    cuda = {
        "Stream": Stream,
        "Event": lambda: type("Event", (), {"record": lambda self: None})(),
        "CUDAGraph": Graph,
        "graph": capture,
        "graph_pool_handle": object,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "default_generators": [DEFAULT],
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(CudaGraphs, "_capture", remembering)
    monkeypatch.setattr(imbsam.step, "RandomState", OffsetOnly)
    DEFAULT.manual_seed(7)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), Dropout(), nn.Tanh(), Dropout(), nn.Linear(8, 4))


def graphs() -> CudaGraphs:
    return CudaGraphs(torch.device("cuda", 0))


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("method", METHODS)
def test_masks_weights_buffers_and_offset_are_the_eager_engines(method):
    own, eager = pair(method, net)
    step = CapturedStep(own, losses_of(own.module), batches(1)[0], graphs=graphs(), pass_sizes=range(2, 24, 2))
    optimizers = [torch.optim.SGD(s.module.parameters(), lr=0.1, momentum=0.9) for s in (own, eager)]
    for i, (x, y) in enumerate([*batches(5), *batches(5)]):
        if i == 6:
            DEFAULT.manual_seed(8)
        start = DEFAULT.get_offset()
        loss = step(x, y)
        end = DEFAULT.get_offset()
        DEFAULT.set_offset(start)
        assert loss == eager.backward(of_rows(eager.module, x, y), y)
        assert DEFAULT.get_offset() == end == start + 8
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
