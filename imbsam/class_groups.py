"""From class counts to tail mask, many / medium / few groups and sharpness vectors.

*Class counts* are the training samples of each class, after any validation split. Everything here is computed
once, on the CPU, from the counts alone.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from imbsam.errors import SettingError

__all__ = ["class_counts_tensor", "class_groups", "focal_sharpness", "tail_mask"]


def class_counts_tensor(class_counts: Tensor | Sequence[int]) -> Tensor:
    """Validate class counts and return them as a tensor.

    Args:
        class_counts: training samples per class: a tensor, array or sequence of C integers, each >= 0.

    Returns:
        int64 tensor of shape (C,) on the CPU, never sharing memory with the argument.

    Raises:
        SettingError: if the counts are not one-dimensional, are empty, are not integers or hold a negative.

    Example:
        >>> class_counts_tensor([500, 40, 5])
        tensor([500,  40,   5])
    """
    try:
        counts = torch.as_tensor(class_counts, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise SettingError(
            f"class_counts={_short(class_counts)} is not a list of numbers; "
            "give one integer per class, the number of its training samples"
        ) from error
    if counts.ndim != 1:
        raise SettingError(
            f"class_counts has shape {tuple(counts.shape)}; give one integer per class, shape (num_classes,)"
        )
    if counts.numel() == 0:
        raise SettingError("class_counts=[] is empty; give one integer per class, at least one")
    if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
        raise SettingError(
            f"class_counts={_short(class_counts)} is of type {counts.dtype}; "
            "give integers, the number of training samples of each class"
        )
    counts = counts.detach().to(dtype=torch.int64, copy=True)
    if bool((counts < 0).any()):
        index = int((counts < 0).nonzero()[0])
        raise SettingError(
            f"class_counts={_short(class_counts)} is negative ({int(counts[index])}) for class {index}; "
            "give the number of training samples of each class, 0 or more"
        )
    return counts


def tail_mask(
    class_counts: Tensor | Sequence[int],
    eta: float = 20,
    tail_classes: Tensor | Sequence[int] | None = None,
) -> Tensor:
    r"""Mark the tail classes: those with fewer than ``eta`` training samples, or exactly the named ones.

    Args:
        class_counts: training samples per class, C integers.
        eta: the threshold :math:`\eta` >= 0; a class with exactly ``eta`` samples is a head class. ``inf``
            makes every class tail (SAM), 0 none (SGD). Not used when ``tail_classes`` is given.
        tail_classes: indices of the tail classes, each in 0..C-1, or a bool tensor or array of shape (C,); ``[]`` means
            that there is none.

    Returns:
        bool tensor of shape (C,) on the CPU, True for a tail class.

    Raises:
        SettingError: if ``eta`` is nan or negative, a tail class is not an integer in 0..C-1, or a mask is not of
            shape (C,).

    Source:
        Zhou et al., *ImbSAM: A Closer Look at Sharpness-Aware Minimization in Class-Imbalanced Recognition*,
        ICCV 2023, arXiv 2308.07815.

    Example:
        >>> tail_mask([500, 40, 5], eta=20)
        tensor([False, False,  True])
        >>> tail_mask([500, 40, 5], tail_classes=[1, 2])
        tensor([False,  True,  True])
    """
    counts = class_counts_tensor(class_counts)
    if tail_classes is None:
        return counts < _non_negative("eta", eta)
    _non_negative("eta", eta)
    mask = torch.zeros(counts.numel(), dtype=torch.bool, device="cpu")
    if hasattr(tail_classes, "dtype"):  # a tensor or array
        named = torch.as_tensor(tail_classes, device="cpu").detach()
        if named.dtype == torch.bool:
            if named.shape != mask.shape:
                raise SettingError(
                    f"tail_classes is a mask of shape {tuple(named.shape)}; give one entry per class, shape "
                    f"({counts.numel()},), or class indices"
                )
            return named.clone()
        tail_classes = named.tolist()
    if not isinstance(tail_classes, Iterable):
        raise SettingError(f"tail_classes={tail_classes!r} is not a list; give class indices, as in [{tail_classes!r}]")
    for index in tail_classes:
        try:
            a_boolean = isinstance(index, (bool, np.bool_)) or getattr(index, "dtype", None) == torch.bool
            in_range = 0 <= index < counts.numel() and int(index) == index and not a_boolean
        except (TypeError, ValueError, RuntimeError):
            in_range = False
        if not in_range:
            raise SettingError(
                f"tail_classes holds {index!r}, which is no class; give class indices in 0..{counts.numel() - 1}"
            )
        mask[int(index)] = True
    return mask


def class_groups(class_counts: Tensor | Sequence[int], many: int = 100, few: int = 20) -> dict[str, Tensor]:
    """Split the classes by their training samples into many, medium and few.

    Args:
        class_counts: training samples per class, C integers.
        many: a class with more than this many samples is in "many".
        few: a class with fewer than this many samples is in "few"; 0 <= ``few`` <= ``many`` + 1. The rest,
            ``few`` to ``many`` inclusive, is "medium".

    Returns:
        bool tensors of shape (C,) on the CPU under the keys "many", "medium", "few" in this order. Every class
        is in exactly one; a group may be empty.

    Raises:
        SettingError: if a threshold is nan or negative, or ``few`` is above ``many`` + 1, where groups would
            overlap.

    Source:
        The split at 100 and 20 is that of Liu et al., *Large-Scale Long-Tailed Recognition in an Open World*,
        CVPR 2019, arXiv 1904.05160.

    Example:
        >>> class_groups([500, 100, 20, 5])["medium"]
        tensor([False,  True,  True, False])
    """
    counts = class_counts_tensor(class_counts)
    _non_negative("many", many)
    _non_negative("few", few)
    if few > many + 1:
        raise SettingError(f"few={few} is above many={many}, so that classes would be in both groups; give few <= many")
    is_many, is_few = counts > many, counts < few
    return {"many": is_many, "medium": ~(is_many | is_few), "few": is_few}


def focal_sharpness(
    class_counts: Tensor | Sequence[int],
    focal_lambda: float,
    focal_gamma: float,
) -> Tensor:
    r"""Sharpness weight of each class under Focal-SAM: :math:`c_j = \lambda (1 - n_j / n)^\gamma`.

    :math:`n_j` is the number of training samples of class j and :math:`n` that of all classes, so that rare
    classes are weighted near :math:`\lambda` and frequent ones less. With :math:`\gamma = 0` every class is
    weighted :math:`\lambda`.

    Args:
        class_counts: training samples per class, C integers, at least one of them above 0.
        focal_lambda: :math:`\lambda` >= 0, finite; its authors use up to 1.1.
        focal_gamma: :math:`\gamma` >= 0, finite.

    Returns:
        float64 tensor of shape (C,) on the CPU, values in [0, ``focal_lambda``].

    Raises:
        SettingError: if a setting is nan, infinite or negative, or every class count is 0.

    Source:
        Li et al., *Focal-SAM: Focal Sharpness-Aware Minimization for Long-Tailed Classification*, ICML 2025,
        arXiv 2505.01660.

    Example:
        >>> focal_sharpness([80, 15, 5], focal_lambda=1.0, focal_gamma=2.0)
        tensor([0.0400, 0.7225, 0.9025], dtype=torch.float64)
    """
    counts = class_counts_tensor(class_counts)
    for name, value in (("focal_lambda", focal_lambda), ("focal_gamma", focal_gamma)):
        if math.isinf(_non_negative(name, value)):
            raise SettingError(f"{name}={value} is infinite; give a finite number, 0 or more")
    total = counts.sum()
    if total == 0:
        raise SettingError(
            f"class_counts={_short(class_counts)} has no training sample; "
            "give the number of training samples of each class, at least one above 0"
        )
    share = counts.to(torch.float64) / total
    return float(focal_lambda) * (1.0 - share) ** float(focal_gamma)


def _non_negative(name: str, value: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise SettingError(f"{name}={value!r} is not a number; give a number, 0 or more") from error
    if math.isnan(number) or number < 0:
        raise SettingError(f"{name}={value} is nan or negative; give a number, 0 or more")
    return number


def _short(value: object, limit: int = 60) -> str:
    """One line for a message: the value's repr, cut where a long list would fill the screen."""
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
