"""The coverage of conformal sets: by simulation, for every class, and for one validation part."""

import numpy as np
import pytest
import torch
from scipy.stats import binom

from imbsam import SettingError
from imbsam.conformal import fit_conformal

SHIFT = np.array([[2.0, 0, 0], [0, 1.0, 0], [0, 0, 0.3]])  # the rare class is the hard one
SAMPLES = [300, 60, 25]


def drawn(random, samples):
    labels = np.repeat(np.arange(3), samples)
    logits = random.normal(size=(len(labels), 3)) + SHIFT[labels]
    return torch.from_numpy(logits).softmax(1), torch.from_numpy(labels)


def test_every_class_is_covered_and_marginal_sets_would_not_do():
    """200 validation parts and 3,000 new samples each; the wanted coverage is 90 %."""
    random = np.random.default_rng(0)
    covered, inside, marginal = np.zeros(3), np.zeros(3, dtype=int), np.zeros(3)
    new, new_labels = drawn(random, [1000] * 3)
    for _ in range(200):
        p, labels = drawn(random, SAMPLES)
        sets = fit_conformal(p, labels, 0.9)
        members = sets(new)
        own = p.gather(1, labels[:, None]).squeeze(1).sort().values
        limit = own[int(0.1 * (len(own) + 1)) - 1]
        for c in range(3):
            share = float(members[new_labels == c, c].double().mean())
            low, high = sets.interval(c)
            covered[c] += share / 200
            inside[c] += low - 0.01 <= share <= high + 0.01  # 1,000 new samples are not the law itself
            marginal[c] += float((new[new_labels == c, c] >= limit).double().mean()) / 200
    # a fixed set of new samples: their mean coverage is off the law's by 0.01 (1,000 samples) at most three times
    assert (covered > 0.87).all(), covered
    assert (inside >= binom.ppf(0.001, 200, 0.95)).all(), inside
    assert marginal[2] < 0.8, "without classes the rare one pays"


def test_the_limit_is_the_kth_smallest():
    random = np.random.default_rng(1)
    scores = torch.from_numpy(random.random(19))
    conformity = torch.stack([scores, torch.zeros(19, dtype=torch.float64)], dim=1)
    sets = fit_conformal(conformity, torch.zeros(19).long(), 0.9)
    assert float(sets.limits[0]) == float(np.sort(scores.numpy())[1]), "k = 0.1 * 20 = 2"


@pytest.mark.parametrize(("samples", "coverage", "always"), [(8, 0.9, True), (9, 0.9, False), (0, 0.5, True)])
def test_a_class_with_too_few_samples_is_in_every_set(samples, coverage, always):
    conformity = torch.linspace(0, 1, 50)[:, None].expand(50, 2)
    sets = fit_conformal(conformity, (torch.arange(50) < samples).long(), coverage)
    assert bool(sets(torch.tensor([[1.0, -9.0]]))[0, 1]) is always
    assert (sets.interval(1) == (1.0, 1.0)) is always


def test_ties_are_covered_together():
    conformity = torch.tensor([0.5] * 19 + [0.9])[:, None].expand(20, 2)
    sets = fit_conformal(conformity, torch.zeros(20).long(), 0.5)
    assert sets(conformity)[:, 0].all()


@pytest.mark.parametrize("coverage", [0.0, 1.0, 90])
def test_a_coverage_out_of_range_is_one_line(coverage):
    with pytest.raises(SettingError, match=f"coverage is {coverage}: give a number in"):
        fit_conformal(torch.ones(3, 2), torch.zeros(3).long(), coverage)
