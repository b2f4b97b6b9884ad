"""The gradients of all trained parameters as one object, with `+=` and `-=`."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class Gradients:
    """One gradient for each trained parameter; None, which counts as 0, if no pass has reached it.

    Args:
        tensors: the gradients, in the parameters' order.
    """

    def __init__(self, tensors: Iterable[Tensor | None]) -> None:
        self.tensors = list(tensors)

    def __iadd__(self, others: "Gradients") -> "Gradients":
        """Add in place, in one multi-tensor call; where this has None, it takes over the tensor of `others`."""
        return self._add(others, 1)

    def __isub__(self, others: "Gradients") -> "Gradients":
        """Subtract in place, in one multi-tensor call."""
        return self._add(others, -1)

    @torch.no_grad()
    def _add(self, others: "Gradients", alpha: int) -> "Gradients":
        pairs = zip(self.tensors, others.tensors, strict=True)
        both = [(into, other) for into, other in pairs if into is not None and other is not None]
        if both:
            into, increments = zip(*both, strict=True)
            torch._foreach_add_(local_shards(into), local_shards(increments), alpha=alpha)
        for i, other in enumerate(others.tensors):
            if self.tensors[i] is None and other is not None:
                self.tensors[i] = other if alpha == 1 else alpha * other
        return self


def local_shards(tensors: Sequence[Any]) -> list[Tensor]:
    """This rank's shards of DTensors (FSDP2), which share their memory; other tensors as they are."""
    if not any(hasattr(t, "to_local") for t in tensors):
        return list(tensors)
    with torch.no_grad():
        return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


def copy_(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy tensor by tensor, outside autograd, in one multi-tensor call for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for target, value in zip(into, values, strict=True):
        targets, sources = groups.setdefault((target.device, target.dtype), ([], []))
        targets.append(target)
        sources.append(value)
    with torch.no_grad():
        for targets, sources in groups.values():
            torch._foreach_copy_(targets, sources)


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the tensors, outside autograd, with the strides of the originals where those are dense."""
    copies = [torch.empty_like(t, requires_grad=False) for t in tensors]
    copy_(copies, tensors)
    return copies
