"""Calibration maps against scikit-learn's, and on awkward validation parts."""

import math

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from imbsam import SettingError
from imbsam.calibration import fit_isotonic, fit_temperature, fit_vector_scaling
from imbsam.calibration_metrics import calibration_by_group


class Given(ClassifierMixin, BaseEstimator):
    """A classifier whose decision function is its input."""

    def fit(self, x, y):
        self.classes_ = np.unique(y)
        return self

    def decision_function(self, x):
        return x

    def predict(self, x):
        return self.classes_[x.argmax(1)]

    def __sklearn_is_fitted__(self):
        return True


def drawn(seed=0, samples=400, classes=3, confidence=3.0):
    """Labels drawn from a softmax, and overconfident logits of it."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return confidence * logits, labels


def test_temperature_is_scikit_learns():
    logits, labels = drawn()
    found = fit_temperature(logits, labels, penalty=0)
    assert fit_temperature(logits, labels).temperature == pytest.approx(found.temperature, rel=0.02), "many samples"
    assert found.temperature == pytest.approx(3.0, rel=0.15), "the confidence that was put in"
    given = FrozenEstimator(Given().fit(logits.numpy(), labels.numpy()))
    theirs = CalibratedClassifierCV(given, method="temperature").fit(logits.numpy(), labels.numpy())
    np.testing.assert_allclose(found(logits).exp().numpy(), theirs.predict_proba(logits.numpy()), atol=1e-5)


@pytest.mark.parametrize("logits", [[[5.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [3.0, 3.0]]], ids=["all right", "all equal"])
def test_a_log_loss_without_a_minimum_does_not_freeze(logits):
    labels = torch.tensor([0, 1])
    assert fit_temperature(torch.tensor(logits), labels, penalty=0).temperature == 1.0
    own = fit_temperature(torch.tensor(logits), labels)
    grid = np.exp(np.linspace(-2, 1, 30_001))
    values = [
        float(torch.nn.functional.cross_entropy(torch.tensor(logits) / t, labels)) + np.log(t) ** 2 / 4
        for t in grid[::10]
    ]
    assert own.temperature == pytest.approx(grid[::10][int(np.argmin(values))], rel=2e-3)


def test_useless_scores_become_uniform_and_not_nan():
    generator = torch.Generator().manual_seed(0)
    logits, labels = 50 * torch.randn(300, 4, generator=generator), torch.randint(4, (300,), generator=generator)
    probabilities = fit_temperature(logits, labels)(logits).exp()
    assert float(probabilities.max()) < 0.5


def test_vector_scaling_of_two_classes_is_logistic_regression():
    """Without the penalty: softmax(w f + b) of two classes is a logistic function of f_1 and -f_0."""
    logits, labels = drawn(1, classes=2)
    found = fit_vector_scaling(logits, labels, penalty=0.0)
    features = torch.stack([logits[:, 1], -logits[:, 0]], dim=1).numpy()
    theirs = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000).fit(features, labels.numpy())
    np.testing.assert_allclose(found(logits).exp().numpy(), theirs.predict_proba(features), atol=1e-5)


def test_vector_scaling_is_the_least_penalized_log_loss():
    """Also where a class has one sample and every sample is right, and no other parameters are better."""
    logits, labels = torch.eye(3, dtype=torch.float64)[[0, 0, 0, 1, 1, 2]] * 4, torch.tensor([0, 0, 0, 1, 1, 2])
    found = fit_vector_scaling(logits, labels)

    def objective(scale, bias):
        own = log_loss(labels, (scale * logits + bias).softmax(1).numpy())
        return own + float((scale - 1).square().sum() + bias.square().sum()) / 12

    best, random = objective(found.scale, found.bias), torch.Generator().manual_seed(0)
    for _ in range(50):
        step = 0.05 * torch.randn(2, 3, generator=random, dtype=torch.float64)
        assert objective(found.scale + step[0], found.bias + step[1]) >= best - 1e-9
    assert best < objective(torch.ones(3), torch.zeros(3))


def test_a_class_without_validation_samples():
    logits, labels = drawn(2)
    logits = torch.cat([logits, torch.zeros(len(logits), 2, dtype=torch.float64)], dim=1)
    assert math.isfinite(fit_temperature(logits, labels).temperature)
    with pytest.raises(SettingError, match=r"method is vector: 2 of 5 classes have no .* \(owl, yak\): set it to temp"):
        fit_vector_scaling(logits, labels, class_names=["ant", "bee", "cat", "owl", "yak"])


@pytest.mark.parametrize("case", ["continuous", "ties", "one positive", "all equal", "reversed"])
def test_isotonic_is_scikit_learns_within_its_bounds(case):
    random = np.random.default_rng(3)
    scores = random.normal(size=200)
    labels = (random.random(200) < 1 / (1 + np.exp(-3 * scores))).astype(int)
    if case == "ties":
        scores = scores.round()
    elif case == "one positive":
        labels = (np.arange(200) == scores.argmax()).astype(int)
    elif case == "all equal":
        scores = np.zeros(200)
    elif case == "reversed":
        labels = (scores < 0).astype(int)
    found = fit_isotonic(torch.from_numpy(scores), torch.from_numpy(labels))
    new = np.concatenate([random.normal(size=100), [-99.0, 99.0]])
    theirs = IsotonicRegression(out_of_bounds="clip").fit(scores, labels).predict(new).clip(1 / 202, 201 / 202)
    ours = found(torch.from_numpy(new)).exp()
    # between two points scikit-learn's are interpolated before they are cut, ours after
    at_points = np.isin(new, scores) | (np.abs(new) == 99)
    np.testing.assert_allclose(ours[:, 1].numpy()[at_points], theirs[at_points], atol=1e-12)
    assert float(np.abs(ours[:, 1].numpy() - theirs).max()) < 1 / 200
    torch.testing.assert_close(ours.sum(1), torch.ones(102, dtype=torch.float64))
    assert math.isfinite(float(-found(torch.from_numpy(new)).min())), "no probability of 0"


@pytest.mark.parametrize(("label", "what"), [(0, "positive"), (1, "negative")])
def test_isotonic_of_one_class_is_one_line(label, what):
    with pytest.raises(SettingError, match=f"no {what} among 5 samples: raise data.val_share"):
        fit_isotonic(torch.arange(5.0), torch.full((5,), label))


@pytest.mark.parametrize("fit", [fit_temperature, fit_vector_scaling])
def test_a_diverged_model_and_an_empty_part_are_one_line(fit):
    with pytest.raises(SettingError, match="not finite"):
        fit(torch.tensor([[math.nan, 0.0]]), torch.tensor([0]))
    with pytest.raises(SettingError, match="no sample to calibrate on"):
        fit(torch.zeros(0, 2), torch.zeros(0).long())


def test_errors_by_group_are_those_of_the_definition():
    logits, labels = drawn(4)
    probabilities = logits.softmax(1)
    masks = {"first": torch.tensor([True, False, False]), "rest": torch.tensor([False, True, True])}
    found = calibration_by_group(probabilities, labels, {**masks, "none": torch.zeros(3, dtype=torch.bool)})
    for name, mask in masks.items():
        p, y = probabilities[mask[labels]].numpy(), labels[mask[labels]].numpy()
        assert found[name]["log_loss"] == pytest.approx(log_loss(y, p, labels=[0, 1, 2]), rel=1e-6)
        confidence, right = p.max(1), p.argmax(1) == y
        index = np.minimum((confidence * 15).astype(int), 14)
        error = sum(
            (index == b).mean() * abs(right[index == b].mean() - confidence[index == b].mean()) for b in set(index)
        )
        assert found[name]["ece"] == pytest.approx(error, abs=1e-5)
    assert math.isnan(found["none"]["ece"])
