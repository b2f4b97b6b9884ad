"""How many training samples each class of a long-tailed set has, and which ones they are."""

import warnings
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from imbsam.errors import SettingError

Profile = Literal["exponential", "step", "none"]


def check_imbalance(ratio: float, profile: str) -> None:
    """Refuse an imbalance ratio or a profile that no data set can have.

    Args:
        ratio: Imbalance ratio, largest class / smallest class.
        profile: Name of the profile of the class counts.

    Raises:
        SettingError: The ratio is below 1 or not a number, or the profile is unknown.
    """
    if profile not in get_args(Profile):
        raise SettingError(f"profile={profile!r} is unknown: choose one of {', '.join(get_args(Profile))}.")
    if 0 < ratio < 1:
        raise SettingError(
            f"ratio={ratio} is smallest / largest class: pass its inverse, ratio={1 / ratio:g} (largest / smallest)."
        )
    if not ratio >= 1:
        raise SettingError(f"ratio={ratio} is no imbalance ratio: pass largest / smallest class, at least 1.")


def imbalanced_class_counts(largest: int, num_classes: int, ratio: float, profile: Profile) -> list[int]:
    """Class counts that fall from ``largest`` to ``largest / ratio``, the most frequent class first.

    Args:
        largest: Samples of the most frequent class, at least 1.
        num_classes: Number of classes C, at least 1.
        ratio: Imbalance ratio, largest class / smallest class, at least 1.
        profile: ``exponential``: class c has ``largest * (1 / ratio) ** (c / (C - 1))`` samples, rounded
            down; ``step``: the first half of the classes (the larger half where C is odd) keeps ``largest``,
            the others have ``largest / ratio``, rounded down; ``none``: every class has ``largest``.

    Returns:
        The C class counts, each at least 1.

    Raises:
        SettingError: A ratio below 1, an unknown profile, or a ratio that leaves a class without a sample.

    Example:
        >>> imbalanced_class_counts(500, 5, 100, "exponential")
        [500, 158, 50, 15, 5]
        >>> imbalanced_class_counts(500, 5, 100, "step")
        [500, 500, 500, 5, 5]
    """
    check_imbalance(ratio, profile)
    if largest < 1 or num_classes < 1:
        raise SettingError(
            f"largest={largest}, num_classes={num_classes}: a long tail needs at least one class, "
            "and at least one training sample in every class."
        )
    if profile == "none":
        return [largest] * num_classes
    if profile == "step":
        exponents = [float(c >= (num_classes + 1) // 2) for c in range(num_classes)]
    else:
        exponents = [c / max(num_classes - 1, 1) for c in range(num_classes)]
    # Divided, not multiplied by 1 / ratio: 49 * (1 / 49) is below 1 in floating point.
    counts = [int(largest / ratio**exponent) for exponent in exponents]
    if counts[-1] < 1:
        raise SettingError(
            f"ratio={ratio:g} leaves the rarest class without a sample: the largest class has {largest}, "
            f"so pass a ratio of at most {largest}."
        )
    return counts


def subsample(labels: Tensor, class_counts: Tensor, generator: torch.Generator) -> Tensor:
    """Draw ``class_counts[c]`` samples of every class c without replacement.

    For one state of the generator a smaller count draws a subset of what a larger count draws, so that the
    sets of two imbalance ratios are nested.

    Args:
        labels: Class indices of all samples, int64 (N,), each in [0, C).
        class_counts: Samples to draw per class, int64 (C,); a class with fewer samples gives all of them.
        generator: Source of the draw, on the CPU.

    Returns:
        The drawn indices in ascending order, int64 (M,).
    """
    return (_random_ranks(labels, generator) < class_counts[labels]).nonzero().flatten()


def validation_mask(labels: Tensor, class_names: Sequence[str], val_share: float, generator: torch.Generator) -> Tensor:
    """Draw the share of every class that is held out for validation.

    A class with at least two samples has at least one on either side. A class with a single sample keeps it
    for training, and a warning names the class.

    Args:
        labels: Class indices of all samples, int64 (N,), each in [0, C).
        class_names: The C names of the classes.
        val_share: Share of the samples to hold out, in [0, 1); 0 holds out nothing.
        generator: Source of the draw, on the CPU.

    Returns:
        True for the samples held out, bool (N,).

    Raises:
        SettingError: ``val_share`` is outside [0, 1).
    """
    check_val_share(val_share)
    if val_share == 0:
        return torch.zeros_like(labels, dtype=torch.bool)
    counts = torch.bincount(labels, minlength=len(class_names))
    held_out = (counts.double() * val_share).round().long().clamp(min=1).minimum((counts - 1).clamp(min=0))
    if single := [name for name, count in zip(class_names, counts.tolist(), strict=True) if count == 1]:
        warnings.warn(
            f"val_share={val_share}: no validation sample for the classes with a single training sample: "
            f"{', '.join(single)}.",
            stacklevel=2,
        )
    return _random_ranks(labels, generator) < held_out[labels]


def check_val_share(val_share: float) -> None:
    """Refuse a share of the training samples that cannot be held out.

    Args:
        val_share: Share of the samples to hold out for validation.

    Raises:
        SettingError: ``val_share`` is outside [0, 1).
    """
    if not 0 <= val_share < 1:
        raise SettingError(
            f"val_share={val_share} is outside [0, 1): pass the share of the training samples to hold out."
        )


def shuffled_by_class(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Order the samples by class, those of a class at random.

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
    by_class, first = shuffled_by_class(labels, generator)
    ranks = torch.empty_like(labels)
    ranks[by_class] = torch.arange(len(labels)) - first[labels[by_class]]
    return ranks
