"""Thresholds against scikit-learn's curve and brute force, and their promises against new samples."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import beta, binom, norm
from sklearn.metrics import precision_recall_curve

from imbsam import SettingError
from imbsam.intervals import clopper_pearson, mean_interval
from imbsam.thresholds import choose_threshold, decide

WANTED = [("recall", 0.8), ("precision", 0.6), ("false_alarms", 60)]


def tied(seed, samples=120, positives=20):
    random = np.random.default_rng(seed)
    labels = np.arange(samples) < positives
    scores = (random.normal(size=samples) + 1.5 * labels).round(1)
    return torch.from_numpy(scores), torch.from_numpy(labels)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("wanted", "goal"), WANTED)
def test_no_other_threshold_meets_the_goal_better(seed, wanted, goal):
    scores, labels = tied(seed)
    found = choose_threshold(scores, labels, wanted, goal)
    precision, recall, values = precision_recall_curve(labels.numpy(), scores.numpy())
    at = int(np.flatnonzero(values == found.value)[0])
    assert found.recall == pytest.approx(recall[at])
    assert found.precision == pytest.approx(precision[at])
    false_alarms = np.array([1000 * ((scores.numpy() >= v) & ~labels.numpy()).sum() / 100 for v in values])
    assert found.false_alarms_per_thousand == pytest.approx(false_alarms[at])
    met = {"recall": recall[:-1] >= goal, "precision": precision[:-1] >= goal, "false_alarms": false_alarms <= goal}
    meeting = values[met[wanted]]
    assert found.value == (meeting.max() if wanted == "recall" else meeting.min())


def test_one_positive():
    scores, labels = torch.tensor([0.1, 0.7, 0.7, 0.9]), torch.tensor([0, 1, 0, 0])
    found = choose_threshold(scores, labels, "recall", 0.5)
    assert (found.value, found.recall, found.true_alarms, found.false_alarms) == (pytest.approx(0.7), 1.0, 1, 2)
    assert found.recall_interval == pytest.approx((0.025, 1.0))


def test_whole_shares_are_met_in_floating_point():
    """0.7 of 10 positives are 7: 0.7 * 10 is 7.000000000000001 in a lesser library."""
    for k in range(1, 11):
        scores = torch.cat([torch.arange(10.0, 0.0, -1), torch.zeros(5)])
        found = choose_threshold(scores, torch.arange(15) < 10, "recall", k / 10)
        assert found.true_alarms == k


def test_all_scores_equal():
    scores, labels = torch.full((10,), 0.5), torch.arange(10) < 2
    assert choose_threshold(scores, labels, "recall", 0.1).false_alarms == 8
    with pytest.raises(SettingError, match=r"false_alarms is 5: 8 of 8 negatives share the highest score.* 1000 per"):
        choose_threshold(scores, labels, "false_alarms", 5)
    with pytest.raises(
        SettingError, match=r"precision is 0.5: the best on the validation part is 0.2 \(2 of 10 alarms"
    ):
        choose_threshold(scores, labels, "precision", 0.5)


def test_the_best_precision_that_can_be_is_named():
    scores, labels = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), torch.tensor([0, 1, 1, 0, 0])
    with pytest.raises(SettingError, match=r"best .* is 0.667 \(2 of 3 alarms, recall 1\), since negatives are among"):
        choose_threshold(scores, labels, "precision", 0.9)


@pytest.mark.parametrize("label", [0, 1])
def test_an_absent_class_is_one_line(label):
    with pytest.raises(SettingError, match=r"recall is 0.9: there is no (positive|negative) among the 4 validation"):
        choose_threshold(torch.arange(4.0), torch.full((4,), label), "recall", 0.9)


@pytest.mark.parametrize(("wanted", "goal"), [("recall", 0), ("precision", 1.1), ("false_alarms", -1), ("recal", 0.5)])
def test_a_goal_out_of_range_is_one_line(wanted, goal):
    with pytest.raises(SettingError, match=f"(wanted )?is '?{goal if wanted != 'recal' else wanted}"):
        choose_threshold(torch.arange(4.0), torch.tensor([0, 1, 0, 1]), wanted, goal)


def test_clopper_pearson_is_the_beta_law():
    for successes, trials in [(0, 7), (3, 7), (7, 7), (1, 1)]:
        low, high = clopper_pearson(successes, trials, 0.9)
        assert low == pytest.approx(beta.ppf(0.05, successes, trials - successes + 1) if successes else 0)
        assert high == pytest.approx(beta.ppf(0.95, successes + 1, trials - successes) if successes < trials else 1)
    assert clopper_pearson(0, 0) == (0.0, 1.0)


def test_the_mean_of_costs_is_covered():
    """Rare high costs, 200 draws: the percentile bootstrap is a little short of its 95 %."""
    random, inside = np.random.default_rng(0), 0
    for seed in range(200):
        costs = torch.from_numpy(np.where(random.random(300) < 0.1, 20.0, 1.0))
        low, high = mean_interval(costs, seed=seed)
        inside += low <= 2.9 <= high
    assert inside >= 180


@pytest.mark.parametrize(("wanted", "goal"), [("recall", 0.8), ("false_alarms", 50), ("precision", 0.7)])
@pytest.mark.parametrize("positives", [10, 40])
def test_the_promise_holds_as_often_as_it_says(wanted, goal, positives, monkeypatch):
    """200 validation parts of known laws: what the threshold does on new samples is known exactly."""
    monkeypatch.setattr("imbsam.thresholds.RESAMPLES", 300)
    random, inside, promises = np.random.default_rng(positives), 0, 0
    share, labels = positives / 400, np.arange(400) < positives
    while promises < 200:
        scores = random.normal(size=400) + 2.5 * labels
        try:
            found = choose_threshold(torch.from_numpy(scores), torch.from_numpy(labels), wanted, goal, seed=promises)
        except SettingError:  # nothing is promised
            continue
        promises += 1
        recall, false = norm.sf(found.value - 2.5), norm.sf(found.value)
        if wanted == "recall":
            true, interval = recall, found.recall_interval
        elif wanted == "false_alarms":
            true, interval = 1000 * false, found.false_alarms_interval
        else:
            true, interval = recall * share / (recall * share + false * (1 - share)), found.precision_interval
        inside += interval[0] <= true <= interval[1]
    assert inside >= binom.ppf(0.001, 200, 0.95), f"{inside} of 200"


def test_the_decision_of_several_thresholds():
    nan = math.nan
    p = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.45, 0.05], [0.2, 0.2, 0.6]])
    assert decide(p, torch.tensor([nan, 0.4, nan])).tolist() == [0, 1, 2], "0.45 is an alarm, though 0.5 is more"
    assert decide(p, torch.tensor([nan, 0.3, 0.1])).tolist() == [2, 1, 2], "twice its threshold is more than once"
    assert decide(p, torch.tensor([0.6, 0.6, 0.5])).tolist() == [-1, -1, 2], "nobody, and somebody is to look"
    assert decide(p, torch.tensor([nan, nan, nan])).tolist() == [0, 0, 2]
