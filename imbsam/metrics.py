"""Accuracy per class group, as a torchmetrics metric."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.imports import _MATPLOTLIB_AVAILABLE
from torchmetrics.utilities.plot import _error_on_missing_matplotlib

from imbsam.class_groups import GroupedClasses, class_counts_tensor, class_groups
from imbsam.errors import SettingError
from imbsam.group_names import GROUP_COLOURS, GROUPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["ClassGroupAccuracy"]

if not _MATPLOTLIB_AVAILABLE:
    __doctest_skip__ = ["ClassGroupAccuracy.plot"]


class ClassGroupAccuracy(GroupedClasses, Metric):
    r"""Accuracy on the classes with many, a medium number of and few training samples.

    The accuracy of a group :math:`G` of classes is the mean recall of those of its classes that occur in the
    targets:

    .. math::
        \text{Acc}_G = \frac{1}{|G'|} \sum_{c \in G'} \frac{\text{TP}_c}{N_c},
        \qquad G' = \{c \in G : N_c > 0\}

    with :math:`N_c` targets of class c, of which :math:`\text{TP}_c` were predicted as c. The groups are
    "many" (more than ``many`` training samples), "few" (fewer than ``few``) and "medium" (the rest). "all"
    is the group of all classes: the balanced accuracy of ``sklearn.metrics.balanced_accuracy_score``, and
    on a balanced test set the usual top-1 accuracy.

    torchmetrics' ``MulticlassAccuracy(average="macro")`` is the same where every class occurs in the
    targets. It also averages over classes that were predicted but do not occur, as recalls of 0; this
    metric, like scikit-learn, leaves them out.

    As input to ``forward`` and ``update`` the metric accepts:

    * ``preds`` (Tensor): logits or probabilities, floating of shape (N, C), the largest of which is the
      prediction; or predicted class indices, integer of shape (N,). A predicted index outside 0..C-1 is a
      wrong prediction.
    * ``target`` (Tensor): class indices, integer of shape (N,).

    As output of ``forward`` and ``compute`` it returns:

    * a dict with the keys "many", "medium", "few", "all", each a float tensor of shape () in [0, 1]; nan
      for a group none of whose classes occurs in the targets.

    ``update`` never waits for a GPU. The price is that a target outside 0..C-1 is refused only by
    ``compute``; it is never counted.

    Args:
        class_counts: training samples per class, C integers.
        many: a class with more training samples is in "many".
        few: a class with fewer training samples is in "few".
        class_names: names of the C classes for the figure, in the order of the class indices.
        validate_args: whether ``compute`` raises for targets outside 0..C-1. With False, for data whose ignored
            samples have such a label, they are left out silently.
        group_counts: counts that decide the groups instead of ``class_counts``, C integers: the literature's groups of
            CIFAR-100-LT at ratio 50 and 10 are those of ratio 100.
        kwargs: further arguments of :class:`torchmetrics.Metric`.

    Raises:
        SettingError: if ``class_counts``, ``many``, ``few``, ``class_names`` or ``group_counts`` cannot work; in
            ``update`` for inputs of other shapes or types; in ``compute`` see ``validate_args``.

    Source:
        The groups and their accuracies are those of Liu et al., *Large-Scale Long-Tailed Recognition in an
        Open World*, CVPR 2019, arXiv 1904.05160.

    Example:
        >>> metric = ClassGroupAccuracy(class_counts=[500, 50, 30, 5])
        >>> metric.update(preds=torch.tensor([0, 0, 1, 2, 1, 0]), target=torch.tensor([0, 0, 1, 2, 2, 3]))
        >>> {group: round(accuracy.item(), 3) for group, accuracy in metric.compute().items()}
        {'many': 1.0, 'medium': 0.75, 'few': 0.0, 'all': 0.625}
        >>> metric.per_class()
        tensor([1.0000, 1.0000, 0.5000, 0.0000])
    """

    is_differentiable: bool = False
    higher_is_better: bool = True
    full_state_update: bool = False
    plot_lower_bound: float = 0.0
    plot_upper_bound: float = 1.0

    class_counts: Tensor
    correct: Tensor
    total: Tensor
    outside: Tensor

    def __init__(
        self,
        class_counts: Tensor | Sequence[int],
        many: int = 100,
        few: int = 20,
        class_names: Sequence[str] | None = None,
        validate_args: bool = True,
        group_counts: Tensor | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        counts = class_counts_tensor(class_counts)
        deciding = counts if group_counts is None else class_counts_tensor(group_counts)
        if deciding.shape != counts.shape:
            raise SettingError(f"group_counts has {len(deciding)} counts: give one for each of {len(counts)} classes")
        masks = class_groups(deciding, many, few)
        if class_names is not None and len(class_names) != counts.numel():
            raise SettingError(f"class_names has {len(class_names)} names: give one for each of {len(counts)} classes")
        self.many = many
        self.few = few
        self.own_groups = torch.equal(deciding, counts)
        self.class_names = None if class_names is None else [str(name) for name in class_names]
        self.validate_args = validate_args
        # no buffers: an average of a model's weights takes the mean of its buffers too, which fails for bool
        self.class_counts = counts
        everything = torch.ones_like(counts, dtype=torch.bool)
        self.groups = torch.stack([*masks.values(), everything])
        self.add_state("correct", torch.zeros_like(counts), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros_like(counts), dist_reduce_fx="sum")
        self.add_state("outside", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count the predictions of a batch.

        Args:
            preds: logits or probabilities (N, C), floating, or class indices (N,), integer.
            target: class indices (N,), integer.

        Raises:
            SettingError: if shapes or types are others, or the number of columns is not that of the classes.
        """
        classes = self.class_counts.numel()
        if target.ndim != 1 or target.is_floating_point():
            raise SettingError(
                f"target has shape {tuple(target.shape)} and type {target.dtype}: give integer class indices (N,)"
            )
        if preds.is_floating_point():
            if preds.shape != (len(target), classes):
                raise SettingError(
                    f"preds has shape {tuple(preds.shape)} for {len(target)} targets and {classes} classes: give "
                    f"logits ({len(target)}, {classes}), or integer class indices"
                )
            preds = preds.argmax(dim=1)
        elif preds.shape != target.shape:
            raise SettingError(f"preds has shape {tuple(preds.shape)} for {len(target)} targets: give one for each")
        target = target.to(torch.int64)
        inside = (target >= 0) & (target < classes)
        row_class = target.where(inside, 0)
        # scatter_add and not bincount or a boolean index: those ask a GPU how many there are, and wait.
        self.total.scatter_add_(0, row_class, inside.to(torch.int64))
        self.correct.scatter_add_(0, row_class, (inside & (preds == target)).to(torch.int64))
        self.outside += (~inside).sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the accuracies of the groups "many", "medium", "few" and "all".

        Returns:
            float tensors of shape () in [0, 1], nan for a group none of whose classes occurs in the targets.

        Raises:
            SettingError: if targets outside 0..C-1 were given, unless ``validate_args`` is False.
        """
        return self._group_means(self._recalls())

    def per_class(self) -> Tensor:
        """Return the recall of each class; across processes like ``compute``, so all of them must call it.

        Returns:
            float tensor of shape (C,) in [0, 1], nan for a class that does not occur in the targets.

        Raises:
            SettingError: if targets outside 0..C-1 were given, unless ``validate_args`` is False.
        """
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn,
            should_sync=self._to_sync and not self._is_synced,
            should_unsync=self._should_unsync,
        ):
            return self._recalls()

    def _group_means(self, recalls: Tensor) -> dict[str, Tensor]:
        """Each group's mean over its tested classes, of numbers of shape (C,) that are nan for the others."""
        counted = self.groups & (self.total > 0)
        means = recalls.nan_to_num(0.0).where(counted, 0.0).sum(dim=1) / counted.sum(dim=1)
        return dict(zip(GROUPS, means.unbind(), strict=True))

    def _recalls(self) -> Tensor:
        if self.validate_args and (outside := int(self.outside)):
            classes, targets = self.class_counts.numel(), outside + int(self.total.sum())
            # torchmetrics leaves the metric in its synchronised state when compute raises.
            if self._is_synced:
                self.unsync()
            raise SettingError(
                f"{outside} of {targets} targets were outside 0..{classes - 1}, the classes of class_counts: correct "
                "the labels, or ignore them with validate_args=False"
            )
        return self.correct / self.total

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "ClassGroupAccuracy":
        super()._apply(fn, *args, **kwargs)
        self.class_counts, self.groups = fn(self.class_counts), fn(self.groups)
        return self

    def set_dtype(self, dst_type: str | torch.dtype) -> "ClassGroupAccuracy":
        """Change nothing: the states are counts, which a floating type would round."""
        return self

    def plot(
        self,
        val: Tensor | dict[str, Tensor] | Sequence[dict[str, Tensor]] | None = None,
        ax: "Axes | None" = None,
    ) -> "tuple[Figure | SubFigure | None, Axes]":
        """Plot the recall of every class, from the most frequent to the rarest, with the groups' accuracies.

        Args:
            val: the result of ``per_class``; by default it is called. A result of ``compute`` or
                ``forward``, or a sequence of them over time, is drawn as torchmetrics draws it.
            ax: axes to draw into; by default a new figure.

        Returns:
            Figure (None when ``ax`` was given) and axes.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
            SettingError: if ``val`` is a tensor of another shape than (C,).

        Example:
            >>> metric = ClassGroupAccuracy(class_counts=[500, 50, 5], class_names=["cat", "lynx", "ocelot"])
            >>> metric.update(preds=torch.tensor([0, 0, 1, 0]), target=torch.tensor([0, 0, 1, 2]))
            >>> figure, axes = metric.plot()
        """
        _error_on_missing_matplotlib()
        if val is not None and not isinstance(val, Tensor):
            return self._plot(val, ax)  # type: ignore[return-value]
        recalls = (self.per_class() if val is None else val).detach().cpu()
        if recalls.shape != self.class_counts.shape:
            raise SettingError(f"val has shape {tuple(recalls.shape)}: give the result of per_class()")
        import matplotlib.pyplot as plt

        classes, figure = len(recalls), None
        if ax is None:
            figure, ax = plt.subplots(figsize=(max(6.4, min(11.0, 0.55 * classes)), 4.2), layout="constrained")
        order = self.class_counts.cpu().argsort(descending=True, stable=True)
        counts, heights = self.class_counts.cpu()[order].tolist(), recalls[order].numpy()
        position, tested = np.arange(classes), ~np.isnan(heights)
        for group, limit in self.limits.items():
            members = self.masks[group][order].numpy()
            shown = members & tested
            if members.any():
                mean = heights[shown].mean() if shown.any() else math.nan
                limits = f" ({limit})" if self.own_groups else ""
                label = f"{group}{limits}: {f'{mean:.3f}' if shown.any() else 'no test samples'}"
                colour, (left, right) = GROUP_COLOURS[group], position[members][[0, -1]] + [-0.5, 0.5]
                ax.bar(position[shown], heights[shown], 0.8 if classes <= 150 else 1.0, color=colour, alpha=0.55)
                ax.hlines(mean, left, right, color=colour, linewidth=2.2, label=label)
        if not tested.all():
            ax.plot(position[~tested], 0.02 * np.ones((~tested).sum()), "x", color="0.35", label="no test samples")
        mean = heights[tested].mean()
        ax.axhline(mean, color=GROUP_COLOURS["all"], linestyle="--", linewidth=1.2, label=f"all: {mean:.3f}")
        ax.set(xlim=(-0.5, classes - 0.5), ylim=(0, 1), ylabel="recall")
        if classes <= 25:
            names = self.class_names or [str(c) for c in range(classes)]
            labels = [f"{names[c]} ({count})" for c, count in zip(order.tolist(), counts, strict=True)]
            ax.set_xticks(position, labels, rotation=40, ha="right", rotation_mode="anchor")
            ax.set_xlabel("class (training samples)")
        else:
            ticks = np.linspace(0, classes - 1, 8).round().astype(int)
            ax.set_xticks(ticks, [str(counts[tick]) for tick in ticks])
            ax.set_xlabel("training samples of the class (classes from the most frequent to the rarest)")
        ax.grid(axis="y", color="0.85", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize="small")
        return figure, ax
