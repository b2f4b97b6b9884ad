"""Average precision of classes and class groups, against scikit-learn."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from imbsam.errors import SettingError
from imbsam.multilabel_metrics import ClassGroupAveragePrecision

COUNTS = [300, 200, 50, 10, 4]
RANDOM = np.random.default_rng(0)


def targets(samples=60):
    return torch.from_numpy((RANDOM.uniform(size=(samples, 5)) < [0.6, 0.4, 0.2, 0.1, 0.05]).astype(int))


def expected(logits, target):
    """nan for a class that does not occur."""
    return [
        average_precision_score(target[:, j], logits[:, j]) if target[:, j].any() else np.nan
        for j in range(target.shape[1])
    ]


SCORES = {
    "continuous": RANDOM.normal(size=(60, 5)),
    "ties": RANDOM.integers(-2, 3, size=(60, 5)).astype(float),
    "all equal": np.zeros((60, 5)),
    "confident": 20 + RANDOM.normal(size=(60, 5)),
    "in [0, 1], as probabilities would be": RANDOM.uniform(size=(60, 5)),
}


@pytest.mark.parametrize("absent", [[], [4], [2, 3, 4], [0]], ids=str)
@pytest.mark.parametrize("scores", SCORES)
def test_every_class_and_group_is_scikit_learns(scores, absent):
    logits, target = torch.from_numpy(SCORES[scores]).float(), targets()
    target[:, absent] = 0
    metric = ClassGroupAveragePrecision(COUNTS, many=100, few=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for part in (slice(0, 7), slice(7, 7), slice(7, 60)):  # one of them empty
            metric.update(logits[part], target[part])
        found = metric.compute()
    wanted = np.array(expected(logits.numpy(), target.numpy()))
    np.testing.assert_allclose(metric.per_class(), wanted, rtol=1e-5)
    assert metric.positives().tolist() == target.sum(0).tolist()
    for name, classes in {"many": [0, 1], "medium": [2], "few": [3, 4], "all": range(5)}.items():
        some = wanted[list(classes)]
        mean = np.nan if np.isnan(some).all() else np.nanmean(some)
        np.testing.assert_allclose(found[f"map_{name}"], mean, rtol=1e-5, err_msg=name)


def test_one_class():
    metric = ClassGroupAveragePrecision([7])
    metric.update(torch.tensor([[2.0], [1.0], [0.0]]), torch.tensor([[0], [1], [1]]))
    assert metric.per_class().tolist() == pytest.approx([(1 / 2 + 2 / 3) / 2])


def test_groups():
    metric = ClassGroupAveragePrecision(COUNTS, many=100, few=20)
    assert metric.group_of_class == ["many", "many", "medium", "few", "few"]
    assert metric.limits["few"] == "< 20"
    assert metric.masks["all"].all()


def test_shapes_are_checked():
    metric = ClassGroupAveragePrecision(COUNTS)
    with pytest.raises(SettingError, match=r"preds has shape \(3, 5\) and target \(3,\)"):
        metric.update(torch.zeros(3, 5), torch.zeros(3))
