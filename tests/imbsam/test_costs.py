"""Decisions by cost against the closed form and brute force."""

import math

import pytest
import torch

from imbsam import SettingError
from imbsam.costs import cheapest_decision, check_costs, realised_costs


def test_two_classes_have_elkans_threshold():
    costs = [[-1.0, 4.0], [30.0, 2.0]]  # true class, decision
    threshold = (4 - -1) / (4 - -1 + 30 - 2)
    p = torch.linspace(0, 1, 1001, dtype=torch.float64)
    decided = cheapest_decision(torch.stack([1 - p, p], dim=1), costs)
    assert decided.tolist() == (p > threshold).int().tolist()


def test_a_look_is_for_those_who_would_cost_more():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(200, 3, generator=generator, dtype=torch.float64).softmax(1)
    costs = torch.tensor([[0.0, 1, 5], [2, 0, 1], [9, 3, 0]])
    decided = cheapest_decision(p, costs, look_cost=0.8)
    for row, decision in zip(p.tolist(), decided.tolist(), strict=True):
        expected = [sum(row[j] * float(costs[j, k]) for j in range(3)) for k in range(3)]
        assert decision == (3 if min(expected) > 0.8 else expected.index(min(expected)))
    assert 0 < int((decided == 3).sum()) < 200
    labels = torch.multinomial(p, 1, generator=generator).squeeze(1)
    with_look, without = (realised_costs(cheapest_decision(p, costs, c), labels, costs, c).mean() for c in (0.8, None))
    assert with_look < without, "the probabilities are the true ones"


@pytest.mark.parametrize(
    "costs", [[[0, 1]], [[0, 1], [1, 0], [1, 1]], [[0, 1], [1]], [[0, math.nan], [1, 0]], [0, 1], [["a", "b"], [1, 2]]]
)
def test_costs_that_are_no_matrix_of_the_classes_are_one_line(costs):
    with pytest.raises(SettingError, match=r"^costs is .*: give 2 rows \(true class\) of 2 finite numbers") as caught:
        check_costs(costs, 2)
    assert "\n" not in str(caught.value)
