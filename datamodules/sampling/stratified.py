"""Draws class by class: a number of samples of each class, or a share of each to hold out."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from imbsam.checks import check_interval
from imbsam.messages import first_few


def subsample(labels: Tensor, class_counts: Tensor, generator: torch.Generator) -> Tensor:
    """Draw ``class_counts[c]`` samples of every class c without replacement.

    From the same generator state a smaller count draws a subset of what a larger one draws, so the sets of two
    imbalance ratios are nested.

    Args:
        labels: Class indices of all samples, int64 (N,), each in [0, C).
        class_counts: Samples to draw per class, int64 (C,); a class with fewer samples gives all of them.
        generator: Source of the draw, on the CPU.

    Returns:
        The drawn indices in ascending order, int64 (M,).
    """
    return (_random_ranks(labels, generator) < class_counts[labels]).nonzero().flatten()


def first_samples(labels: Tensor, class_counts: Tensor) -> Tensor:
    """Take the first ``class_counts[c]`` samples of every class c, in the order of the data set.

    Args:
        labels: Class indices of all samples, int64 (N,), each in [0, C).
        class_counts: Samples to take per class, int64 (C,); a class with fewer samples gives all of them.

    Returns:
        Their indices in ascending order, int64 (M,).
    """
    return (_ranks(labels, labels.argsort(stable=True)) < class_counts[labels]).nonzero().flatten()


def held_out_mask(labels: Tensor, class_names: Sequence[str], generator: torch.Generator, **share: float) -> Tensor:
    """Draw the share of every class to hold out: rounded, but at least one sample on either side.

    A class with a single sample keeps it for training, and a warning names the class.

    Args:
        labels: Class indices of all samples, int64 (N,), each in [0, C).
        class_names: The C names of the classes.
        generator: Source of the draw, on the CPU.
        share: The share by the name of its setting, such as ``val_share=0.1``, in [0, 1); 0 holds out nothing.

    Returns:
        True for the samples held out, bool (N,).

    Raises:
        SettingError: The share is out of range.
    """
    check_interval("[0, 1)", **share)
    ((setting, value),) = share.items()
    if value == 0:
        return torch.zeros_like(labels, dtype=torch.bool)
    counts = torch.bincount(labels, minlength=len(class_names))
    if single := [name for name, count in zip(class_names, counts.tolist(), strict=True) if count == 1]:
        warnings.warn(
            f"{setting} is {value}: nothing is held out of classes with a single sample: {first_few(single)}.",
            stacklevel=2,
        )
    held_out = (counts.double() * value).round().long().clamp(min=1).minimum((counts - 1).clamp(min=0))
    return _random_ranks(labels, generator) < held_out[labels]


def shuffled_by_class(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sort the samples by class, in random order within a class.

    Args:
        labels: Class indices of all samples, int64 (N,), each in [0, C).
        generator: Source of the order, on the CPU.

    Returns:
        The indices, int64 (N,), and where each class begins among them, int64 (C,).
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    counts = torch.bincount(labels)
    return shuffled[labels[shuffled].argsort(stable=True)], counts.cumsum(0) - counts


def _random_ranks(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Number the samples of every class from 0 in random order, int64 (N,)."""
    return _ranks(labels, shuffled_by_class(labels, generator)[0])


def _ranks(labels: Tensor, by_class: Tensor) -> Tensor:
    """Number the samples of every class from 0, in the order of indices that are sorted by class, int64 (N,)."""
    counts = torch.bincount(labels)
    first = counts.cumsum(0) - counts
    ranks = torch.empty_like(labels)
    ranks[by_class] = torch.arange(len(labels)) - first[labels[by_class]]
    return ranks
