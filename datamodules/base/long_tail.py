"""How many training samples each class of a long-tailed set has."""

from typing import Literal, get_args

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
