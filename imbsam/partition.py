"""Classes in several groups, each with its own g_s and e: which rows belong to which group, the same on all ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imbsam.batch import Batch, Losses, Plan, SharpGradient
from imbsam.errors import SettingError
from imbsam.row_weights import on_host, per_loss


def class_partition(partition: Tensor | Sequence[int]) -> Tensor:
    """The group of every class, int64 (C,) on the CPU; refuses anything but whole numbers from 0.

    Example:
        >>> class_partition([0, 0, 1])
        tensor([0, 0, 1])
    """
    groups = on_host("partition", partition)
    whole = groups.dim() == 1 and not groups.is_floating_point() and groups.dtype != torch.bool
    if not whole or len(groups) == 0 or int(groups.min()) < 0:
        raise SettingError(f"partition is {partition!r}: give each class the number of its group, from 0")
    return groups.long()


@dataclass(frozen=True)
class PartitionedPlan(Plan):
    """A :class:`~imbsam.batch.Plan` with one e for each of several groups of classes."""

    partition: Tensor
    """The group of every class, int64 (C,)."""
    rhos: dict[int, float]
    """Length of e of each group that perturbs."""
    agree: Callable[[set[int]], set[int]]
    """Maps the groups with sharp rows on this rank to those with sharp rows on any rank."""

    def _batch(self, losses: Losses, targets: Any, sharpness_weight: Any = None) -> Batch:
        """Decide for one batch; :meth:`ascents` adds its parts."""
        if sharpness_weight is not None:
            raise SettingError(
                "sharpness_weight= is per row, and this method has a perturbation for each group of classes: give "
                "targets instead"
            )
        batch = super()._batch(losses, targets)
        if batch.c.dim() == 2:
            raise SettingError(
                "targets are multi-label, and this method has a perturbation for each group of classes, of which a "
                "sample may have several: choose SAM, GSAM, ImbSAM or FocalSAM"
            )
        batch.source, batch.others = SharpGradient.NONE, None
        batch.sharp_of_group = self._sharp_of_group(on_host("targets", targets))
        return batch

    def ascents(self, batches: list[Batch]) -> list[tuple[float, list[Batch]]]:
        """For each group, its rho and the batches as it sees them: its own rows are sharp, the others context."""
        present = {group for batch in batches for group in batch.sharp_of_group}
        return [(self.rhos[group], self._parts(batches, group)) for group in sorted(self.agree(present))]

    def _parts(self, batches: list[Batch], group: int) -> list[Batch]:
        parts = []
        for batch in batches:
            c = batch.sharp_of_group.get(group, torch.zeros_like(batch.c))
            rows = self._extra_pass_rows(c)
            if len(rows):
                # not from the first forward's graph, which is useless for g_2(w) once the weights have been w + e_1
                part = Batch(batch.losses, batch.a, c, rows, self.own_forward)
                batch.source = SharpGradient.BY_GROUP
                batch.parts.append(part)
                parts.append(part)
        return parts

    def _sharp_of_group(self, targets: Tensor) -> dict[int, Tensor]:
        """c_ik of every group with a sharp row, float64 (B,) each; they sum to c_i."""
        c = per_loss("sharpness_weight", self.sharpness_weight, targets)
        if targets.dim() == 1:
            groups = self.partition[targets.long()]
            return {
                group: torch.where(groups == group, c, 0.0) for group in set(groups.numpy()[c.numpy() > 0].tolist())
            }
        by_group = torch.zeros(len(targets), int(self.partition.numpy().max()) + 1, dtype=torch.float64, device="cpu")
        by_group.index_add_(1, self.partition, targets.double() * self.sharpness_weight)
        return {group: by_group[:, group] for group in self.rhos if (by_group[:, group].numpy() > 0).any()}
