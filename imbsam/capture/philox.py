"""Random numbers inside CUDA graphs: the same dropout masks in both extra passes, and those of the eager engine."""

from typing import Protocol

import torch
from torch.torch_version import TorchVersion

_REGISTERS = TorchVersion(torch.__version__) < "2.14.0a0"
"""Whether a graph must be told what generator states it draws from; later ones see it, and warn at every call."""


class Moment(Protocol):
    """Where the random generators stood at one moment."""

    def restore(self) -> None:
        """Put them back there."""


class Generators(Protocol):
    """The random generators that the passes draw from."""

    def now(self) -> Moment:
        """Where they stand."""


class Philox:
    """The default generator of a GPU, whose numbers are a function of a seed and an offset.

    A capture forbids to read or set an offset. So the warm-up notes where each pass starts, relative to the start of
    the step; in the capture every pass draws from a generator state of its own
    (``Generator.graphsafe_set_state``), and before a replay the host sets the offsets of these states.

    The default generator's own state takes no part in a capture: after one that failed it would be of no use.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._default = torch.cuda.default_generators[device.index]
        self._own = self._default.graphsafe_get_state()
        self._start = self._default.get_offset()
        self._end = 0
        self._stops: list[list[int]] = []
        self._states: list[list[torch.Generator]] = []
        self._capturing = False
        self._next = 0

    def begin_warm_up(self) -> None:
        """At the start of a step that is run, not captured."""
        self._stops = []

    def next_program(self) -> None:
        """At the start of each program of the step."""
        self._stops.append([])

    def end_warm_up(self) -> None:
        """At its end: back to the start."""
        self._end = self._offset()
        self._default.set_offset(self._start)

    def begin_capture(self, graph: torch.cuda.CUDAGraph) -> None:
        """Before each program of the step is captured, in their order."""
        passes = 1 + len(self._stops[len(self._states)]) if self._end else 1
        states = [self._default.clone_state() for _ in range(passes)]
        if _REGISTERS:
            for state in states:
                graph.register_generator_state(state)
        self._states.append(states)
        self._next = 1
        self._capturing = True
        self._default.graphsafe_set_state(states[0])

    def end_capture(self) -> None:
        """After it, also after one that failed."""
        self._capturing = False
        self._default.graphsafe_set_state(self._own)

    def now(self) -> "Mark":
        """Where the generator stands, for :meth:`Mark.restore`."""
        return Mark(self, 0 if self._capturing else self._offset())

    def go_to(self, offset: int) -> None:
        """Draw from there on what was drawn from there."""
        if not self._capturing:
            self._stops[-1].append(offset)
            self._default.set_offset(self._start + offset)
        elif self._end:
            self._default.graphsafe_set_state(self._states[-1][self._next])
            self._next += 1

    def begin_replay(self) -> None:
        """Before the graphs are launched."""
        self._start = self._default.get_offset()
        if self._end:
            seed = self._default.initial_seed()
            for stops, states in zip(self._stops, self._states, strict=True):
                for stop, state in zip([0, *stops], states, strict=True):
                    state.manual_seed(seed)
                    state.set_offset(self._start + stop)

    def end_replay(self) -> None:
        """After they were launched."""
        self._default.set_offset(self._start + self._end)

    def undo(self) -> None:
        """Back to the start of the step."""
        self._default.graphsafe_set_state(self._own)
        self._default.set_offset(self._start)

    def _offset(self) -> int:
        return self._default.get_offset() - self._start


class Mark:
    """Where the generator stood.

    Args:
        philox: the generator.
        offset: from the start of the step; unknown, and not needed, inside a capture.
    """

    def __init__(self, philox: Philox, offset: int) -> None:
        self._philox = philox
        self._offset = offset

    def restore(self) -> None:
        """Draw from there on what was drawn from there."""
        self._philox.go_to(self._offset)
