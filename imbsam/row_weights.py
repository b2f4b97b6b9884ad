"""Weights of the rows of a batch from those of their classes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from imbsam.errors import SettingError


def class_vector(name: str, values: Tensor | Sequence[float] | float, of: str = "class") -> Tensor:
    """A setting for every class or group (`of`), float64 (C,) or () on the CPU; refuses the negative and non-finite."""
    try:
        vector = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingError(f"{name} is {values!r}: give one number for each {of}") from error
    if vector.dim() > 1:
        raise SettingError(f"{name} has shape {tuple(vector.shape)}: give one number for each {of}")
    wrong = [v for v in vector.reshape(-1).tolist() if not 0 <= v < math.inf]
    if wrong:
        raise SettingError(f"{name} holds {wrong[0]}: every {of} needs a finite number from 0")
    return vector


def check_labels(labels: Sequence[int], num_classes: int) -> None:
    """Refuse a label outside 0..num_classes - 1."""
    if labels and not 0 <= min(labels) <= max(labels) < num_classes:
        wrong = min(labels) if min(labels) < 0 else max(labels)
        raise SettingError(
            f"targets holds the label {wrong}: with {num_classes} classes, labels run from 0 to {num_classes - 1}"
        )


def per_row(name: str, vector: Tensor, targets: Tensor) -> Tensor:
    """The value of each row's class, float64 (B,); its expectation if the targets are probabilities."""
    if targets.dim() == 1 and not targets.is_floating_point():
        labels = targets.tolist()
        if vector.dim() == 0:
            return vector.expand(len(labels))
        check_labels(labels, len(vector))
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
        f"targets has shape {tuple(targets.shape)} and dtype {targets.dtype}: give class indices (B,) or "
        "probabilities (B, C), or the rows' own sharpness_weight="
    )


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
            f"targets has a row that sums to {sums.max():.3g}: probabilities sum to 1; for multi-label targets give "
            "sharpness_weight=, one number for each row"
        )
