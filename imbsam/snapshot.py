"""What the extra passes must leave as they found it: buffers and random generators."""

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from imbsam.gradients import clones, copy_, local_shards


class Buffers:
    """The values of a module's buffers (BatchNorm's running statistics, among others) at one moment.

    With them the tensors that a hook computes before a forward and leaves as a plain attribute (the ``weight`` of
    weight normalisation and of pruning): they are put back as they were, by reference.

    Args:
        module: the owner, with all its submodules; or a list of them, as ``list(module.modules())`` gives it.
    """

    def __init__(self, module: nn.Module | Iterable[nn.Module]) -> None:
        modules = list(module.modules() if isinstance(module, nn.Module) else module)
        self._owners = [owner for owner in modules if owner._buffers or owner._forward_pre_hooks]
        self._registered: list[tuple[Any, str, Tensor]] = [
            (owner._buffers, name, buffer)
            for owner in self._owners
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]
        self._computed: list[tuple[Any, str, Tensor]] = [
            (vars(owner), name, value)
            for owner in self._owners
            if owner._forward_pre_hooks
            for name, value in vars(owner).items()
            if isinstance(value, Tensor)
        ]
        # what cannot be written to cannot have changed
        buffers = local_shards([buffer for _, _, buffer in self._registered])
        self._bytes = [_bytes(buffer) for buffer in buffers if _writable(buffer)]
        self._values = clones(self._bytes)

    def now(self) -> "Buffers":
        """The values at this moment of the same module's buffers."""
        return Buffers(self._owners)

    def restore(self) -> None:
        """Copy the values back, into the very tensors that were registered (a forward may have replaced them)."""
        for place, name, tensor in (*self._registered, *self._computed):
            place[name] = tensor
        copy_(self._bytes, self._values)


def _bytes(buffer: Tensor) -> Tensor:
    """The buffer's memory, so that buffers of all dtypes are copied in one call."""
    buffer = buffer.detach()
    return buffer.view(-1).view(torch.uint8) if buffer.is_contiguous() else buffer


def _writable(tensor: Tensor) -> bool:
    """Whether torch allows an in-place change: not of inference tensors and expanded ones."""
    overlapping = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return not (tensor.is_inference() or overlapping)


class RandomState:
    """The states of the default generators of torch (the CPU's and the accelerators' in use), Python and NumPy."""

    def __init__(self, devices: set[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._accelerators = {
            device: torch.get_device_module(device).get_rng_state(device)
            for device in devices
            if device.type not in ("cpu", "meta")
        }
        self._python = random.getstate()
        self._numpy = np.random.get_state()  # noqa: NPY002  the layers that draw from NumPy use the global generator

    def restore(self) -> None:
        """Put every generator back to where it stood."""
        torch.set_rng_state(self._cpu)
        for device, state in self._accelerators.items():
            torch.get_device_module(device).set_rng_state(state, device)
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
