"""The prior correction against a posterior that is counted, of a model trained to its minimum."""

import pytest
import torch

from imbsam import SettingError
from imbsam.losses import LogitAdjusted, VectorScaling
from imbsam.prior_correction import class_prior, move_prior, prior_shift

COUNTS = torch.tensor([700, 200, 100])
LIKELIHOOD = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]], dtype=torch.float64)
"""p(x | j) of three classes (rows) and three values of x (columns)."""


def trained(loss, drawn, weight):
    """Logits (x, class) of the least weighted loss on samples drawn with these shares."""
    logits = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    x, y = torch.cartesian_prod(torch.arange(3), torch.arange(3)).unbind(1)
    mass = drawn[y] * LIKELIHOOD[y, x] * weight[y]
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        total = (mass * loss(logits[x], y)).sum()
        total.backward()
        return total

    optimizer.step(closure)
    return logits.detach()


def posterior(prior):
    joint = prior[:, None] * LIKELIHOOD
    return (joint / joint.sum(0)).T


@pytest.mark.parametrize("prior", ["training", "balanced", [0.2, 0.3, 0.5]])
@pytest.mark.parametrize("tau", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("weight", [[1.0, 1.0, 1.0], [1.0, 2.0, 5.0]])
def test_the_trained_model_gives_the_posterior(prior, tau, balanced, weight):
    weight, natural = torch.tensor(weight, dtype=torch.float64), COUNTS / COUNTS.sum().double()
    drawn = torch.full((3,), 1 / 3, dtype=torch.float64) if balanced else natural
    logits = trained(LogitAdjusted(COUNTS, tau=tau), drawn, weight)
    shift = prior_shift(COUNTS, prior, drawn_shares=drawn, class_weight=weight, tau=tau)
    wanted = {"training": natural, "balanced": torch.full((3,), 1 / 3, dtype=torch.float64)}
    target = wanted[prior] if isinstance(prior, str) else torch.tensor(prior, dtype=torch.float64)
    torch.testing.assert_close((logits + shift).softmax(1), posterior(target), atol=1e-4, rtol=0)


def test_a_loss_that_scales_the_logits_is_corrected_after_the_scale():
    natural = COUNTS / COUNTS.sum().double()
    logits = trained(VectorScaling(COUNTS, gamma=0.3, tau=1.0), natural, torch.ones(3))
    scale = (COUNTS / COUNTS.max()).double() ** 0.3
    found = (scale * logits + prior_shift(COUNTS, "training", tau=1.0)).softmax(1)
    torch.testing.assert_close(found, posterior(natural), atol=1e-4, rtol=0)


def test_moving_the_prior_is_bayes():
    natural, other = COUNTS / COUNTS.sum().double(), torch.tensor([0.1, 0.1, 0.8], dtype=torch.float64)
    torch.testing.assert_close(move_prior(posterior(natural).log(), natural, other).exp(), posterior(other))


def test_a_class_without_samples_counts_as_one():
    assert prior_shift([9, 0], drawn_shares=[1.0, 0.0]).isfinite().all()
    torch.testing.assert_close(class_prior("training", [9, 0]), torch.tensor([0.9, 0.1], dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prior": "natural"}, "prior is 'natural': give training, balanced"),
        ({"prior": [0.5, 0.5]}, r"prior is \[0.5, 0.5\]: give a share above 0 for each class \(3\)"),
        ({"class_weight": [1, 0, 1]}, r"class_weight is \[1.0, 0.0, 1.0\]: give a number above 0"),
    ],
)
def test_a_wrong_prior_is_one_line(settings, message):
    with pytest.raises(SettingError, match=message):
        prior_shift(COUNTS, **settings)
