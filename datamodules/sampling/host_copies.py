"""Small tensors of the host that follow the images onto a device, without the host waiting for it."""

import torch
from torch import Tensor


def pinned_for(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host, in pinned memory if the device is a GPU: only then can a copy be asynchronous."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def copied_to(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; the host does not wait for the copy."""
    return pinned_for(tensor, device).to(device, non_blocking=True)
