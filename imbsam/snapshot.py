"""What the extra passes must leave as they found it: buffers and random generators."""

from collections.abc import Iterable

import torch
from torch import nn


class Buffers:
    """A copy of every buffer (BatchNorm's running statistics, among others).

    Args:
        modules: the owners, as ``module.modules()`` lists them.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._copies = [
            (owner, name, buffer, buffer.detach().clone())
            for owner in modules
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Copy the values back, into the very tensors that were registered (a forward may have replaced them)."""
        for owner, name, buffer, copy in self._copies:
            owner._buffers[name] = buffer
            buffer.copy_(copy)


class RandomState:
    """The states of torch's default generators: the CPU's and those of the accelerators in use.

    Python's and NumPy's generators are not torch's and are left alone.
    """

    def __init__(self, devices: set[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._accelerators = {
            device: torch.get_device_module(device).get_rng_state(device)
            for device in devices
            if device.type not in ("cpu", "meta")
        }

    def restore(self) -> None:
        """Put every generator back to where it stood."""
        torch.set_rng_state(self._cpu)
        for device, state in self._accelerators.items():
            torch.get_device_module(device).set_rng_state(state, device)
