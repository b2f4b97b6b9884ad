"""The accuracy to expect on test sets of other class distributions, computed from the recalls of the classes."""

import torch
from torch import Tensor

from imbsam.class_groups import class_counts_tensor
from imbsam.errors import SettingError
from imbsam.group_names import TEST_DISTRIBUTIONS

__all__ = ["expected_accuracy", "long_tailed_shares", "shifted_accuracies"]


def long_tailed_shares(class_counts: Tensor | list[int], ratio: float, backward: bool = False) -> Tensor:
    r"""Each class's share of a long-tailed test set.

    The class of rank r in the order of the training samples, from 0 for the most frequent, has a share proportional to
    :math:`\rho^{-r / (C - 1)}` with :math:`\rho` the ratio: *forward*, as in training. *Backward* reverses the order.
    Classes with equally many training samples share the mean of their ranks' shares, whatever their order.

    Args:
        class_counts: training samples per class, C integers.
        ratio: largest share / smallest share, at least 1.
        backward: whether the rarest class of the training has the largest share.

    Returns:
        float64 tensor of shape (C,) on the CPU, sums to 1.

    Raises:
        SettingError: the ratio is below 1, or not finite.

    Source:
        Zhang et al., *Self-Supervised Aggregation of Diverse Experts for Test-Agnostic Long-Tailed Recognition* (SADE),
        NeurIPS 2022, arXiv 2107.09249; they draw such test sets, at ratios of 2 to 50.

    Example:
        >>> long_tailed_shares([500, 50, 5], ratio=4)
        tensor([0.5714, 0.2857, 0.1429], dtype=torch.float64)
        >>> long_tailed_shares([500, 50, 50], ratio=4, backward=True)
        tensor([0.1429, 0.4286, 0.4286], dtype=torch.float64)
    """
    if not 1 <= ratio < float("inf"):
        raise SettingError(f"ratio is {ratio}: give largest / smallest share, a finite number from 1")
    counts = class_counts_tensor(class_counts)
    classes = counts.numel()
    by_rank = float(ratio) ** -(torch.arange(classes, dtype=torch.float64) / max(classes - 1, 1))
    order = counts.argsort(descending=not backward, stable=True)
    _, place, sizes = torch.unique(counts[order], return_inverse=True, return_counts=True)
    means = torch.zeros(len(sizes), dtype=torch.float64).index_add(0, place, by_rank) / sizes
    shares = torch.empty(classes, dtype=torch.float64)
    shares[order] = means[place]
    return shares / shares.sum()


def expected_accuracy(recalls: Tensor, shares: Tensor) -> Tensor:
    r"""The accuracy on a test set of these shares of the classes: :math:`\sum_c s_c R_c`.

    It is exact: the expectation over test sets drawn with these shares from the samples of each class. Drawing one
    would leave out samples and add noise.

    Args:
        recalls: recall of each class (C,), in [0, 1], nan for a class without test samples.
        shares: share of each class (C,), at least 0; those of classes without a recall are dealt to the others in
            proportion.

    Returns:
        float64 tensor of shape () in [0, 1], nan without any recall.
    """
    known = ~recalls.isnan()
    shares = shares.where(known, 0)
    return (shares * recalls.double().nan_to_num(0)).sum() / shares.sum()


def shifted_accuracies(class_counts: Tensor | list[int], recalls: Tensor) -> dict[str, Tensor]:
    """The accuracies on SADE's test sets: ``forward_50`` to ``forward_2``, ``backward_2`` to ``backward_50``.

    Args:
        class_counts: training samples per class, C integers.
        recalls: recall of each class (C,), nan for a class without test samples.

    Returns:
        float64 tensors of shape () in [0, 1].
    """
    accuracies = {}
    for name in TEST_DISTRIBUTIONS:
        direction, ratio = name.split("_")
        shares = long_tailed_shares(class_counts, float(ratio), backward=direction == "backward")
        accuracies[name] = expected_accuracy(recalls.cpu(), shares)
    return accuracies
