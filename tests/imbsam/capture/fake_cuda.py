"""A `torch.cuda` for tests without a GPU: a capture runs the passes, and a replay runs them again."""

import contextlib
import sys
import warnings
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
        self.joined: list[Stream] = []

    def wait_stream(self, other: "Stream") -> None:
        if GPU.invalidated:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.joined.append(other)

    def wait_event(self, event: Any) -> None:
        pass


class GPU:
    """Its state, as torch has it for the thread."""

    stream = Stream()
    sync_debug_mode = 0
    capturing = invalidated = False
    """Whether a capture is underway, and whether something has failed in it."""
    graphs = 0
    """How many hold memory."""


class Graph:
    """Has the program that ran under the capture, and runs it again with the generator states of its own."""

    def __init__(self) -> None:
        self.run: Callable[[], None] | None = None
        GPU.graphs += 1

    def replay(self) -> None:
        assert self.run is not None
        self.run()

    def reset(self) -> None:
        GPU.graphs -= 1


def item() -> None:
    """What `.item()` does first, which waits for the GPU."""
    if GPU.sync_debug_mode == 2:
        raise RuntimeError("called a synchronizing CUDA operation")
    if GPU.sync_debug_mode == 1:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
    if GPU.capturing:
        fail("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")


def fail(message: str) -> None:
    GPU.invalidated = GPU.capturing
    raise RuntimeError(message)


@contextlib.contextmanager
def on(stream: Stream) -> Iterator[None]:
    before, GPU.stream = GPU.stream, stream
    try:
        yield
    finally:
        GPU.stream = before


class Capture:
    """As `torch.cuda.graph`: where the capture fails to end, its stream remains the current one."""

    def __init__(self, graph: Graph, pool: Any, stream: Stream, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        self.cuda_graph = graph
        self.stream = stream

    def __enter__(self) -> None:
        self.before, GPU.stream, GPU.capturing = GPU.stream, self.stream, True

    def __exit__(self, *args: object) -> None:
        failed = GPU.invalidated
        GPU.capturing = GPU.invalidated = False
        if failed:
            raise RuntimeError("operation failed due to a previous error during capture")
        GPU.stream = self.before


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put it in the place of `torch.cuda` for the time of a test."""

    real, default = CudaGraphs._capture, DEFAULT.state

    def remembering(self: CudaGraphs, program: Callable[[], None], draws: Any) -> Graph:
        def captured() -> None:
            assert DEFAULT.state is not default  # a failed capture would spoil it
            try:
                program()
            except BaseException:
                GPU.invalidated = True
                raise

        graph = real(self, captured, draws)
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
        "graph": Capture,
        "graph_pool_handle": object,
        "current_stream": lambda device=None: GPU.stream,
        "stream": on,
        "get_sync_debug_mode": lambda: GPU.sync_debug_mode,
        "set_sync_debug_mode": lambda mode: setattr(GPU, "sync_debug_mode", {"warn": 1, "error": 2}.get(mode, mode)),
        "device": lambda device: contextlib.nullcontext(),
        "default_generators": [DEFAULT],
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(CudaGraphs, "_capture", remembering)
    monkeypatch.setattr(imbsam.step, "RandomState", OffsetOnly)
    DEFAULT.manual_seed(7)
    GPU.stream, GPU.sync_debug_mode = Stream(), 0
    GPU.capturing, GPU.invalidated, GPU.graphs = False, False, 0
