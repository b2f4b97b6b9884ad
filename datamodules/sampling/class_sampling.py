"""How often each class is drawn in an epoch: instance-balanced, class-balanced, square-root, progressively balanced."""

from typing import Literal

import torch
from torch import Tensor

from datamodules.sampling.stratified import shuffled_by_class
from imbsam.checks import check_choice
from imbsam.errors import SettingError

Sampling = Literal["instance_balanced", "class_balanced", "square_root", "progressively_balanced"]


def class_probabilities(class_counts: Tensor, sampling: Sampling, progress: float = 0.0) -> Tensor:
    r"""The probability that a drawn training sample is of each class.

    .. math::
        p_j = \frac{n_j^q}{\sum_k n_k^q}, \qquad
        p_j^{PB}(t) = \left(1 - \frac tT\right) p_j^{IB} + \frac tT\, p_j^{CB}

    with q = 1 for instance-balanced (IB), 0 for class-balanced (CB), 1/2 for square-root sampling, and progressively
    balanced (PB) at epoch t of T. A class without samples has probability 0.

    Args:
        class_counts: Training samples per class n, integers (C,), at least one above 0.
        sampling: The name.
        progress: t / T in [0, 1], for progressively balanced sampling.

    Returns:
        Probabilities, float64 (C,), with sum 1.

    Source:
        Kang et al., *Decoupling Representation and Classifier for Long-Tailed Recognition*, ICLR 2020,
        arXiv 1910.09217, equations 1 and 2.

    Example:
        >>> class_probabilities(torch.tensor([80, 20]), "progressively_balanced", progress=0.5)
        tensor([0.6500, 0.3500], dtype=torch.float64)
    """
    check_choice(Sampling, sampling=sampling)
    counts = class_counts.double()
    if sampling == "progressively_balanced":
        instance, balanced = (class_probabilities(class_counts, s) for s in ("instance_balanced", "class_balanced"))
        return (1 - progress) * instance + progress * balanced
    power = {"instance_balanced": 1.0, "class_balanced": 0.0, "square_root": 0.5}[sampling]
    weights = counts.pow(power) * (counts > 0)
    return weights / weights.sum()


class ClassSampling:
    """The order of an epoch that draws each class as often as the sampling says.

    An epoch has as many draws as there are samples. Class j has p_j times that many, rounded up or down at random so
    that the mean is exact. Its samples take turns: none comes a third time before all have come twice.

    Args:
        labels: Classes of the training samples, int64 (N,).
        sampling: The name, see :func:`class_probabilities`.
        epochs: Number of epochs T of the run, for progressively balanced sampling.

    Raises:
        SettingError: An unknown name, or progressively balanced sampling without a number of epochs.
    """

    def __init__(self, labels: Tensor, sampling: Sampling, epochs: int | None = None) -> None:
        check_choice(Sampling, sampling=sampling)
        if sampling == "progressively_balanced" and (epochs is None or epochs < 1):
            raise SettingError(
                f"sampling is progressively_balanced and the number of epochs is {epochs}: set trainer.max_epochs"
            )
        self.labels = labels
        self.sampling: Sampling = sampling
        self.epochs = epochs or 1
        self._class_counts = torch.bincount(labels)

    def __call__(self, epoch: int, generator: torch.Generator) -> Tensor:
        """Draw the order of an epoch, counted from 0, from a CPU generator.

        Returns:
            ``index + N * repeat`` of each draw, int64 (N,), where ``repeat`` counts the earlier draws of that sample.
        """
        size, counts = len(self.labels), self._class_counts
        progress = min(epoch / self.epochs, 1.0)
        ends = size * class_probabilities(counts, self.sampling, progress).cumsum(0)
        # systematic rounding: one random shift for all boundaries keeps every number of draws within 1 of its mean
        shift = torch.rand(1, dtype=torch.float64, generator=generator)
        boundaries = (ends.round(decimals=6) + shift).floor().long()
        draws = boundaries.diff(prepend=torch.zeros(1, dtype=torch.int64))

        by_class, first = shuffled_by_class(self.labels, generator)
        classes = torch.repeat_interleave(torch.arange(len(counts)), draws)
        turn = torch.arange(len(classes)) - (draws.cumsum(0) - draws)[classes]
        order = by_class[first[classes] + turn % counts[classes]] + size * (turn // counts[classes])
        return order[torch.randperm(len(order), generator=generator)]
