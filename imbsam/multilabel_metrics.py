"""Average precision per class and class group for multi-label targets, as a torchmetrics metric."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MultilabelAveragePrecision

from imbsam.class_groups import GroupedClasses, class_counts_tensor, class_groups
from imbsam.errors import SettingError
from imbsam.group_names import GROUPS

__all__ = ["ClassGroupAveragePrecision"]


class ClassGroupAveragePrecision(GroupedClasses, MultilabelAveragePrecision):
    r"""Mean average precision of the classes with many, a medium number of and few training samples.

    The average precision of a class is torchmetrics', exact, without interpolation, as scikit-learn's: with precision
    :math:`P_t` and recall :math:`R_t` at threshold t, and every score a threshold,
    :math:`\text{AP} = \sum_t (R_t - R_{t-1}) P_t`. Samples of equal score are alarms together. The mAP of a group is
    the mean over those of its classes that occur in the targets; "all" is the group of all classes.

    The states are all scores and targets, 16 bytes for each pair of a sample and a class.

    As input to ``forward`` and ``update`` the metric accepts:

    * ``preds`` (Tensor): logits, floating of shape (N, C).
    * ``target`` (Tensor): 1 where a sample has a class, else 0, integer of shape (N, C).

    As output of ``forward`` and ``compute`` it returns:

    * a dict with the keys "map_many", "map_medium", "map_few", "map_all", each a float tensor of shape () in [0, 1];
      nan for a group none of whose classes occurs in the targets.

    Args:
        class_counts: training samples that have each class, C integers.
        many: a class that more training samples have is in "many".
        few: a class that fewer training samples have is in "few".
        kwargs: further arguments of :class:`torchmetrics.Metric`.

    Raises:
        SettingError: if ``class_counts``, ``many`` or ``few`` cannot work; in ``update`` for inputs of other shapes.

    Example:
        >>> metric = ClassGroupAveragePrecision(class_counts=[500, 50, 5])
        >>> logits = torch.tensor([[2.0, 1, 0], [1, 2, 1], [0, 3, 2]])
        >>> metric.update(logits, torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0]]))
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'map_many': 1.0, 'map_medium': 0.5, 'map_few': nan, 'map_all': 0.75}
        >>> metric.per_class()
        tensor([1.0000, 0.5000,    nan])
    """

    class_counts: Tensor

    def __init__(self, class_counts: Tensor | Sequence[int], many: int = 100, few: int = 20, **kwargs: Any) -> None:
        counts = class_counts_tensor(class_counts)
        masks = class_groups(counts, many, few)
        super().__init__(max(2, len(counts)), average=None, validate_args=False, **kwargs)
        self.num_labels = len(counts)  # torchmetrics refuses a single one, which its functions can compute
        self.many, self.few = many, few
        self.class_counts = counts
        self.groups = torch.stack([*masks.values(), torch.ones_like(counts, dtype=torch.bool)])

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Keep the scores of a batch.

        Args:
            preds: logits (N, C).
            target: 1 where a sample has a class, else 0, integer (N, C).

        Raises:
            SettingError: if a shape is another one.
        """
        if preds.ndim != 2 or preds.shape != target.shape or preds.shape[1] != self.num_labels:
            raise SettingError(
                f"preds has shape {tuple(preds.shape)} and target {tuple(target.shape)}: give logits and 0 or 1 for "
                f"each sample and class, (N, {self.num_labels})"
            )
        # torchmetrics takes the sigmoid of logits; in float32 those above 17 would all be 1, and so equal
        super().update(preds.double().sigmoid(), target.long())

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the mean average precisions of the groups.

        Returns:
            float tensors of shape () in [0, 1], nan for a group none of whose classes occurs in the targets.
        """
        found = self._average_precisions()
        means = [found[mask.to(found.device)].nanmean() for mask in self.groups]
        return {f"map_{group}": mean for group, mean in zip(GROUPS, means, strict=True)}

    def per_class(self) -> Tensor:
        """Return the average precision of each class; across processes like ``compute``, so all of them must call it.

        Returns:
            float tensor of shape (C,) in [0, 1], nan for a class that does not occur in the targets.
        """
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn,
            should_sync=self._to_sync and not self._is_synced,
            should_unsync=self._should_unsync,
        ):
            return self._average_precisions()

    def positives(self) -> Tensor:
        """Return how many of the samples have each class, int64 (C,); across processes like ``per_class``."""
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn,
            should_sync=self._to_sync and not self._is_synced,
            should_unsync=self._should_unsync,
        ):
            return self._targets().sum(dim=0)

    def _targets(self) -> Tensor:
        return torch.cat(list(self.target)) if isinstance(self.target, list) else self.target

    def _average_precisions(self) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "No positive samples")  # nan says so
            found: Tensor = super().compute().float()
        return found.where(self._targets().sum(dim=0) > 0, torch.nan)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "ClassGroupAveragePrecision":
        super()._apply(fn, *args, **kwargs)
        self.class_counts, self.groups = fn(self.class_counts), fn(self.groups)
        return self
