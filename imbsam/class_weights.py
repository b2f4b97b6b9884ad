"""Loss weights of the classes from their counts: re-weighting that works with any loss."""

from collections.abc import Sequence

import torch
from torch import Tensor

from imbsam.checks import check_interval, check_numbers
from imbsam.class_groups import nonzero_class_counts, tail_mask
from imbsam.errors import SettingError

__all__ = ["effective_number_weights", "with_tail_weight"]


def effective_number_weights(class_counts: Tensor | Sequence[int], beta: float = 0.9999) -> Tensor:
    r"""Class-balanced loss weights by the effective number of samples.

    .. math::
        a_j = \frac{N}{\sum_k n_k / E_k} \cdot \frac{1}{E_j}, \qquad E_j = \frac{1 - \beta^{n_j}}{1 - \beta}, \qquad
        N = \sum_k n_k

    scaled so that :math:`\sum_j n_j a_j = N`: the mean weight of the training samples is 1, and re-weighting changes
    which samples count but not the size of the loss. Over the whole training set this is the weighted mean of
    ``torch.nn.CrossEntropyLoss(weight=...)``, which the LDAM-DRW code takes of every batch, dividing by the batch's own
    sum of weights. The paper scales to :math:`\sum_j a_j = C` and takes the plain mean: its weights are these times
    :math:`C / \sum_j a_j`, a constant (0.2 for CIFAR-100-LT at ratio 100 and beta 0.9999).

    Multiply the per-sample losses by ``weights[labels]``, or give the weights to the engine as ``class_weight``.
    A class without training samples counts as if it had one.

    Args:
        class_counts: training samples per class :math:`n_j`, C integers, at least one above 0.
        beta: :math:`\beta` in [0, 1): 0 weights every class equally; as it goes to 1, the weights go to
            :math:`N / (C n_j)`.

    Returns:
        float64 tensor of shape (C,) on the CPU, all positive.

    Raises:
        SettingError: if ``beta`` is outside [0, 1) or every class count is 0.

    Source:
        Cui et al., *Class-Balanced Loss Based on Effective Number of Samples*, CVPR 2019, arXiv 1901.05555,
        proposition 1 and section 4.

    Example:
        >>> effective_number_weights([500, 50, 5], beta=0.99)
        tensor([ 0.7633,  1.9197, 15.4721], dtype=torch.float64)
    """
    check_interval("[0, 1)", beta=beta)
    n = nonzero_class_counts(class_counts).double()
    inverse = (1 - beta) / (1 - beta ** n.clamp(min=1))
    return inverse * n.sum() / (n * inverse).sum()


def with_tail_weight(
    class_weight: Tensor | None,
    tail_weight: float,
    class_counts: Tensor | None,
    eta: float,
    tail_classes: Tensor | Sequence[int] | None,
) -> Tensor:
    """Multiply the loss weights of the tail classes.

    Args:
        class_weight: loss weight of each class, float64 (C,); None for 1.
        tail_weight: the factor, a finite number from 0.
        class_counts: training samples per class (C,), or (C, 2) for multi-label targets.
        eta: classes with fewer than eta training samples are tail classes.
        tail_classes: the tail classes, instead of eta, as for :func:`~imbsam.class_groups.tail_mask`.

    Returns:
        float64 tensor on the CPU, of the shape of the class counts.

    Raises:
        SettingError: if ``tail_weight`` is out of its range, or ``class_counts`` is None.
    """
    check_numbers(tail_weight=tail_weight, hint="1 leaves the loss as it is")
    if class_counts is None:
        raise SettingError(
            f"tail_weight is {tail_weight} but class_counts is None: give the training samples per class"
        )
    tail = tail_mask(class_counts, eta, tail_classes)
    weight = torch.ones(len(tail), dtype=torch.float64, device="cpu") if class_weight is None else class_weight
    if tail.dim() == 2 and weight.dim() == 1:
        weight = weight[:, None]  # for either value of a class's label
    return torch.where(tail, tail_weight * weight, weight)
