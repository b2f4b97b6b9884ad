"""Accuracies on other test distributions, against weighted and drawn test sets."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score

from imbsam.errors import SettingError
from imbsam.group_names import TEST_DISTRIBUTIONS
from imbsam.label_shift import expected_accuracy, long_tailed_shares, shifted_accuracies

COUNTS = [3, 500, 40, 40, 120, 7]
ORDER = [1, 4, 2, 3, 5, 0]  # from the most training samples to the fewest; 2 and 3 are equal


@pytest.mark.parametrize("ratio", [1, 2, 50])
def test_shares_fall_exponentially_from_the_most_frequent_class_and_back(ratio):
    powers = np.array([ratio ** (-rank / 5) for rank in range(6)])
    powers[2:4] = powers[2:4].mean()
    forward = long_tailed_shares(COUNTS, ratio)[ORDER]
    assert forward.numpy() == pytest.approx(powers / powers.sum(), rel=1e-12)
    assert forward[0] / forward[-1] == pytest.approx(ratio)
    backward = long_tailed_shares(COUNTS, ratio, backward=True)[ORDER]
    powers = np.array([ratio ** (-rank / 5) for rank in reversed(range(6))])
    powers[2:4] = powers[2:4].mean()
    assert backward.numpy() == pytest.approx(powers / powers.sum(), rel=1e-12)


def test_equal_counts_have_equal_shares():
    assert long_tailed_shares([9] * 7, 50, backward=True).numpy() == pytest.approx(np.full(7, 1 / 7))
    assert long_tailed_shares([4], 50).tolist() == [1.0]


def test_it_is_scikit_learns_weighted_accuracy_and_what_drawn_test_sets_give():
    random = np.random.default_rng(0)
    target = np.repeat(np.arange(6), [50, 20, 30, 40, 10, 25])  # the test set itself need not be balanced
    predicted = np.where(random.random(len(target)) < np.linspace(0.3, 0.9, 6)[target], target, (target + 1) % 6)
    recalls = torch.tensor([(predicted[target == c] == c).mean() for c in range(6)])
    found = shifted_accuracies(COUNTS, recalls)
    assert tuple(found) == TEST_DISTRIBUTIONS
    for name, accuracy in found.items():
        direction, ratio = name.split("_")
        shares = long_tailed_shares(COUNTS, float(ratio), direction == "backward").numpy()
        weights = (shares / np.bincount(target))[target]
        assert float(accuracy) == pytest.approx(accuracy_score(target, predicted, sample_weight=weights), abs=1e-12)
    drawn = random.choice(len(target), 200_000, p=weights / weights.sum())
    assert (predicted == target)[drawn].mean() == pytest.approx(float(found["backward_50"]), abs=0.005)
    assert float(found["forward_50"]) != pytest.approx(float(found["backward_50"]), abs=0.05)


def test_the_shares_of_classes_without_test_samples_go_to_the_others():
    recalls = torch.tensor([0.2, torch.nan, 0.8])
    assert float(expected_accuracy(recalls, torch.tensor([0.1, 0.6, 0.3]))) == pytest.approx(0.65)
    assert expected_accuracy(torch.full((3,), torch.nan), torch.ones(3)).isnan()


@pytest.mark.parametrize("ratio", [0.5, float("nan"), float("inf")])
def test_a_ratio_below_one_is_refused(ratio):
    with pytest.raises(SettingError, match="ratio is"):
        long_tailed_shares(COUNTS, ratio)
