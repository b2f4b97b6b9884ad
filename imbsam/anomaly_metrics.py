"""Ranking metrics of anomaly scores, and the precision and recall of a budget of alarms."""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_precision_recall_curve,
)
from torchmetrics.functional.retrieval import retrieval_precision, retrieval_recall
from torchmetrics.utilities import dim_zero_cat

from imbsam.errors import SettingError


class AnomalyMetrics(Metric):
    """AUROC, average precision, and precision and recall of the highest scores, by torchmetrics.

    torchmetrics passes scores outside [0, 1] through a sigmoid, which turns every large score, such as a distance, into
    1. So the scores are ranked first, ties kept, and the metrics are computed from the ranks.

    :meth:`compute` gives ``auroc``, ``average_precision``, and ``budget_precision`` and ``budget_recall`` of the
    ``budget`` highest scores, all in [0, 1]; nan if there are only normal samples or only anomalies.

    Args:
        budget: alarms that can be inspected: a number from 1, or a fraction of the samples below 1. Default: as many as
            there are anomalies (precision and recall are then the same).

    Example:
        >>> metrics = AnomalyMetrics(budget=2)
        >>> metrics.update(torch.tensor([50.0, -1.0, 30.0, 40.0]), torch.tensor([1, 0, 1, 0]))
        >>> {name: round(float(value), 3) for name, value in metrics.compute().items()}
        {'auroc': 0.75, 'average_precision': 0.833, 'budget_precision': 0.5, 'budget_recall': 0.5}
    """

    full_state_update = False
    scores: list[Tensor]
    labels: list[Tensor]

    def __init__(self, budget: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if budget is not None and not (0 < budget < 1 or (budget >= 1 and float(budget).is_integer())):
            raise SettingError(f"budget is {budget}: give a whole number, or a fraction of the samples below 1")
        self.budget = budget
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Add scores (B,), higher is more anomalous, and labels (B,), 1 for anomalies."""
        if not scores.isfinite().all():
            raise SettingError(
                "the detector's scores are not finite: training diverged; lower the learning rate or rho"
            )
        self.scores.append(scores.detach())
        self.labels.append(labels.long())

    def compute(self) -> dict[str, Tensor]:
        """The four metrics of all samples since the last reset."""
        scores, labels = dim_zero_cat(self.scores), dim_zero_cat(self.labels)
        names = ("auroc", "average_precision", "budget_precision", "budget_recall")
        if not 0 < int(labels.sum()) < len(labels):
            return dict.fromkeys(names, torch.tensor(math.nan))
        ranks = _ranks(scores)
        alarms = self.alarms(len(labels), int(labels.sum()))
        return {
            "auroc": binary_auroc(ranks, labels),
            "average_precision": binary_average_precision(ranks, labels),
            "budget_precision": retrieval_precision(ranks, labels, top_k=alarms),
            "budget_recall": retrieval_recall(ranks, labels, top_k=alarms),
        }

    def alarms(self, samples: int, anomalies: int) -> int:
        """The budget as a number of samples."""
        if self.budget is None:
            return anomalies
        return min(samples, max(1, round(self.budget * samples) if self.budget < 1 else int(self.budget)))

    def best_threshold(self) -> float:
        """The threshold on the score with the best F1 on these samples; nan if there is none."""
        scores, labels = dim_zero_cat(self.scores), dim_zero_cat(self.labels)
        if not 0 < int(labels.sum()) < len(labels):
            return math.nan
        precision, recall, thresholds = binary_precision_recall_curve(_ranks(scores), labels)
        f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
        return float(scores[_ranks(scores) >= thresholds[f1[:-1].argmax()]].min())


def _ranks(scores: Tensor) -> Tensor:
    """Ranks in [0, 1], float64: the same order, equal scores stay equal."""
    ranks: Tensor = torch.unique(scores, return_inverse=True)[1].double()
    return ranks / ranks.max().clamp(min=1)
