"""A `torch.cuda` for tests without a GPU: a capture runs the passes, and a replay runs them again."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import imbsam.capture.graphs
import imbsam.step
from imbsam.capture.graphs import CudaGraphs


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


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put it in the place of `torch.cuda` for the time of a test."""

    @contextlib.contextmanager
    def capture(graph: Graph, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        own = DEFAULT.graphsafe_get_state()
        assert own.state is graph.states[0].state  # never the default one: a failed capture would spoil it
        try:
            yield
        except BaseException as error:  # a capture that is torn down has an error of its own
            raise RuntimeError("operation failed due to a previous error during capture") from error

    real = CudaGraphs._capture

    def remembering(self: CudaGraphs, program: Callable[[], None], draws: Any) -> Graph:
        graph = real(self, program, draws)
        states = draws._states[-1]

        def run() -> None:
            kept, draws._states, draws._capturing, draws._next = draws._states, [states], True, 1
            DEFAULT.graphsafe_set_state(states[0])
            tracer = sys.gettrace()
            sys.settrace(None)  # no Ctrl-C gets into a graph
            program()
            sys.settrace(tracer)
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
