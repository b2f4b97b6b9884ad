"""Climb from the weights w to w + e, and come back bit for bit."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor


class Perturbation:
    """The perturbed weights w + e, with e = rho * g / ||g|| (SAM, Foret et al., ICLR 2021, equation 2).

    The way back is a copy of w: adding and then subtracting e would drift.

    Args:
        params: the tensors to perturb in place.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = local_shards(params)
        self._weights: list[Tensor] | None = None

    @torch.no_grad()
    def climb(self, grads: Sequence[Tensor], rho: float, *, adaptive: bool = False) -> None:
        """Add e to the weights, in place. `grads` is overwritten by e.

        Args:
            grads: g, one tensor for each parameter. Where any element is not finite, nothing is perturbed; where
                g is 0, e is 0.
            rho: length of e (of e / w where `adaptive`).
            adaptive: e = rho * w^2 g / ||w g|| instead (ASAM, Kwon et al., ICML 2021).
        """
        local = local_shards(grads)
        self._weights = [p.detach().clone() for p in self._params]
        if adaptive:
            torch._foreach_mul_(local, self._weights)
        norm = _norm(grads)
        if adaptive:
            torch._foreach_mul_(local, self._weights)
        # no Python branch on the norm: that would wait for the GPU
        finite = torch.isfinite(norm)
        scale = torch.where(finite & (norm > 0), rho / norm, 0.0)
        for device in {g.device for g in local}:
            on_device, overflowed = [g for g in local if g.device == device], ~finite.to(device)
            torch._foreach_mul_(on_device, scale.to(device))
            for g in on_device:
                g.masked_fill_(overflowed, 0.0)  # 0 * inf is nan
        self._add(local)

    def move(self, e: Sequence[Tensor]) -> None:
        """Add e to the weights as it is, in place.

        Args:
            e: one tensor for each parameter, of its shape.
        """
        self._weights = [p.detach().clone() for p in self._params]
        self._add(local_shards(e))

    @torch.no_grad()
    def _add(self, e: list[Tensor]) -> None:
        torch._foreach_add_(self._params, e)
        torch.clear_autocast_cache()  # autocast would go on with the casts of w: the pass at w + e would be one at w

    @torch.no_grad()
    def come_back(self) -> None:
        """Copy w back. May be called again, and does nothing before `climb` or `move`."""
        if self._weights is not None:
            torch._foreach_copy_(self._params, self._weights)
            torch.clear_autocast_cache()


@torch.no_grad()
def local_shards(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This rank's shards of DTensors (FSDP2), which share their memory; other tensors as they are."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all elements, and all shards of DTensors, at least in float32; on the first one's device."""
    dtype = reduce(torch.promote_types, {t.dtype for t in tensors}, torch.float32)
    norms = torch._foreach_norm(local_shards(tensors), 2, dtype=dtype)
    parts: dict[Any, list[Tensor]] = {}
    for t, norm in zip(tensors, norms, strict=True):
        parts.setdefault(_mesh(t), []).append(norm.to(norms[0].device))
    squares = [_over_shards(torch.stack(part).square().sum(), mesh) for mesh, part in parts.items()]
    return torch.stack(squares).sum().sqrt()


def _mesh(tensor: Any) -> tuple[Any, Any] | None:
    """Where the shards of a DTensor lie; None for other tensors."""
    return (tensor.device_mesh, tensor.placements) if hasattr(tensor, "placements") else None


def _over_shards(square: Tensor, mesh: Any) -> Tensor:
    """The sum over the shards of a DTensor's mesh and placements, in one all-reduce."""
    if mesh is None:
        return square
    from torch.distributed.tensor import DTensor, Partial, Replicate

    device_mesh, placements = mesh
    summed = [Partial() if placement.is_shard() else Replicate() for placement in placements]
    total: Tensor = DTensor.from_local(square, device_mesh, summed).full_tensor()
    return total
