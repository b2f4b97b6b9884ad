"""What is reported beside the accuracy of the groups of classes, as a torchmetrics metric."""

import math

import torch
from torch import Tensor

from imbsam.errors import SettingError
from imbsam.metrics import ClassGroupAccuracy

__all__ = ["TOP", "ClassMeasures", "among_top", "class_f1"]

TOP = 5
"""The k of the top-k accuracy."""


class ClassMeasures(ClassGroupAccuracy):
    r"""Group accuracies, top-5 accuracies, and the lowest recall, means of the recalls and macro-F1 over all classes.

    With :math:`R_c = \text{TP}_c / N_c` the recall of class c, and C' classes that occur in the targets, it adds to
    :class:`~imbsam.metrics.ClassGroupAccuracy`:

    * ``top5_many``, ``top5_medium``, ``top5_few``, ``top5_all``, where there are more than 5 classes: the group's mean
      of the classes' top-5 recalls, the share of a class's samples that have it among the 5 highest scores.
    * ``lowest_recall``: :math:`\min_c R_c`.
    * ``harmonic_mean``: :math:`C' / \sum_c R_c^{-1}`; 0 where a recall is 0.
    * ``geometric_mean``: :math:`(\prod_c R_c)^{1/C'}`; 0 where a recall is 0.
    * ``macro_f1``: the mean of :math:`F_c = 2 \text{TP}_c / (N_c + P_c)`, with :math:`P_c` samples predicted as c.

    All are in [0, 1]. A class without targets has no recall: it counts in none of them, except that macro-F1, like
    ``sklearn.metrics.f1_score(average="macro")``, counts it as 0 if it was predicted. Without any such class they are
    nan. Of equal scores the lower class index ranks first, as in ``argmax``, and nan is the highest score.

    torchmetrics' F1 and top-k metrics of C classes count a C x C table in every update, 530 MB for iNaturalist's 8,142,
    with ``bincount``, which waits for a GPU; these are sums of shape (C,).

    Args:
        class_counts: training samples per class, C integers.
        kwargs: the other arguments of :class:`~imbsam.metrics.ClassGroupAccuracy`.

    Raises:
        SettingError: as there, and in ``update`` for class indices instead of scores.

    Source:
        Lowest recall, harmonic and geometric mean: Du and Wu, *No One Left Behind: Improving the Worst Categories in
        Long-Tailed Learning*, CVPR 2023, arXiv 2303.03630.

    Example:
        >>> metric = ClassMeasures(class_counts=[500, 50, 5])
        >>> scores = torch.tensor([[3.0, 2, 1], [3, 2, 1], [1, 3, 2], [3, 2, 1], [1, 2, 3]])
        >>> metric.update(scores, target=torch.tensor([0, 0, 1, 1, 2]))
        >>> {name: round(metric.compute()[name].item(), 3) for name in ("all", "lowest_recall", "harmonic_mean")}
        {'all': 0.833, 'lowest_recall': 0.5, 'harmonic_mean': 0.75}
    """

    top5: Tensor
    predicted: Tensor

    def __init__(self, class_counts: Tensor | list[int], *args: object, **kwargs: object) -> None:
        super().__init__(class_counts, *args, **kwargs)  # type: ignore[arg-type]
        for name in ("top5", "predicted"):
            self.add_state(name, torch.zeros_like(self.class_counts), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count the predictions of a batch.

        Args:
            preds: logits or probabilities (N, C), floating.
            target: class indices (N,), integer.

        Raises:
            SettingError: if shapes or types are others.
        """
        if not preds.is_floating_point():
            raise SettingError(f"preds has type {preds.dtype}: give logits or probabilities (N, C), for the top 5")
        super().update(preds, target)
        classes = self.class_counts.numel()
        target = target.to(torch.int64)
        inside = (target >= 0) & (target < classes)
        target = target.where(inside, 0)
        self.predicted.scatter_add_(0, preds.argmax(dim=1), inside.to(torch.int64))
        if classes > TOP:
            self.top5.scatter_add_(0, target, (inside & among_top(preds, target)).to(torch.int64))

    def compute(self) -> dict[str, Tensor]:
        """Return the accuracies of the groups, and the other measures by the names above.

        Returns:
            float tensors of shape () in [0, 1], or nan.

        Raises:
            SettingError: if targets outside 0..C-1 were given, unless ``validate_args`` is False.
        """
        measures = super().compute()
        tested = self.total > 0
        if self.class_counts.numel() > TOP:
            measures |= {f"top5_{group}": mean for group, mean in self._group_means(self.top5 / self.total).items()}
        # without a tested class: the lowest of infinities, 0 / 0 and the mean of nothing
        recalls, any_tested = (self.correct / self.total).where(tested, math.inf), tested.any()
        measures["lowest_recall"] = recalls.amin().where(any_tested, math.nan)
        measures["harmonic_mean"] = tested.sum() / (1 / recalls).sum()
        measures["geometric_mean"] = recalls.log().where(tested, 0).sum().div(tested.sum()).exp()
        measures["macro_f1"] = class_f1(self.correct, self.total, self.predicted).nanmean()
        return measures


def among_top(scores: Tensor, target: Tensor, k: int = TOP) -> Tensor:
    """Whether a sample's class is among the k with the highest scores; of equals the lower index ranks first.

    Args:
        scores: (N, C), floating; nan is the highest, as for ``argmax``.
        target: class indices (N,), int64, in 0..C-1.
        k: from 1.

    Returns:
        bool tensor of shape (N,).
    """
    scores = scores.nan_to_num(math.inf, math.inf, -math.inf)
    own = scores.gather(1, target[:, None])
    before = torch.arange(scores.shape[1], device=scores.device) < target[:, None]
    return ((scores > own) | ((scores == own) & before)).sum(dim=1) < k


def class_f1(correct: Tensor, total: Tensor, predicted: Tensor) -> Tensor:
    """The F1 of each class, 2 TP / (N + P); nan for a class that occurs neither in the targets nor in the predictions.

    Args:
        correct: samples of each class that were predicted as it (C,).
        total: samples of each class (C,).
        predicted: samples that were predicted as each class (C,).
    """
    return 2 * correct / (total + predicted)
