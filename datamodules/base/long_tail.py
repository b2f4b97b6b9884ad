"""How many training samples each class of a long-tailed set has."""

from typing import Literal

from imbsam.checks import check_choice, check_whole_numbers
from imbsam.errors import SettingError

Profile = Literal["exponential", "step", "none"]


def check_imbalance(ratio: float, profile: str) -> None:
    """Refuse an imbalance ratio below 1 and an unknown profile, with a :class:`SettingError`."""
    check_choice(Profile, profile=profile)
    if 0 < ratio < 1:
        raise SettingError(
            f"ratio is {ratio}, smallest / largest class: give its inverse, {1 / ratio:g} (largest / smallest)"
        )
    if not ratio >= 1:
        raise SettingError(f"ratio is {ratio}: give largest / smallest class, a number from 1")


def imbalanced_class_counts(largest: int, num_classes: int, ratio: float, profile: Profile) -> list[int]:
    """Class counts that fall from ``largest`` to ``largest / ratio``, the most frequent class first.

    Args:
        largest: Samples of the most frequent class, at least 1.
        num_classes: Number of classes C, at least 1.
        ratio: Imbalance ratio, largest class / smallest class, at least 1.
        profile: ``exponential``: class c has ``largest * (1 / ratio) ** (c / (C - 1))`` samples, rounded down;
            ``step``: the first half of the classes (the larger half if C is odd) has ``largest``, the others
            ``largest / ratio``, rounded down; ``none``: every class has ``largest``.

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
    check_whole_numbers(largest=largest, num_classes=num_classes)
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
            f"ratio is {ratio:g}, which leaves the rarest class empty: give at most {largest}, the largest class's size"
        )
    return counts
