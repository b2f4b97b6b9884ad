"""Weights of the rows of a batch, or of their sample-class pairs, from those of the classes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from imbsam.errors import SettingError


def class_vector(name: str, values: Tensor | Sequence[float] | float, of: str = "class") -> Tensor:
    """A setting for every class or group (`of`), float64 on the CPU; refuses the negative and non-finite.

    Returns:
        (C,), or () for all of them; for classes also (C, 2), one number for either value of a class's label.
    """
    try:
        vector = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingError(f"{name} is {values!r}: give one number for each {of}") from error
    if vector.dim() > 1 and not (of == "class" and vector.dim() == 2 and vector.shape[1] == 2):
        raise SettingError(f"{name} has shape {tuple(vector.shape)}: give one number for each {of}")
    wrong = [v for v in vector.reshape(-1).tolist() if not 0 <= v < math.inf]
    if wrong:
        raise SettingError(f"{name} holds {wrong[0]}: every {of} needs a finite number from 0")
    return vector


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Refuse a label outside 0..num_classes - 1; `labels` are integers (B,) on the CPU."""
    if not len(labels):
        return
    low, high = labels.numpy().min(), labels.numpy().max()
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise SettingError(
            f"targets holds the label {wrong}: with {num_classes} classes, labels run from 0 to {num_classes - 1}"
        )


def per_loss(name: str, vector: Tensor, targets: Tensor) -> Tensor:
    """The value for each loss of a batch, by its class.

    Args:
        name: of the setting, for messages.
        vector: (), (C,) or, for multi-label targets, (C, 2), as :func:`class_vector` returns it.
        targets: class indices (B,), probabilities (B, C), or multi-label targets: integers 0 and 1, or bool, (B, C).

    Returns:
        float64: (B,), the expectation if the targets are probabilities; (B, C) if they are multi-label.
    """
    if targets.dim() == 2 and not targets.is_floating_point():
        return _per_pair(name, vector, targets)
    if vector.dim() == 2:
        raise SettingError(
            f"{name} has shape {tuple(vector.shape)}, a number for either value of a class's label, and targets is not "
            "multi-label: give integers 0 and 1 of shape (B, C)"
        )
    if targets.dim() == 1 and not targets.is_floating_point():
        if vector.dim() == 0:
            return vector.expand(len(targets))
        check_labels(targets, len(vector))
        return vector[targets.long()]
    if targets.dim() == 2 and targets.is_floating_point():
        if vector.dim() == 1 and targets.shape[1] != len(vector):
            raise SettingError(
                f"targets has {targets.shape[1]} columns for the {len(vector)} classes of {name}: they must agree"
            )
        _check_probabilities(targets)
        if vector.dim() == 0:
            return vector.expand(len(targets))
        return targets.double() @ vector
    raise SettingError(
        f"targets has shape {tuple(targets.shape)} and dtype {targets.dtype}: give class indices (B,), "
        "probabilities (B, C) or multi-label integers (B, C), or the rows' own sharpness_weight="
    )


def _per_pair(name: str, vector: Tensor, targets: Tensor) -> Tensor:
    """The value of each sample-class pair, float64 (B, C)."""
    if targets.numel() and not ((targets.numpy() == 0) | (targets.numpy() == 1)).all():
        wrong = next(v for v in targets.reshape(-1).tolist() if v not in (0, 1))
        raise SettingError(
            f"targets holds {wrong}: multi-label targets (B, C) are 1 where the sample has the class, else 0"
        )
    if vector.dim() and targets.shape[1] != len(vector):
        raise SettingError(
            f"targets has {targets.shape[1]} columns for the {len(vector)} classes of {name}: they must agree"
        )
    if vector.dim() == 2:
        return torch.where(targets.bool(), vector[:, 1], vector[:, 0])
    return vector.expand(targets.shape)


def on_host(name: str, values: Any) -> Tensor:
    """A tensor, array or list as a tensor on the CPU."""
    try:
        return torch.as_tensor(values, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingError(f"{name} is a {type(values).__name__}, which is not a tensor: {error}") from error


def _check_probabilities(targets: Tensor) -> None:
    sums = targets.double().sum(dim=1).numpy()
    if len(sums) and not (sums <= 1.01).all():  # half precision rounds
        raise SettingError(
            f"targets has a row that sums to {sums.max():.3g}: probabilities sum to 1; multi-label targets are "
            "integers, targets.long()"
        )
