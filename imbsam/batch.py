"""A batch and what the host decides before its first pass: weights, rows, and where g_s(w) comes from."""

import enum
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imbsam.errors import SettingError
from imbsam.extra_passes import extra_pass_rows
from imbsam.row_weights import on_host, per_loss
from imbsam.snapshot import Buffers, RandomState

Losses = Callable[[Tensor], Tensor]
"""Losses of the rows asked for: an int64 index (R,) in, losses (R,) out, or (R, C) for multi-label targets."""


class SharpGradient(enum.Enum):
    """Where g_s(w) comes from."""

    NONE = "no row is sharp: g_s is 0"
    EVERY_ROW = "every row has c = 1: g_s is the whole gradient and g_rest is 0"
    SAME_GRAPH = "the extra passes see the whole batch: the graph of the first forward gives g_s too"
    OWN_FORWARD = "a second forward, on the sharp rows and their context, gives g_s; g_rest is then g_all - g_s"
    DIRECTION = "the same, but only for the direction of e: the first forward gives g_rest itself"
    FIRST_PASS = "two first passes: the other rows give g_rest, the sharp rows give g_s"
    BY_GROUP = "several groups of classes, each with its own g_s: `Batch.parts` has each group's sharp rows"


@dataclass(frozen=True)
class Plan:
    """What the settings alone decide for all batches, and so the same on all ranks."""

    sharpness_weight: Tensor
    """c for every class, float64 (C,), or () for all of them; or (C, 2), for either value of a class's label."""
    class_weight: Tensor | None
    """a for every class, float64 (C,) or (C, 2); None if all are 1."""
    context_rows: int | None
    """Rows to add to the sharp ones; None for the whole batch."""
    perturbs: bool
    """Whether some row may be sharp."""
    in_step: bool
    """Whether every rank runs the extra passes, with or without sharp rows, because a pass waits for the others."""
    may_be_empty: bool
    """Whether a batch may be empty: other ranks have rows, and average with this one."""
    rho: float
    """Length of e."""
    splits: bool
    """Whether sharp rows and others may have first passes of their own: no row sees another."""
    along_only: bool
    """Whether only some parameters are perturbed and no row sees another, so that g_s(w) is for the direction alone."""

    def batches(self, losses: Any, targets: Any, sharpness_weight: Any) -> "list[Batch]":
        """Decide for the one batch, or for each of a list of micro-batches ``(losses, targets)``."""
        if callable(losses):
            return [self._batch(losses, targets, sharpness_weight)]
        if not isinstance(losses, list):
            raise SettingError(
                f"losses is a {type(losses).__name__}: give a function from row indices to the losses of those rows, "
                "or a list of (losses, targets)"
            )
        if targets is not None or sharpness_weight is not None:
            raise SettingError(
                "targets and sharpness_weight are for a single batch: a list of micro-batches has its own targets"
            )
        if not losses:
            raise SettingError("losses is an empty list: give at least one micro-batch")
        return [self._batch(*micro_batch) for micro_batch in losses]

    def _batch(self, losses: Losses, targets: Any, sharpness_weight: Any = None) -> "Batch":
        """Decide for one batch; `sharpness_weight` (B,) or (B, C) are the rows' own c_i, instead of their classes'."""
        if targets is None and (sharpness_weight is None or self.class_weight is not None):
            raise SettingError(
                "targets is None: give the labels, or, if no class_weight is set, sharpness_weight= for each row"
            )
        a = None
        if targets is not None:
            targets = on_host("targets", targets)
            if self.class_weight is not None:
                a = per_loss("class_weight", self.class_weight, targets)
        if sharpness_weight is None:
            c = per_loss("sharpness_weight", self.sharpness_weight, targets)
        else:
            c = on_host("sharpness_weight=", sharpness_weight).double()
            wrong = targets is not None and len(c) != len(targets)
            if c.dim() not in (1, 2) or wrong or (a is not None and a.shape != c.shape):
                raise SettingError(
                    f"sharpness_weight= has shape {tuple(c.shape)}: give one number for each row, or, for multi-label "
                    "targets, for each pair of row and class"
                )
            if not ((c.numpy() >= 0) & (c.numpy() < math.inf)).all():
                raise SettingError(
                    "sharpness_weight= holds a negative or non-finite number: every row needs a finite number from 0"
                )
        if len(c) == 0 and not self.may_be_empty:
            raise SettingError("the batch is empty: skip it")
        rows = self._extra_pass_rows(c)
        source = self._source(c, len(rows), own=sharpness_weight is not None)
        others = torch.from_numpy(np.flatnonzero(c.numpy() == 0)) if source is SharpGradient.FIRST_PASS else None
        return Batch(losses, a, c, rows, source, others)

    def ascents(self, batches: "list[Batch]") -> "list[tuple[float, list[Batch]]]":
        """Each e of the step: its length, and the batches whose sharp rows it is for. Here just one e."""
        return [(self.rho, [batch for batch in batches if batch.takes_extra_passes])]

    def _extra_pass_rows(self, c: Tensor) -> Tensor:
        size = len(c)
        sharp = np.flatnonzero(_is_sharp(c)).tolist() if self.perturbs else []
        rows: list[int] = []
        if sharp or (self.in_step and size):
            context = size if self.context_rows is None else self.context_rows
            rows = extra_pass_rows(sharp, size, max(context, not sharp))
        if len(rows) == size:
            rows.sort()  # the batch in its own order, so that the graph of the first forward can give g_s(w) too
        return torch.from_numpy(np.array(rows, dtype=np.int64))

    def _source(self, c: Tensor, rows: int, own: bool) -> SharpGradient:
        if rows == 0:
            return SharpGradient.NONE
        ones = np.count_nonzero(c.numpy() == 1)
        every_row, whole = ones == c.numel(), rows == len(c)
        if self.in_step:  # the rows differ from rank to rank, the passes must not
            every_row, whole = not own and bool((self.sharpness_weight.numpy() == 1).all()), self.context_rows is None
        if every_row:
            return SharpGradient.EVERY_ROW
        if self.splits and c.dim() == 1 and ones == np.count_nonzero(c.numpy()):
            return SharpGradient.FIRST_PASS
        return SharpGradient.SAME_GRAPH if whole else self.own_forward

    @property
    def own_forward(self) -> SharpGradient:
        """What a forward on the sharp rows and their context is for."""
        return SharpGradient.DIRECTION if self.along_only else SharpGradient.OWN_FORWARD


