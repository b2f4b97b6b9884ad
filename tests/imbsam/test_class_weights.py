import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from imbsam import ImbSAM, SettingError
from imbsam.class_weights import effective_number_weights

COUNTS = [500, 50, 5]


@pytest.mark.parametrize("beta", [0.9, 0.99, 0.9999])
def test_weights_are_the_inverse_effective_numbers(beta):
    """Cui et al., proposition 1 as the sum that it is, 1 + beta + ... + beta^(n-1); their scaling is to a sum of C."""
    inverse = [1 / sum(beta**i for i in range(n)) for n in COUNTS]
    theirs = torch.tensor([len(COUNTS) * w / sum(inverse) for w in inverse], dtype=torch.float64)
    weights = effective_number_weights(COUNTS, beta)
    assert weights.dtype == torch.float64
    assert_close(weights * len(COUNTS) / weights.sum(), theirs, rtol=1e-9, atol=0)


@pytest.mark.parametrize("beta", [0, 0.9, 0.9999])
def test_the_mean_weight_of_the_training_samples_is_1(beta):
    labels = torch.arange(3).repeat_interleave(torch.tensor(COUNTS))
    assert effective_number_weights(COUNTS, beta)[labels].mean().item() == pytest.approx(1)


def test_the_weighted_loss_is_torchs_weighted_mean_over_the_training_set():
    """What the LDAM-DRW code takes of a batch, taken of the whole set."""
    labels = torch.arange(3).repeat_interleave(torch.tensor(COUNTS))
    logits = torch.randn(len(labels), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = effective_number_weights(COUNTS)
    rows = nn.functional.cross_entropy(logits, labels, reduction="none")
    assert_close((weights[labels] * rows).mean(), nn.functional.cross_entropy(logits, labels, weight=7 * weights))


def test_limits_are_no_weights_and_inverse_counts():
    assert effective_number_weights(COUNTS, beta=0).tolist() == [1, 1, 1]
    inverse = effective_number_weights(COUNTS, beta=1 - 1e-9)
    assert_close(inverse, sum(COUNTS) / 3 / torch.tensor(COUNTS).double(), rtol=1e-5, atol=0)


def test_a_class_without_samples_changes_no_other():
    weights = effective_number_weights([500, 0, 5], beta=0.9)
    assert_close(weights[[0, 2]], effective_number_weights([500, 5], beta=0.9))
    assert weights[1] == pytest.approx(weights[0].item() / (1 - 0.9) * (1 - 0.9**500))


@pytest.mark.parametrize("beta", [-0.1, 1.0, math.nan, 2])
def test_bad_beta_is_refused(beta):
    with pytest.raises(SettingError, match=r"beta is .*: give a number in \[0, 1\)"):
        effective_number_weights(COUNTS, beta)


def test_no_samples_are_refused():
    with pytest.raises(SettingError, match="no training sample"):
        effective_number_weights([0, 0])


def test_they_go_to_the_engine():
    engine = ImbSAM(nn.Linear(2, 3), COUNTS, class_weight=effective_number_weights(COUNTS), tail_weight=2.0)
    assert_close(engine.class_weight, effective_number_weights(COUNTS) * torch.tensor([1.0, 1.0, 2.0]).double())
