"""What runs the passes of a captured step: CUDA graphs, or a stand-in for them that calls the passes directly."""

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from imbsam.capture.philox import Philox
from imbsam.capture.static_passes import StaticPasses
from imbsam.gradients import clones, copy_
from imbsam.snapshot import RandomState

WARM_UP = 3
"""Runs before a capture: kernels are chosen and compiled, and workspaces allocated, on the streams of the capture."""


class CaptureError(RuntimeError):
    """The passes cannot be captured; the message says why, in one line."""


class Recording(Protocol):
    """The programs of one :class:`StaticPasses`, ready to run again and again."""

    passes: StaticPasses

    def begin(self) -> Callable[[], None]:
        """At the start of a step; returns what puts weights and generators back to where they are now."""

    def replay(self, program: int) -> None:
        """Run one of the programs, in their order."""

    def end(self) -> None:
        """At the end of a step: the generators stand where one ordinary pass leaves them."""


class Graphs(Protocol):
    """What makes recordings."""

    def record(self, passes: StaticPasses) -> Recording:
        """Ready the passes to run; the module is as it was afterwards, also after an exception."""


class DirectCalls:
    """The stand-in: a replay calls the passes. With it all of a captured step but the capture runs on a CPU.

    Args:
        device: of the parameters.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def record(self, passes: StaticPasses) -> "DirectRecording":
        """Nothing to prepare."""
        return DirectRecording(passes, self._device)


class DirectRecording:
    """Passes that are called.

    Args:
        passes: the passes.
        device: of the parameters.
    """

    def __init__(self, passes: StaticPasses, device: torch.device) -> None:
        self.passes = passes
        self._device = device

    def begin(self) -> Callable[[], None]:
        """Remember where the generators stand."""
        self.passes.ascent = None
        self.passes.generators = entry = RandomState({self._device})

        def undo() -> None:
            if self.passes.ascent is not None:  # the interruption may have come at w + e
                self.passes.ascent.restore()
            entry.restore()

        return undo

    def replay(self, program: int) -> None:
        """Call it."""
        with uncached_autocast():
            self.passes.programs[program]()

    def end(self) -> None:
        """The passes themselves have put the generators back."""


class CudaGraphs:
    """CUDA graphs with one memory pool, which they can share because they are replayed one after the other.

    Args:
        device: of the parameters.
    """

    branches = True
    """Whether g_s(w) is a branch of its own beside g_all(w), which it does not depend on."""

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._branch = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def record(self, passes: StaticPasses) -> "CudaRecording":
        """Run the passes a few times on a side stream, then capture them.

        Raises:
            CaptureError: where something in the passes cannot be part of a graph.
        """
        draws, host = Philox(self._device), RandomState(set())
        passes.generators, passes.branch = draws, self._branch if self.branches and passes.can_branch else None
        weights = clones(passes.params)
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        try:
            self._warm_up(passes, draws)
            if host.host_moved():
                raise CaptureError(
                    "the forward draws random numbers on the host (Python's, NumPy's or torch's CPU generator), and a "
                    "graph would draw the same ones in every step"
                )
            graphs = [self._capture(program, draws) for program in passes.programs]
        finally:
            passes.ascent = None  # its copy of the weights belongs to the graph
            here.wait_stream(self._stream)
            copy_(passes.params, weights)  # an interruption may have come at w + e
            passes.buffers.undo()
            draws.undo()
            host.restore()
        return CudaRecording(passes, graphs, draws)

    def _warm_up(self, passes: StaticPasses, draws: Philox) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream), uncached_autocast():
            for run in range(WARM_UP):
                draws.begin_warm_up()
                with _no_synchronisation() if run == WARM_UP - 1 else contextlib.nullcontext():
                    for program in passes.programs:
                        draws.next_program()
                        program()
                draws.end_warm_up()

    def _capture(self, program: Callable[[], None], draws: Philox) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        draws.begin_capture(graph)
        failure: BaseException | None = None
        try:
            with (
                torch.cuda.device(self._device),
                torch.cuda.stream(self._stream),  # torch.cuda.graph stays on its stream when a capture fails to end
                uncached_autocast(),
                # other threads (a loader's, NCCL's) may do meanwhile what this one must not
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    program()
                except BaseException as error:  # the capture must be ended first, which then fails too
                    failure = error
        except RuntimeError as error:
            failure = failure or error
        finally:
            draws.end_capture()
        if failure is None:
            return graph
        graph.reset()  # an error's traceback may hold it
        try:
            if not isinstance(failure, RuntimeError) or isinstance(failure, torch.OutOfMemoryError):
                raise failure
            raise CaptureError(_in_one_line(failure)) from failure
        finally:
            del failure, graph  # or this frame and the error would hold each other, and what the passes have allocated


_SYNCHRONISATION = "called a synchronizing CUDA operation"
"""torch's warning."""


