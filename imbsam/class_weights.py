"""Loss weights of the classes from their counts: re-weighting that goes with any loss."""

from collections.abc import Sequence

from torch import Tensor

from imbsam.class_groups import class_counts_tensor
from imbsam.errors import SettingError

__all__ = ["effective_number_weights"]


def check_beta(name: str, beta: float) -> None:
    """Refuse a beta outside [0, 1), by the name of the setting."""
    if not 0 <= beta < 1:
        raise SettingError(f"{name}={beta} is outside [0, 1); 0.9999 is usual, 0 weighs every class alike")


def effective_number_weights(class_counts: Tensor | Sequence[int], beta: float = 0.9999) -> Tensor:
    r"""Class-balanced loss weights by the effective number of samples.

    .. math::
        a_j = \frac{N}{\sum_k n_k / E_k} \cdot \frac{1}{E_j}, \qquad E_j = \frac{1 - \beta^{n_j}}{1 - \beta}, \qquad
        N = \sum_k n_k

    scaled so that :math:`\sum_j n_j a_j = N`: the mean weight of the training samples is 1, and re-weighting changes
    what counts in the loss but not its size. Over the whole training set this is the weighted mean of
    ``torch.nn.CrossEntropyLoss(weight=...)``, which the LDAM-DRW code takes of every batch, dividing by the batch's own
    sum of weights. The paper scales to :math:`\sum_j a_j = C` and takes the plain mean: its weights are these times
    :math:`C / \sum_j a_j`, one constant (0.2 for CIFAR-100-LT at ratio 100 and beta 0.9999).

    Multiply the per-sample losses by ``weights[labels]``, or give the weights to the engine as ``class_weight``.
    A class without training samples counts as if it had one.

    Args:
        class_counts: training samples per class :math:`n_j`, C integers, at least one above 0.
        beta: :math:`\beta` in [0, 1): 0 weighs every class alike, towards 1 the weights go to :math:`N / (C n_j)`.

    Returns:
        float64 tensor of shape (C,) on the CPU, above 0.

    Raises:
        SettingError: if ``beta`` is outside [0, 1) or every class count is 0.

    Source:
        Cui et al., *Class-Balanced Loss Based on Effective Number of Samples*, CVPR 2019, arXiv 1901.05555,
        proposition 1 and section 4.

    Example:
        >>> effective_number_weights([500, 50, 5], beta=0.99)
        tensor([ 0.7633,  1.9197, 15.4721], dtype=torch.float64)
    """
    counts = class_counts_tensor(class_counts)
    if not bool(counts.any()):
        raise SettingError(
            f"class_counts={counts.tolist()[:8]} has no training sample; "
            "give the number of training samples of each class, at least one above 0"
        )
    check_beta("beta", beta)
    n = counts.double()
    inverse = (1 - beta) / (1 - beta ** n.clamp(min=1))
    return inverse * n.sum() / (n * inverse).sum()
