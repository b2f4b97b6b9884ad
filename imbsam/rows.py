"""What each row of a batch counts for, and which rows the extra passes run on: decided on the host."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from imbsam.errors import SettingError
from imbsam.snapshot import RandomState

Losses = Callable[[Tensor], Tensor]
"""Per-sample losses of the rows asked for: an int64 index (R,) in, losses (R,) out."""


def pass_size(rows: int) -> int:
    """Round a number of rows up to one of few sizes: 2, 4, 6, ..., 32, 36, 40, ..., 64, 72, ...

    Even up to 32, then eight sizes an octave, so that compilers and CUDA graphs meet few shapes and at most a ninth
    of a larger pass is filling. Never below 2: BatchNorm in training mode refuses a batch of one.

    >>> [pass_size(n) for n in (1, 3, 9, 17, 33, 100)]
    [2, 4, 10, 18, 36, 104]
    """
    step = max(2, 1 << max(0, (rows - 1).bit_length() - 4))
    return -(-rows // step) * step


def extra_pass_rows(sharp: Sequence[int], batch_size: int, context_rows: int) -> list[int]:
    """The sharp rows, then at least `context_rows` other rows, evenly spaced over the rest of the batch.

    No random draw: the same batch gives the same rows. The number of rows is rounded up by `pass_size` and cut at
    the batch; the filling comes from the same evenly spaced rows.

    Args:
        sharp: indices of the rows with c_i > 0, ascending.
        batch_size: number of rows of the batch.
        context_rows: how many non-sharp rows to add at least.

    Returns:
        Distinct row indices, the sharp ones first; their losses are the only ones that count.

    >>> extra_pass_rows([2, 5], batch_size=8, context_rows=3)
    [2, 5, 0, 1, 4, 6]
    """
    fill = min(batch_size, pass_size(len(sharp) + context_rows)) - len(sharp)
    if fill == 0:
        return list(sharp)
    others = sorted(set(range(batch_size)).difference(sharp))
    return [*sharp, *(others[i * len(others) // fill] for i in range(fill))]


@dataclass
class Batch:
    """A micro-batch and what was decided for it on the host."""

    losses: Losses
    size: int
    weight: Tensor | None
    """a_i, shape (B,); None where all are 1."""
    sharpness: Tensor
    """c_i, shape (B,)."""
    rows: Tensor
    """Rows of the extra passes, int64: the whole batch in order, or the sharp rows and then their context; or none."""
    all_sharp: bool
    """Whether g_s is g_all (every c_i is 1)."""
    one_graph: bool
    """Whether the graph of the first forward serves g_s(w) too."""
    random_state: RandomState | None = None
    """Where the generators stood before the forward that g_s(w) comes from: w + e must see the same dropout masks."""

    def objective(self, losses: Tensor, factor: Tensor | None = None) -> Tensor:
        """Sum of a_i * factor_i * l_i over the rows whose factor is not 0; `losses` may be those of `rows` only."""
        if factor is None:
            if self.weight is None:
                return losses.sum()
            weights = self.weight
        else:
            weights = factor if self.weight is None else self.weight * factor
            counted = torch.from_numpy(np.flatnonzero(factor.numpy()))
            weights = weights[counted]
            if len(losses) < self.size:  # the sharp rows come first
                losses = losses[: len(counted)]
            elif len(counted) < self.size:  # taken out, never multiplied by 0: 0 * inf is nan
                losses = losses[to_device(counted, losses.device)]
        return (losses * to_device(weights.to(losses.dtype), losses.device)).sum()


def class_vector(name: str, values: Tensor | Sequence[float] | float) -> Tensor:
    """A setting for every class, float64 (C,) or () on the CPU; refuses what is negative or not finite."""
    vector = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if vector.dim() > 1:
        raise SettingError(f"{name} has shape {tuple(vector.shape)}: give one number for each class")
    wrong = [v for v in vector.reshape(-1).tolist() if not 0 <= v < math.inf]
    if wrong:
        raise SettingError(f"{name} holds {wrong[0]}: every class needs a finite number from 0")
    return vector


def check_labels(labels: Sequence[int], num_classes: int) -> None:
    """Refuse a label outside 0..num_classes - 1."""
    if labels and not 0 <= min(labels) <= max(labels) < num_classes:
        wrong = min(labels) if min(labels) < 0 else max(labels)
        raise SettingError(
            f"targets holds the label {wrong}: with {num_classes} classes, labels run from 0 to {num_classes - 1}"
        )


def per_row(name: str, vector: Tensor, targets: Tensor) -> Tensor:
    """The classes' values for each row, float64 (B,); expected ones where the targets are probabilities."""
    if targets.dim() == 1 and not targets.is_floating_point():
        labels = targets.tolist()
        if vector.dim() == 0:
            return vector.expand(len(labels))
        check_labels(labels, len(vector))
        return vector[targets.long()]
    if targets.dim() == 2 and targets.is_floating_point():
        if vector.dim() == 0:
            return vector.expand(len(targets))
        if targets.shape[1] != len(vector):
            raise SettingError(
                f"targets has {targets.shape[1]} columns for the {len(vector)} classes of {name}: they must agree"
            )
        return targets.double() @ vector
    raise SettingError(
        f"targets has shape {tuple(targets.shape)} and dtype {targets.dtype}: give class indices (B,) or "
        "probabilities (B, C), or the rows' own sharpness="
    )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy from the CPU without waiting for the device."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
