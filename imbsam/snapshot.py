"""State that the extra passes must leave unchanged: buffers and random generators."""

import copy
import ctypes
import pickle
import random
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from imbsam.gradients import local_shards


class Buffers:
    """The values of a module's buffers (such as BatchNorm's running statistics) at one moment.

    It also has the tensors that a hook computes before a forward and leaves as a plain attribute (the ``weight`` of
    weight normalisation and of pruning), and restores them by reference.

    Args:
        module: the owner, with all its submodules; or a list of them, as ``list(module.modules())`` gives it.
    """

    def __init__(self, module: nn.Module | Iterable[nn.Module]) -> None:
        modules = module.modules() if isinstance(module, nn.Module) else module
        self._owners = [owner for owner in modules if owner._buffers or owner._forward_pre_hooks]
        self._registered: list[tuple[Any, str, Tensor]] = [
            (owner._buffers, name, buffer)
            for owner in self._owners
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]
        self._memory = [m for _, _, buffer in self._registered if (m := _memory_of(buffer)) is not None]
        self._remember()

    def now(self) -> "Buffers":
        """The current values of the same module's buffers."""
        if any(name not in place or place[name] is not buffer for place, name, buffer in self._registered):
            return Buffers(self._owners)  # a forward has replaced one
        same = copy.copy(self)
        same._remember()
        return same

    def restore(self) -> None:
        """Copy the values back, into the tensors that were registered then (a forward may have replaced them)."""
        for place, name, tensor in (*self._registered, *self._computed):
            place[name] = tensor
        if self._memory:
            torch._foreach_copy_(self._memory, self._values)

    def _remember(self) -> None:
        self._values = [torch.empty_like(m) for m in self._memory]
        if self._memory:
            torch._foreach_copy_(self._values, self._memory)
        self._computed: list[tuple[Any, str, Tensor]] = [
            (vars(owner), name, value)
            for owner in self._owners
            if owner._forward_pre_hooks
            for name, value in vars(owner).items()
            if isinstance(value, Tensor)
        ]


def _memory_of(buffer: Tensor) -> Tensor | None:
    """The buffer as bytes, so that one call copies buffers of all dtypes; None if torch forbids an in-place change.

    Inference tensors and expanded ones cannot be written to, and so cannot have changed.
    """
    (buffer,) = local_shards([buffer.detach() if buffer.requires_grad else buffer])
    if buffer.is_inference():
        return None
    if not buffer.is_contiguous():
        expanded = any(stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True))
        return None if expanded else buffer
    return (buffer if buffer.dim() == 1 else buffer.view(-1)).view(torch.uint8)


class RandomState:
    """The states of the default generators of torch (the CPU's and the accelerators' in use), Python and NumPy.

    Args:
        devices: the devices in use.
    """

    def __init__(self, devices: set[torch.device]) -> None:
        self._devices = devices
        self._cpu = torch.get_rng_state()
        self._accelerators = {
            device: torch.get_device_module(device).get_rng_state(device)
            for device in devices
            if device.type not in ("cpu", "meta")
        }
        self._python = random.getstate()
        self._numpy = _NumPyState.now()

    def now(self) -> "RandomState":
        """The current states."""
        return RandomState(self._devices)

    def host_moved(self) -> bool:
        """Whether the generators of torch's CPU, Python or NumPy have drawn since."""
        return (
            not torch.equal(self._cpu, torch.get_rng_state())
            or self._python != random.getstate()
            or self._numpy.moved()
        )

    def restore(self) -> None:
        """Restore every generator."""
        torch.set_rng_state(self._cpu)
        for device, state in self._accelerators.items():
            torch.get_device_module(device).set_rng_state(state, device)
        random.setstate(self._python)
        self._numpy.restore()


class _NumPyState:
    """The state of NumPy's global generator, which layers draw from.

    Getting or setting it takes as long as a layer of a small net (25 microseconds); comparing its memory takes 1. So
    the latest one is kept: where the memory is still the same, so is the state.
    """

    _latest: ClassVar["_NumPyState | None"] = None

    def __init__(self) -> None:
        self._memory = _memory()
        self._state: Any = np.random.get_state(legacy=False)  # noqa: NPY002

    @classmethod
    def now(cls) -> "_NumPyState":
        """The current state."""
        latest = cls._latest
        if latest is None or latest.moved():
            latest = cls._latest = cls()
        return latest

    def moved(self) -> bool:
        """Whether the generator has drawn since."""
        return self._memory != _memory()

    def restore(self) -> None:
        if self.moved():
            np.random.set_state(self._state)  # noqa: NPY002


def _memory() -> bytes:
    """What NumPy's global generator has in memory.

    624 words and a position, and in the object around it the second number of a pair of normals, if that is still to be
    drawn; of a generator of another kind, the state itself.
    """
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if type(generator) is not np.random.MT19937:
        return pickle.dumps(np.random.get_state(legacy=False))  # noqa: NPY002
    owner = np.random.get_state.__self__  # type: ignore[attr-defined]
    header, size = object.__basicsize__, type(owner).__basicsize__
    return ctypes.string_at(generator.ctypes.state_address, 2500) + ctypes.string_at(id(owner) + header, size - header)
