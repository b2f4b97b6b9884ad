"""GSAM's ascent of the loss at w, orthogonal to the gradient at w + e, which closes the gap between the two."""

from collections.abc import Sequence

import torch
from torch import Tensor

from imbsam.distributed import PerRank, Reduction
from imbsam.gradients import Gradients, clones, local_shards
from imbsam.perturbation import norm_of


class SurrogateGap(Reduction):
    r"""A reduction that keeps g(w) and subtracts alpha times its part orthogonal to g(w + e) from the gradient.

    Args:
        reduction: averages over the ranks; with a perturbation per rank, each rank also subtracts its own part.
        alpha: how much of that part.
        copied: whether to copy g(w), because the ascent overwrites it, as ASAM's does.
    """

    def __init__(self, reduction: Reduction, alpha: float, copied: bool) -> None:
        super().__init__(reduction.params)
        self.waits = reduction.waits
        self._reduction = reduction
        self._alpha = alpha
        self._copied = copied
        self._at_w: list[Tensor | None] = [None] * len(reduction.params)

    def mean_g_s(self, g_s: Gradients) -> Gradients:
        """The g(w) that the weights ascend."""
        mean = self._reduction.mean_g_s(g_s)
        self._at_w = list(mean.tensors)
        if self._copied:
            self._at_w = [None if g is None else clones([g])[0] for g in self._at_w]
        return mean

    def mean(self, g: Gradients) -> Gradients:
        """The gradient that the optimizer sees."""
        if isinstance(self._reduction, PerRank):
            return self._reduction.mean(self._less_gap(g))
        return self._less_gap(self._reduction.mean(g))

    def _less_gap(self, g: Gradients) -> Gradients:
        both = [(p, w) for p, w in zip(g.tensors, self._at_w, strict=True) if p is not None and w is not None]
        if both:
            take_across_([p for p, _ in both], [w for _, w in both], self._alpha)
        return g


@torch.no_grad()
def take_across_(g: Sequence[Tensor], at_w: Sequence[Tensor], alpha: float) -> None:
    r"""Subtract from g, in place, alpha times the component of `at_w` that is orthogonal to g; overwrites `at_w`.

    That component is the one of :math:`d = g(w) - g`, which is :math:`d - \kappa g` with
    :math:`\kappa = \langle d, g \rangle / \|g\|^2 = (\|g(w)\|^2 - \|d\|^2 - \|g\|^2) / (2 \|g\|^2)`: three norms, which
    handle shards, instead of a product for each parameter.
    """
    square, square_at_w = norm_of(g).square(), norm_of(at_w).square()
    torch._foreach_sub_(local_shards(at_w), local_shards(g))
    kappa = (square_at_w - norm_of(at_w).square() - square) / (2 * square)
    kappa = torch.where(square > 0, kappa, 0.0)  # no branch on the host: it would wait for the GPU
    into, across = local_shards(g), local_shards(at_w)
    for device in {t.device for t in into}:
        here = [i for i, t in enumerate(into) if t.device == device]
        torch._foreach_mul_([into[i] for i in here], (1 + alpha * kappa).to(device))
        torch._foreach_add_([into[i] for i in here], [across[i] for i in here], alpha=-alpha)
