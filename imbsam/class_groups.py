"""Tail mask, many / medium / few groups and sharpness weights from the class counts.

*Class counts* are the training samples of each class, after any validation split. Everything is computed on the CPU.
"""

from collections.abc import Iterable, Sequence
from numbers import Integral

import torch
from torch import Tensor

from imbsam.checks import check_numbers
from imbsam.errors import SettingError
from imbsam.group_names import GROUPS

__all__ = [
    "GroupedClasses",
    "class_counts_tensor",
    "class_groups",
    "focal_sharpness",
    "nonzero_class_counts",
    "tail_mask",
]


def class_counts_tensor(class_counts: Tensor | Sequence[int], by_label: bool = False) -> Tensor:
    """Validate class counts and return them as a tensor.

    Args:
        class_counts: training samples per class: a tensor, array or sequence of C integers, each >= 0.
        by_label: whether (C, 2) is allowed too, for multi-label targets: of every class the training samples without
            it, and those with it.

    Returns:
        int64 tensor of shape (C,) or (C, 2) on the CPU, never sharing memory with the argument.

    Raises:
        SettingError: if the counts are of another shape, are empty, are not integers or hold a negative.

    Example:
        >>> class_counts_tensor([500, 40, 5])
        tensor([500,  40,   5])
    """
    try:
        counts = torch.as_tensor(class_counts, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise SettingError(f"class_counts is {_short(class_counts)}: give one integer per class") from error
    pairs = by_label and counts.ndim == 2 and counts.shape[1] == 2
    if not (counts.ndim == 1 or pairs) or counts.numel() == 0:
        raise SettingError(f"class_counts has shape {tuple(counts.shape)}: give one integer per class")
    if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
        raise SettingError(f"class_counts is {_short(class_counts)}, of type {counts.dtype}: give integers")
    counts = counts.detach().to(dtype=torch.int64, copy=True)
    if bool((counts < 0).any()):
        index = (counts < 0).nonzero()[0].tolist()
        raise SettingError(f"class_counts is {int(counts[tuple(index)])} for class {index[0]}: give integers from 0")
    return counts


def nonzero_class_counts(class_counts: Tensor | Sequence[int], by_label: bool = False) -> Tensor:
    """Validate class counts for a class prior: at least one must be above 0.

    Args:
        class_counts: as for :func:`class_counts_tensor`.
        by_label: as there.

    Returns:
        int64 tensor of shape (C,) or (C, 2) on the CPU.

    Raises:
        SettingError: as for :func:`class_counts_tensor`, or if every count is 0.
    """
    counts = class_counts_tensor(class_counts, by_label)
    if not bool(counts.any()):
        raise SettingError(
            f"class_counts is {_short(counts.tolist())}, no training sample: give at least one count above 0"
        )
    return counts


def tail_mask(
    class_counts: Tensor | Sequence[int],
    eta: float = 20,
    tail_classes: Tensor | Sequence[int] | None = None,
) -> Tensor:
    r"""Mark the tail classes: those with fewer than ``eta`` training samples, or exactly the named ones.

    Of multi-label class counts (C, 2) each is compared with ``eta``: a class that few samples have is tail where a
    sample has it (column 1), and one that few lack is tail where a sample lacks it (column 0).

    Args:
        class_counts: training samples per class, C integers, or (C, 2) as for :func:`class_counts_tensor`.
        eta: the threshold :math:`\eta` >= 0; a class with exactly ``eta`` samples is a head class. ``inf``
            makes every class tail (SAM), 0 none (SGD). Not used when ``tail_classes`` is given.
        tail_classes: indices of the tail classes, each in 0..C-1, or a bool tensor or array of shape (C,); ``[]`` means
            that no class is tail. With counts (C, 2) they are tail where a sample has them.

    Returns:
        bool tensor on the CPU, of the shape of the class counts, True for tail.

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
    counts = class_counts_tensor(class_counts, by_label=True)
    check_numbers(eta=eta, finite=False, hint="20 is the paper's")
    if tail_classes is None:
        return counts < eta
    named = _named_classes(tail_classes, len(counts))
    return named if counts.dim() == 1 else torch.stack([torch.zeros_like(named), named], dim=1)


def _named_classes(tail_classes: Tensor | Sequence[int], classes: int) -> Tensor:
    """The mask of some classes, bool (C,), from their indices or a mask."""
    mask = torch.zeros(classes, dtype=torch.bool, device="cpu")
    if hasattr(tail_classes, "dtype"):  # a tensor or array
        named = torch.as_tensor(tail_classes, device="cpu").detach()
        if named.dtype == torch.bool:
            if named.shape != mask.shape:
                raise SettingError(
                    f"tail_classes is a mask of shape {tuple(named.shape)}: give one entry per class, shape "
                    f"({classes},), or class indices"
                )
            return named.clone()
        tail_classes = named.tolist()
    if not isinstance(tail_classes, Iterable):
        raise SettingError(f"tail_classes is {tail_classes!r}: give a list of class indices, as in [{tail_classes!r}]")
    for index in tail_classes:
        whole = isinstance(index, Integral) and not isinstance(index, bool)
        if not whole or not 0 <= index < classes:
            raise SettingError(f"tail_classes holds {index!r}: give class indices in 0..{classes - 1}")
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
    check_numbers(many=many, few=few, finite=False)
    if few > many + 1:
        raise SettingError(f"few is {few} and many {many}, so that classes would be in both groups: give few <= many")
    is_many, is_few = counts > many, counts < few
    return {"many": is_many, "medium": ~(is_many | is_few), "few": is_few}


class GroupedClasses:
    """The groups of a metric's classes.

    Attributes:
        groups: the classes of "many", "medium", "few" and "all", bool (4, C).
        many: a class with more training samples is in "many".
        few: a class with fewer training samples is in "few".
    """

    groups: Tensor
    many: int
    few: int

    @property
    def masks(self) -> dict[str, Tensor]:
        """The classes of "many", "medium", "few" and "all": bool tensors of shape (C,) on the CPU."""
        return dict(zip(GROUPS, self.groups.cpu(), strict=True))

    @property
    def group_of_class(self) -> list[str]:
        """The group of each of the C classes: "many", "medium" or "few"."""
        return [GROUPS[i] for i in self.groups[:3].int().argmax(dim=0).tolist()]

    @property
    def limits(self) -> dict[str, str]:
        """The training samples of a class in each group, in words: ``> 100``, ``20 to 100``, ``< 20``."""
        return {"many": f"> {self.many}", "medium": f"{self.few} to {self.many}", "few": f"< {self.few}"}


def focal_sharpness(
    class_counts: Tensor | Sequence[int],
    focal_lambda: float,
    focal_gamma: float,
) -> Tensor:
    r"""Sharpness weight of each class under Focal-SAM: :math:`c_j = \lambda (1 - n_j / n)^\gamma`.

    :math:`n_j` is the number of training samples of class j and :math:`n` that of all classes, so that rare
    classes are weighted near :math:`\lambda` and frequent ones less. With :math:`\gamma = 0` every class is
    weighted :math:`\lambda`. Of multi-label class counts (C, 2) each row is a binary problem of its own, whose n is
    the number of training samples.

    Args:
        class_counts: training samples per class, C integers, at least one of them above 0; or (C, 2).
        focal_lambda: :math:`\lambda` >= 0, finite; the authors use up to 1.1.
        focal_gamma: :math:`\gamma` >= 0, finite.

    Returns:
        float64 tensor on the CPU, of the shape of the class counts, values in [0, ``focal_lambda``].

    Raises:
        SettingError: if a setting is nan, infinite or negative, or every class count is 0.

    Source:
        Li et al., *Focal-SAM: Focal Sharpness-Aware Minimization for Long-Tailed Classification*, ICML 2025,
        arXiv 2505.01660.

    Example:
        >>> focal_sharpness([80, 15, 5], focal_lambda=1.0, focal_gamma=2.0)
        tensor([0.0400, 0.7225, 0.9025], dtype=torch.float64)
    """
    check_numbers(focal_lambda=focal_lambda, focal_gamma=focal_gamma)
    counts = nonzero_class_counts(class_counts, by_label=True).double()
    return float(focal_lambda) * (1.0 - counts / counts.sum(dim=-1, keepdim=True)) ** float(focal_gamma)


def _short(value: object, limit: int = 60) -> str:
    """One line for a message: the value's repr, cut where a long list would fill the screen."""
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