@contextlib.contextmanager
def _no_synchronisation() -> Iterator[None]:
    """The last warm-up: what waits for the GPU is found here, before a capture has begun.

    In older torch a capture that fails does not end its use of the memory pool. torch's mode is the whole process's, so
    it is "warn": with "error", another thread that reads a number or copies weights to a checkpoint meanwhile would
    fail. Only this thread's warnings count; autograd's threads hand theirs to it. What is missed ends in the capture.

    Raises:
        CaptureError: for a synchronisation.
    """
    mode, here = torch.cuda.get_sync_debug_mode(), threading.get_ident()
    waits = False
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=_SYNCHRONISATION)
        show = warnings.showwarning

        def look(message: Warning | str, *args: Any, **kwargs: Any) -> None:
            nonlocal waits
            if _SYNCHRONISATION not in str(message):
                show(message, *args, **kwargs)
            elif threading.get_ident() == here:
                waits = True

        warnings.showwarning = look
        try:
            torch.cuda.set_sync_debug_mode("warn")
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    if waits:
        raise CaptureError(
            "the passes wait for the GPU (.item(), float() or a condition on a value, indexing by a mask, a copy to or "
            "from the CPU)"
        )


_STALE_STREAM = (
    "across the capture boundary",
    "stale reference to the default stream",
    "legacy stream depend on a capturing",
    "dependency created on uncaptured work",
)
"""What torch and CUDA say where a parameter's node of an older autograd graph waits on another stream."""


def _in_one_line(failure: RuntimeError) -> str:
    message = str(failure).strip()
    if any(part in message for part in _STALE_STREAM):
        return (
            "an earlier forward's output is still alive (a loss or logits with their autograd graph): delete it, or "
            "keep it detached; or DistributedDataParallel was not built on a side stream"
        )
    return message.splitlines()[0] if message else type(failure).__name__


def graphs_on(device: torch.device) -> Graphs | None:
    """CUDA graphs for parameters on a GPU; None elsewhere, where there are none."""
    return CudaGraphs(device) if device.type == "cuda" else None


class CudaRecording:
    """Captured passes.

    Args:
        passes: the passes.
        graphs: one for each of their programs.
        draws: the generators that they draw from.
    """

    def __init__(self, passes: StaticPasses, graphs: list[torch.cuda.CUDAGraph], draws: Philox) -> None:
        self.passes = passes
        self._graphs = graphs
        self._draws = draws

    def begin(self) -> Callable[[], None]:
        """The graphs will draw what the eager engine would, and restore the weights themselves."""
        self._draws.begin_replay()
        return self._draws.undo

    def replay(self, program: int) -> None:
        """Launch the graph, on the current stream."""
        self._graphs[program].replay()

    def end(self) -> None:
        """The default generator stands where one ordinary pass leaves it."""
        self._draws.end_replay()


@contextlib.contextmanager
def uncached_autocast() -> Iterator[None]:
    """No cast of a weight from before is used, and none is left behind: a graph's would be overwritten by the next.

    For the passes at w + e the engine clears the cache itself; one enclosing autocast region makes this necessary.
    """
    enabled = torch.is_autocast_cache_enabled()
    try:
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(False)
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
