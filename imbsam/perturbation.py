"""The perturbation e; ascend from the weights w to w + e, and restore w bit for bit."""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from imbsam.gradients import clones, copy_, local_shards


@torch.no_grad()
def perturbation(g: Sequence[Tensor], rho: float | Tensor, *, weights: Sequence[Tensor] | None = None) -> list[Tensor]:
    r"""The perturbation :math:`e = \rho\, g / \|g\|` (SAM, Foret et al., ICLR 2021, equation 2).

    Args:
        g: the gradient to ascend, one tensor for each parameter, with one norm over all of them. e is 0 if any element
            is not finite, and if g is 0 or so small that rho / ||g|| overflows.
        rho: length of e; in a captured step a scalar on the device.
        weights: w, for ASAM's :math:`e = \rho\, w^2 g / \|w g\|` (Kwon et al., ICML 2021); this overwrites `g`.

    Returns:
        e, one tensor for each of `g`, of its shape and dtype; of a DTensor this rank's shard.
    """
    g = [t.resolve_conj() if t.is_complex() else t for t in g]
    local = local_shards(g)
    if weights is None:
        norm = norm_of(g)
    else:
        sizes = [w.abs() if w.is_complex() else w for w in local_shards(weights)]
        torch._foreach_mul_(local, sizes)
        norm = norm_of(g)
        torch._foreach_mul_(local, sizes)
    scale = norm.reciprocal() * (rho.to(norm.dtype) if isinstance(rho, Tensor) else rho)
    # no Python branch on the norm: that would wait for the GPU
    return _scaled(local, torch.nan_to_num(scale, nan=0.0, posinf=0.0))


class Ascent:
    """The weights w: `ascend` takes them to w + e in place, and `restore` restores them bit for bit.

    It restores from a copy of w: adding e and then subtracting it would drift.

    Args:
        params: the tensors to perturb in place.
        after_write: called after every change of the weights (FSDP2 must drop what it has gathered of the old ones).
    """

    def __init__(self, params: Sequence[Tensor], after_write: Callable[[], None] = lambda: None) -> None:
        self._params = local_shards(params)
        self._after_write = after_write
        self._weights: list[Tensor] | None = None

    def ascend(self, e: Sequence[Tensor]) -> None:
        """Add e, one tensor for each parameter, to the weights."""
        self._weights = clones(self._params)
        with torch.no_grad():
            torch._foreach_add_(self._params, local_shards(e))
        self._written()

    def restore(self) -> None:
        """Copy w back. May be called again, and does nothing before `ascend`."""
        if self._weights is not None:
            copy_(self._params, self._weights)
            self._written()

    def _written(self) -> None:
        torch.clear_autocast_cache()  # it holds casts of the old weights: the pass at w + e would be one at w
        self._after_write()


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all elements and all shards of DTensors, in float32 or better, on the first one's device."""
    local = [torch.view_as_real(t) if t.is_complex() else t for t in local_shards(tensors)]
    dtype = reduce(torch.promote_types, {t.dtype for t in local}, torch.float32)
    norms = torch._foreach_norm(local, 2, dtype=dtype)
    parts: dict[Any, list[Tensor]] = {}
    for t, norm in zip(tensors, norms, strict=True):
        parts.setdefault(_mesh(t), []).append(norm if norm.device == norms[0].device else norm.to(norms[0].device))
    whole = [_over_shards(torch.linalg.vector_norm(torch.stack(part)), mesh) for mesh, part in parts.items()]
    return whole[0] if len(whole) == 1 else torch.linalg.vector_norm(torch.stack(whole))


def _scaled(tensors: Sequence[Tensor], scale: Tensor) -> list[Tensor]:
    """Copies of the tensors times `scale`, 0 where that is 0, as views of one flat tensor per device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, t in enumerate(tensors):
        groups.setdefault((t.device, t.dtype), []).append(i)
    copies: dict[int, Tensor] = {}
    for (device, _), members in groups.items():
        dense = [_dense(tensors[i]) for i in members]
        flat = torch.cat([t.as_strided((t.numel(),), (1,)) for t in dense])
        factor = scale.to(device)
        flat.mul_(factor).masked_fill_(factor == 0, 0.0)  # filled, not multiplied: 0 * inf is nan
        offset = 0
        for i, t in zip(members, dense, strict=True):
            copies[i] = flat.as_strided(t.shape, t.stride(), offset)
            offset += t.numel()
    return [copies[i] for i in range(len(tensors))]


def _dense(t: Tensor) -> Tensor:
    """The tensor itself if its elements fill its memory without gaps, in any order (channels-last, transposed)."""
    if t.is_contiguous() or torch.empty_like(t, device="meta").stride() == t.stride():
        return t
    return t.contiguous()


def _mesh(tensor: Any) -> tuple[Any, Any] | None:
    """Mesh and placements of a DTensor; None for other tensors."""
    return (tensor.device_mesh, tensor.placements) if hasattr(tensor, "placements") else None


def _over_shards(norm: Tensor, mesh: Any) -> Tensor:
    """The norm over the shards of a DTensor's mesh and placements, in one all-reduce."""
    if mesh is None:
        return norm
    from torch.distributed.tensor import DTensor, Partial, Replicate

    device_mesh, placements = mesh
    summed = [Partial() if placement.is_shard() else Replicate() for placement in placements]
    total: Tensor = DTensor.from_local(norm.square(), device_mesh, summed).full_tensor()
    return total.sqrt()
