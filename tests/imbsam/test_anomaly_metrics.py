"""Metrics of anomaly scores against scikit-learn's."""

import math

import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from imbsam import SettingError
from imbsam.anomaly_metrics import AnomalyMetrics


@pytest.fixture
def found():
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(500) < 40).long()
    # the scores of a deviation network: far outside [0, 1], where a sigmoid would make them all 1
    scores = (60 + 10 * torch.randn(500, generator=generator) + 12 * labels).round(decimals=1)
    return scores, labels


def test_as_scikit_learn_in_two_batches(found):
    scores, labels = found
    metrics = AnomalyMetrics(budget=0.1)
    metrics.update(scores[:300], labels[:300])
    metrics.update(scores[300:], labels[300:])
    values = metrics.compute()
    assert float(values["auroc"]) == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    assert float(values["average_precision"]) == pytest.approx(average_precision_score(labels, scores), abs=1e-6)
    hits = int(labels[scores.topk(50).indices].sum())
    assert float(values["budget_precision"]) == pytest.approx(hits / 50, abs=0.021)  # a tie at the border
    assert float(values["budget_recall"]) == pytest.approx(hits / 40, abs=0.026)


def test_threshold_has_the_best_f1(found):
    scores, labels = found
    metrics = AnomalyMetrics()
    metrics.update(scores, labels)
    threshold = metrics.best_threshold()

    def f1(t):
        hits = int(((scores >= t) & (labels == 1)).sum())
        return 2 * hits / (int((scores >= t).sum()) + 40)

    assert f1(threshold) == max(f1(t) for t in scores.tolist())


def test_one_class_only_is_nan():
    metrics = AnomalyMetrics()
    metrics.update(torch.rand(5), torch.zeros(5))
    assert all(math.isnan(value) for value in metrics.compute().values())
    assert math.isnan(metrics.best_threshold())


@pytest.mark.parametrize("budget", [0, -1, 2.5])
def test_wrong_budget(budget):
    with pytest.raises(SettingError, match="budget is"):
        AnomalyMetrics(budget)


def test_scores_that_are_not_finite():
    with pytest.raises(SettingError, match="diverged"):
        AnomalyMetrics().update(torch.tensor([1.0, math.nan]), torch.tensor([0, 1]))
