"""Tests for drift: their p-values against formulas, and how often they alarm on random splits of real predictions."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, chi2_contingency, fisher_exact
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from imbsam import SettingError
from imbsam.drift import bonferroni, score_shift, share_shift, smallest_distance, tail_shift
from lightning_modules.callbacks.drift import compared

SPLITS = 200


@pytest.fixture(scope="module")
def predictions():
    """Probabilities of 1,497 digits by a model trained on 300 others: float32 (1497, 10)."""
    x, y = load_digits(return_X_y=True)
    rows = np.random.default_rng(0).permutation(len(x))
    model = LogisticRegression(max_iter=200).fit(x[rows[:300]] / 16, y[rows[:300]])
    return torch.from_numpy(model.predict_proba(x[rows[300:]] / 16)).float()


def summary(predictions):
    """What a checkpoint keeps."""
    if predictions.ndim == 1:
        return {"scores": predictions, "rows": len(predictions)}
    counts = predictions.argmax(1).bincount(minlength=10)
    names = [str(c) for c in range(10)]
    return {"scores": predictions.max(1).values, "rows": len(predictions), "counts": counts, "names": names}


def alarms(predictions, alpha, changed=lambda new: new):
    """Share of random splits, 400 rows to compare with and 1,000 new ones, with a significant test, and with drift."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(SPLITS):
        rows = torch.randperm(len(predictions), generator=generator)[:1400]
        facts = compared(summary(predictions[rows[:400]]), changed(predictions[rows[400:]]), alpha, 0.1)
        found.append((any(test["significant"] for test in facts["tests"]), facts["drift"]))
    return np.mean(found, axis=0)


@pytest.mark.parametrize("alpha", [0.05, 0.2])
@pytest.mark.parametrize("kind", ["classifier", "detector"])
def test_false_alarms_are_as_rare_as_asked_for(kind, alpha, predictions):
    """Neither more often than alpha, nor hardly ever: within what 200 splits can tell, at 1 in 1,000."""
    values = predictions if kind == "classifier" else predictions[:, 0].logit()
    significant, drift = alarms(values, alpha)
    # the correction for two tests, and their discreteness, cost up to half of alpha
    assert binom.ppf(0.001, SPLITS, alpha / 2) <= SPLITS * significant <= binom.ppf(0.999, SPLITS, alpha)
    assert drift <= significant


def test_shifts_are_found(predictions):
    """Fewer of the sure predictions; another class mix; anomalies twice as many, which the scores' distance misses."""
    flatter = lambda p: (p.log() / 2).softmax(1)  # noqa: E731
    assert alarms(predictions, 0.01, flatter)[1] == 1
    without_two = lambda p: p[(p.argmax(1) != 3) & (p.argmax(1) != 7)]  # noqa: E731
    assert alarms(predictions, 0.01, without_two)[1] == 1
    scores = torch.from_numpy(np.random.default_rng(0).normal(size=4000))
    new = torch.cat([scores[2000:3860], scores[3900:] + 4])
    facts = compared(summary(scores[:2000]), new, 0.01, 0.1)
    assert facts["drift"]
    assert not facts["tests"][0]["material"]
    assert facts["tests"][1]["effect"] == pytest.approx(2, abs=0.35)


def test_what_is_significant_in_a_large_file_and_does_not_matter_is_no_drift():
    scores = torch.from_numpy(np.random.default_rng(0).normal(size=100_000))
    facts = compared(summary(scores[:50_000]), scores[50_000:] + 0.05, 0.01, 0.1)
    assert facts["tests"][0]["significant"]
    assert not facts["drift"]


def test_distance_of_scores_and_the_smallest_that_is_significant():
    random = np.random.default_rng(0)
    old, new = random.normal(size=90), random.normal(0.3, 1.2, size=70)
    places = np.concatenate([old, new])
    ours = score_shift(torch.from_numpy(old), torch.from_numpy(new))
    by_hand = max(abs((old <= place).mean() - (new <= place).mean()) for place in places)
    assert ours.effect == pytest.approx(by_hand)
    limit = smallest_distance(4000, 6000, 0.01)
    at = lambda d: score_shift(torch.arange(4000.0), torch.arange(6000.0) / 1.5 + 4000 * d).p_value  # noqa: E731
    assert at(limit + 0.004) < 0.01 < at(limit - 0.004)


@pytest.mark.parametrize("above", [0, 1, 5])
def test_the_law_of_the_highest_scores(above):
    """Of 30 and 20 rows all orders are as likely: count those with j new rows before the second of the 30."""
    n, m, k = 30, 20, 2
    share = lambda j: math.comb(j + k - 1, j) * math.comb(n - k + m - j, m - j) / math.comb(n + m, m)  # noqa: E731
    below, beyond = sum(map(share, range(above + 1))), sum(map(share, range(above, m + 1)))
    new = torch.cat([torch.full((above,), 28.5), torch.full((m - above,), -1.0)])
    found = tail_shift(torch.arange(30.0), new, share=k / (n + 1))
    assert found.p_value == pytest.approx(min(1, 2 * min(below, beyond)))
    assert found.effect == pytest.approx(above / (m * k / (n + 1)))


def test_equal_scores_are_no_alarm():
    """A saturated score: the highest 5 % are a tie."""
    old, new = torch.zeros(200), torch.zeros(300)
    old[:40], new[:60] = 1, 1
    assert score_shift(old, new).p_value == pytest.approx(1)
    values = [tail_shift(old, new, seed=seed).p_value for seed in range(200)]
    assert np.mean(np.array(values) < 0.05) < 0.1
    assert np.median(values) > 0.2


def test_class_shares_are_those_of_scipy():
    old, new = torch.tensor([500, 300, 200]), torch.tensor([700, 500, 260])
    found = share_shift(old, new)
    expected = chi2_contingency(torch.stack([old, new]).numpy(), correction=False).pvalue
    assert found.p_value == pytest.approx(expected, abs=0.015)
    assert found.effect == pytest.approx(np.abs(np.array([0.5, 0.3, 0.2]) - np.array([700, 500, 260]) / 1460).sum() / 2)
    few = share_shift(torch.tensor([7, 3, 0]), torch.tensor([4, 8, 0]))  # Fisher's, and a class of no rows
    assert few.p_value == pytest.approx(fisher_exact([[7, 3], [4, 8]]).pvalue, abs=0.03)


def test_correction():
    shifts = [tail_shift(torch.arange(9.0), torch.arange(5.0)), score_shift(torch.zeros(40), torch.ones(40))]
    assert bonferroni(shifts) == [1.0, 2 * shifts[1].p_value]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: score_shift(torch.zeros(0), torch.ones(2)), r"reference has shape \(0,\): give finite numbers"),
        (lambda: score_shift(torch.zeros(2), torch.tensor([math.nan])), r"scores has shape \(1,\): give finite"),
        (lambda: tail_shift(torch.zeros(2), torch.ones(2), share=1.5), "share is 1.5"),
        (lambda: score_shift(torch.zeros(2), torch.ones(2), material=0), "material is 0"),
        (lambda: share_shift(torch.ones(2), torch.ones(3)), "reference has 2 classes and counts 3"),
        (lambda: share_shift(torch.ones(2), torch.zeros(2)), "reference or counts has no rows"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(SettingError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
