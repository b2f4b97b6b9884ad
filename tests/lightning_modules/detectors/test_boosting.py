"""The booster's trees as tensors: the scores and losses are scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import log_loss

from imbsam import SettingError
from lightning_modules.detectors import Boosting

SMALL = {"trees": 12, "max_leaf_nodes": 7}


@pytest.fixture(scope="module")
def rows():
    """600 samples with a column of small integers, one of adjacent float32 numbers and a constant one."""
    random = np.random.default_rng(0)
    x = random.normal(size=(600, 4)).astype(np.float32)
    x[:, 1] = random.integers(0, 4, 600)
    x[:, 2] = np.where(random.random(600) < 0.5, np.float32(0.1), np.nextafter(np.float32(0.1), np.float32(1)))
    x[:, 3] = 1.0
    y = (x[:, 0] + x[:, 1] + (x[:, 2] > 0.1) + 0.5 * random.normal(size=600) > 3.5).astype(np.int64)
    return torch.from_numpy(x), torch.from_numpy(y)


def built(rows, **settings):
    detector = Boosting((4,), **SMALL, **settings)
    detector.prepare(*rows)
    return detector


@pytest.mark.parametrize("weighted", [False, True])
def test_each_step_is_a_stage_of_the_booster(weighted, rows):
    x, labels = rows
    detector = built(rows, weighted=weighted)
    booster = HistGradientBoostingClassifier(
        max_iter=12, max_leaf_nodes=7, class_weight="balanced" if weighted else None, early_stopping=False
    ).fit(x.numpy(), labels.numpy())
    assert detector.scores(x).unique().numel() == 1, "no tree yet"
    weight = (len(x) / (2 * labels.bincount()))[labels] if weighted else None
    for stage, scores in enumerate(booster.staged_decision_function(x.numpy()), start=1):
        assert not detector.finished
        detector.advance()
        torch.testing.assert_close(detector.scores(x), torch.as_tensor(scores).float(), rtol=1e-5, atol=1e-5)
        if stage in (1, 12):
            expected = log_loss(labels, 1 / (1 + np.exp(-scores)), sample_weight=weight)
            assert float(detector.losses(x, labels).mean()) == pytest.approx(expected, rel=1e-4)
    assert detector.finished
    detector.advance()
    assert int(detector.used) == 12
    torch.testing.assert_close(detector.double().scores(x.double()).float(), torch.as_tensor(scores).float())


def test_the_scores_survive_a_state_dict(rows):
    detector = built(rows)
    detector.advance()
    restored = Boosting((4,), **SMALL)
    restored.load_state_dict(detector.state_dict())
    assert torch.equal(restored.scores(rows[0]), detector.scores(rows[0]))


def test_trees_that_scikit_learn_keeps_otherwise_are_refused(rows):
    """An unfitted booster has none of the names; the trees of another booster have other scores."""
    x, labels = rows
    detector = built(rows)
    with pytest.raises(SettingError, match=r"detector is Boosting, and scikit-learn .* keeps its trees in a way"):
        detector._copy(HistGradientBoostingClassifier())
    with pytest.raises(SettingError, match="keeps its trees in a way"):
        detector._check(HistGradientBoostingClassifier(max_iter=3).fit(x.numpy(), labels.numpy()), x)


def test_bad_input_is_one_line(rows):
    x, labels = rows
    for settings, message in (
        ({"trees": 0}, "trees is 0"),
        ({"max_leaf_nodes": 1}, "max_leaf_nodes is 1"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"l2_regularization": -1}, "l2_regularization is -1"),
    ):
        with pytest.raises(SettingError, match=message):
            Boosting((4,), **settings)
    with pytest.raises(SettingError, match="Boosting, which takes tables"):
        Boosting((1, 8, 8))
    with pytest.raises(SettingError, match=r"no labelled anomaly: raise data.labelled_share"):
        Boosting((4,)).prepare(x, torch.zeros_like(labels))
    with pytest.raises(SettingError, match="bfloat16, too coarse for trees: set it to 32-true"):
        built(rows).scores(x.bfloat16())