@dataclass
class Batch:
    """A batch, or one micro-batch of several."""

    losses: Losses
    a: Tensor | None
    """Loss weight of each row, float64 (B,) on the CPU, or of each pair (B, C); None if all are 1."""
    c: Tensor
    """Sharpness weight of each row, float64 (B,) on the CPU, or of each pair of row and class (B, C)."""
    rows: Tensor
    """Rows of the extra passes, int64: the whole batch in order, the sharp rows and then their context, or none."""
    source: SharpGradient
    others: Tensor | None = None
    """The rows of the first pass where those are not all of them: the rows that are not sharp, int64."""
    buffers: Buffers | None = None
    """The buffers that its passes at w and at w + e start from."""
    generators: RandomState | None = None
    """The generators' state before the pass that gave g_s(w): the pass at w + e must see the same dropout masks."""
    sharp_of_group: dict[int, Tensor] = field(default_factory=dict)
    """With several groups of classes, c_ik of each that has sharp rows, float64 (B,) each."""
    parts: "list[Batch]" = field(default_factory=list)
    """With several groups of classes, the batch as each of them sees it; only these parts run at w + e."""

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.c.shape[0]

    @property
    def takes_extra_passes(self) -> bool:
        """Whether it runs at w + e."""
        return self.source is not SharpGradient.NONE

    @property
    def first_rows(self) -> Tensor:
        """The rows of the first pass, in order, int64."""
        return torch.arange(self.size, device="cpu") if self.others is None else self.others

    @property
    def gives_rest(self) -> bool:
        """Whether the first forward gives g_rest itself, and not g_all."""
        return any(part.source is SharpGradient.DIRECTION for part in self.parts or [self])

    def all(self, losses: Tensor) -> Tensor:
        """Sum of a_i l_i over the rows of the first pass."""
        return _weighted_sum(losses, self.a if self.a is None or self.others is None else self.a[self.others])

    def rest(self, losses: Tensor) -> Tensor:
        """Sum of a_i (1 - c_i) l_i."""
        return _counted_sum(losses, *self._counted(1 - self.c))

    def sharp(self, losses: Tensor) -> Tensor:
        """Sum of a_i c_i l_i; `losses` may be those of `rows` only."""
        return _counted_sum(losses, *(self._sharp_of_rows if len(losses) < self.size else self._counted(self.c)))

    @functools.cached_property
    def _sharp_of_rows(self) -> tuple[Any, Tensor | None]:
        return self._counted(self.c, self.rows)  # for the pass at w and the one at w + e

    def _counted(self, factor: Tensor, rows: Tensor | None = None) -> tuple[Any, Tensor | None]:
        """The indices of the losses whose factor is not 0, and their weights a_i times factor; None if all are 1.

        Of the losses of all rows, or of those of `rows`, flattened.
        """
        factors, weights = factor.numpy(), (factor if self.a is None else self.a * factor).numpy()
        if rows is not None:
            factors, weights = factors[rows.numpy()], weights[rows.numpy()]
        counted = np.flatnonzero(factors)
        weights = weights.reshape(-1)[counted]
        return counted, torch.from_numpy(weights) if np.count_nonzero(weights != 1) else None


def _is_sharp(c: Tensor) -> Any:
    """Whether each row has a sharpness weight that is not 0, bool (B,)."""
    return c.numpy().any(axis=1) if c.dim() == 2 else c.numpy() != 0


def _counted_sum(losses: Tensor, counted: Any, weights: Tensor | None) -> Tensor:
    """Weighted sum of some of the losses.

    It selects rather than multiplying by 0: the other losses may be infinite, and 0 * inf is nan.
    """
    losses = losses.flatten()
    if len(counted) < len(losses):
        if len(counted) and counted[-1] != len(counted) - 1:
            losses = losses[to_device(torch.from_numpy(counted), losses.device)]
        else:  # one loss a row, of which the sharp ones come first
            losses = losses[: len(counted)]
    return _weighted_sum(losses, weights)


def _weighted_sum(losses: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return losses.sum()
    return (losses * to_device(weights.to(losses.dtype), losses.device)).sum()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy from the CPU without waiting for the device."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
