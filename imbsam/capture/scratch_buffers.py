"""Buffers of a captured step: the first passes write to the registered ones, the extra passes to scratch copies."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from imbsam.snapshot import _memory_of


class ScratchBuffers:
    """A module's buffers at fixed addresses, and for each a scratch tensor that stands in for it in the extra passes.

    The eager engine copies the buffers and copies them back. A graph can do without, and g_s(w) can then run beside the
    first pass, which writes to the registered buffers at the same time. A buffer that a forward replaces
    (``self.calls = self.calls + 1``) is copied into the registered one, where the next replay finds it.

    Args:
        modules: the module's submodules, itself first.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._owners = [owner for owner in modules if owner._buffers or owner._forward_pre_hooks]
        self._registered: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        scratch: dict[int, Tensor] = {}
        for owner in self._owners:
            for name, buffer in owner._buffers.items():
                if buffer is not None and _memory_of(buffer) is not None:
                    shared = scratch.setdefault(id(buffer), buffer.detach().clone())
                    self._registered.append((owner, name, buffer, shared))
        self._memory = [_bytes(buffer) for _, _, buffer, _ in self._registered]
        self._entry = [torch.empty_like(m) for m in self._memory]
        self._computed: list[tuple[Any, str, Tensor]] = []

    def keep(self) -> None:
        """Remember the values as they are, at the start of a step."""
        self.settle()
        _copy(self._entry, self._memory)
        self._computed = [
            (vars(owner), name, value)
            for owner in self._owners
            if owner._forward_pre_hooks  # weight normalisation and pruning leave a plain attribute
            for name, value in vars(owner).items()
            if isinstance(value, Tensor)
        ]

    def detach_computed(self) -> None:
        """Before a recording: drop the autograd graphs of computed weights, which the next forward computes anew.

        A weight of an earlier eager forward keeps its parameters' gradient nodes on that forward's stream, and a
        capture that reaches them fails.
        """
        self._computed = [(place, name, tensor.detach()) for place, name, tensor in self._computed]
        self._put_computed_back()

    def undo(self) -> None:
        """Back to what :meth:`keep` remembered."""
        self.put_back()
        _copy(self._memory, self._entry)

    def settle(self) -> None:
        """After a first pass: its values into the registered tensors, where a forward has replaced one."""
        for owner, name, buffer, scratch in self._registered:
            now = owner._buffers[name]
            if now is not None and now is not buffer and now is not scratch:
                with torch.no_grad():
                    buffer.copy_(now)
            owner._buffers[name] = buffer

    def set_aside(self) -> None:
        """After a first pass has settled: what runs from now on writes to scratch."""
        for owner, name, _, scratch in self._registered:
            owner._buffers[name] = scratch

    def put_back(self) -> None:
        """Register the module's own tensors again, whose values nothing has touched since :meth:`set_aside`."""
        for owner, name, buffer, _ in self._registered:
            owner._buffers[name] = buffer
        self._put_computed_back()

    def _put_computed_back(self) -> None:
        for place, name, tensor in self._computed:
            place[name] = tensor

    def start(self, *, first: bool) -> "Start":
        """What the extra passes of a micro-batch start from: the values as they are, at entry for the first one."""
        read = [i for i, (owner, name, _, _) in enumerate(self._registered) if not _written_only(owner, name)]
        values = [self._entry[i] if first else self._memory[i].clone() for i in read]
        return Start(self, [_bytes(self._registered[i][3]) for i in read], values)


class Start:
    """The buffers that the first pass of a micro-batch saw.

    Args:
        buffers: all buffers of the module.
        scratch: memory of the scratch tensors whose values a forward may read.
        values: what it read in the first pass.
    """

    def __init__(self, buffers: ScratchBuffers, scratch: list[Tensor], values: list[Tensor]) -> None:
        self._buffers = buffers
        self._scratch = scratch
        self._values = values

    def restore(self) -> None:
        """Register the scratch tensors, with these values."""
        self._buffers.set_aside()
        self._buffers._put_computed_back()  # those of the pass before hold its graph
        _copy(self._scratch, self._values)


def _written_only(owner: nn.Module, name: str) -> bool:
    """Whether it is a running statistic that its forward writes and does not read: scratch may hold anything."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return isinstance(owner, (_BatchNorm, _InstanceNorm)) and owner.training and name in statistics


def _bytes(buffer: Tensor) -> Tensor:
    memory = _memory_of(buffer)
    assert memory is not None
    return memory


def _copy(into: list[Tensor], values: list[Tensor]) -> None:
    if into:
        torch._foreach_copy_(into, values)
