"""The method in thirty plain lines, to be read with the paper: whole batch, all gradients, no shortcuts.

The engine (:mod:`imbsam.step`) computes the same gradient at a lower cost; tests and benchmarks compare the two. Start
reading here.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def backward(
    losses: Callable[[], Tensor],
    params: Sequence[Tensor],
    c: Tensor,
    a: Tensor | float = 1.0,
    *,
    rho: float | Sequence[float] = 0.05,
    adaptive: bool = False,
    alpha: float = 0.0,
    perturbed: Sequence[bool] | None = None,
) -> Tensor:
    r"""Leave the gradient of L, with e held fixed, in ``.grad``.

    .. math::
        L(w) = \frac1B \sum_i a_i \left[ (1 - c_i)\, l_i(w) + c_i\, l_i(w + e) \right], \qquad
        e = \rho \frac{g_s}{\|g_s\|}, \qquad g_s = \nabla_w \frac1B \sum_i a_i c_i\, l_i(w)

    Args:
        losses: returns the per-sample losses of the whole batch, shape (B,), at the current weights. With multi-label
            targets every pair of a sample and a class is a sample here: return all B times C losses, flattened.
        params: the weights w, each of which the losses depend on.
        c: sharpness weight of each sample, shape (B,): for ImbSAM 1 if its class is tail, else 0. Or shape (K, B), one
            row for each group of classes with its own g_s and e: L then has the sum over k of c_ik l_i(w + e_k), and
            1 - sum c_ik instead of 1 - c_i (CC-SAM, SSE-SAM).
        a: loss weight of each sample, shape (B,); 2 for the tail in the published code.
        rho: length of e; K of them if c has K rows.
        adaptive: e = rho w^2 g_s / ||w g_s|| (ASAM).
        alpha: subtract this much of the part of g_s(w) that is orthogonal to the gradient (GSAM; c = 1).
        perturbed: whether to perturb each of the params; default: all (SAM-ON: only the normalisation layers').

    Returns:
        1/B sum_i a_i l_i(w), detached.

    Source:
        Zhou et al., *ImbSAM*, ICCV 2023, arXiv 2308.07815; e: Foret et al., *Sharpness-Aware Minimization*, ICLR 2021,
        equation 2, and Kwon et al., *ASAM*, ICML 2021.
    """
    loss = losses()
    groups = c if c.dim() == 2 else c[None]
    perturbed = [True] * len(params) if perturbed is None else perturbed
    lengths = rho if isinstance(rho, Sequence) else [rho] * len(groups)
    directions = [torch.autograd.grad((a * c_k * loss).mean(), params, retain_graph=True) for c_k in groups]
    gradient = list(torch.autograd.grad((a * (1 - groups.sum(0)) * loss).mean(), params))
    before = [w.detach().clone() for w in params]
    for c_k, rho_k, g_k in zip(groups, lengths, directions, strict=True):
        with torch.no_grad():
            direction = [w * g if adaptive else g for w, g in zip(params, g_k, strict=True)]
            direction = [d * chosen for d, chosen in zip(direction, perturbed, strict=True)]
            norm = torch.sqrt(sum(((d**2).sum() for d in direction), torch.zeros(())))
            for w, d in zip(params, direction, strict=True):
                w += rho_k * (w * d if adaptive else d) / norm if norm > 0 else 0
        sharp = torch.autograd.grad((a * c_k * losses()).mean(), params)
        with torch.no_grad():
            gradient = [so_far + g for so_far, g in zip(gradient, sharp, strict=True)]
            for w, w_before in zip(params, before, strict=True):
                w.copy_(w_before)
    if alpha:
        at_w, g = (torch.cat([part.flatten() for part in parts]) for parts in (directions[0], gradient))
        across = torch.split(at_w - (at_w @ g) / (g @ g) * g, [w.numel() for w in params])
        gradient = [g - alpha * part.view_as(g) for g, part in zip(gradient, across, strict=True)]
    for w, g in zip(params, gradient, strict=True):
        w.grad = g
    return (a * loss).mean().detach()
