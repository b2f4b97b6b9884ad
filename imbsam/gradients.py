"""Lists of gradients, one for each trainable parameter."""

import torch
from torch import Tensor

Gradients = list[Tensor | None]
"""One gradient for each trainable parameter; None where no pass reached it."""


@torch.no_grad()
def add_(grads: Gradients, others: Gradients, *, alpha: int = 1) -> None:
    """Add alpha * others to `grads` in place; None counts as 0, and a tensor of `others` may then be taken over."""
    both = [(g, other) for g, other in zip(grads, others, strict=True) if g is not None and other is not None]
    if both:
        into, increments = zip(*both, strict=True)
        torch._foreach_add_(into, increments, alpha=alpha)
    for i, other in enumerate(others):
        if grads[i] is None and other is not None:
            grads[i] = other if alpha == 1 else alpha * other
