"""The multi-label losses against their formulas in NumPy, against torch, and at extreme logits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from imbsam.errors import SettingError
from imbsam.multilabel_losses import Asymmetric, BinaryCrossEntropy, DistributionBalanced

COUNTS = [[20, 80], [90, 10], [97, 3]]
Z = torch.tensor([[0.3, -2.0, 1.0], [-0.2, 4.0, -5.0], [2.0, 0.0, -1.0], [0.5, 0.1, 3.0]], dtype=torch.float64)
Y = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0]])
LOSSES = {
    "bce": BinaryCrossEntropy(),
    "asymmetric": Asymmetric(),
    "asymmetric, no margin": Asymmetric(gamma_neg=2.5, gamma_pos=1.5, margin=0.0),
    "asymmetric, roots": Asymmetric(gamma_neg=0.5, gamma_pos=0.5),
    "distribution-balanced": DistributionBalanced(COUNTS),
}


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def asymmetric(z, y, gamma_neg, gamma_pos, margin):
    p = sigmoid(z)
    shifted = np.maximum(p - margin, 0)
    return np.where(y == 1, -((1 - p) ** gamma_pos) * np.log(p), -(shifted**gamma_neg) * np.log(1 - shifted))


def distribution_balanced(z, y, alpha, beta, mu, lam, kappa):
    """Pair by pair, in the words of the paper: class-level and instance-level sampling probabilities."""
    n, samples = np.array(COUNTS)[:, 1], 100
    found = np.empty(z.shape)
    for i in range(len(z)):
        for j in range(3):
            class_level = 1 / 3 / n[j]
            instance_level = sum(1 / 3 / n[k] for k in range(3) if y[i, k])
            weight = alpha + (sigmoid(beta * (class_level / instance_level - mu)) if instance_level else 1)
            shifted = z[i, j] - kappa / lam * np.log(samples / n[j] - 1)
            loss = np.log1p(np.exp(-shifted)) if y[i, j] else np.log1p(np.exp(lam * shifted)) / lam
            found[i, j] = weight * loss
    return found


@pytest.mark.parametrize("settings", [(4, 0, 0.05), (2, 1, 0.2), (0.5, 0.5, 0.05), (3, 1, 0.0), (0, 0, 0.3)])
def test_asymmetric(settings):
    loss = Asymmetric(*settings)(Z, Y)
    np.testing.assert_allclose(loss, asymmetric(Z.numpy(), Y.numpy(), *settings), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("settings", [(0.1, 10, 0.2, 2, 0.05), (0.0, 3, 0.5, 5, 0.1), (0.2, 1, 0, 1, 0)])
def test_distribution_balanced(settings):
    loss = DistributionBalanced(COUNTS, *settings)(Z, Y)
    np.testing.assert_allclose(loss, distribution_balanced(Z.numpy(), Y.numpy(), *settings), rtol=1e-12)


def test_they_are_binary_cross_entropy_where_their_settings_say_so():
    wanted = F.binary_cross_entropy_with_logits(Z, Y.double(), reduction="none")
    torch.testing.assert_close(BinaryCrossEntropy()(Z, Y), wanted)
    torch.testing.assert_close(Asymmetric(0, 0, 0)(Z, Y), wanted)
    constant = DistributionBalanced(COUNTS, alpha=0.5, beta=0, neg_scale=1, kappa=0)  # weight 0.5 + sigmoid(0)
    torch.testing.assert_close(constant(Z, Y), wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name):
    z = Z.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: LOSSES[name](z, Y), z)


def test_an_easy_negative_has_no_gradient():
    z = torch.tensor([[-3.0, -2.9]], requires_grad=True)  # p is 0.047 and 0.052
    (gradient,) = torch.autograd.grad(Asymmetric(margin=0.05)(z, torch.zeros(1, 2)).sum(), z)
    assert gradient[0, 0] == 0 < gradient[0, 1]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_extreme_logits(name, dtype):
    z = torch.tensor([[1e4, -1e4, 0.0]] * 2, dtype=dtype, requires_grad=True)
    loss = LOSSES[name](z, torch.tensor([[0, 1, 1], [1, 0, 0]]))
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    assert (loss >= 0).all()
    loss.sum().backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Asymmetric(gamma_neg=-1), "gamma_neg is -1"),
        (lambda: Asymmetric(margin=1.0), r"margin is 1.0: give a number in \[0, 1\)"),
        (lambda: DistributionBalanced(COUNTS, neg_scale=0), "neg_scale is 0: give a finite number above 0"),
        (lambda: DistributionBalanced([80, 10, 3]), r"class_counts has shape \(3,\): give \(C, 2\)"),
        (lambda: DistributionBalanced(COUNTS[:2])(Z, Y), "logits have 3 classes and class_counts 2"),
        (lambda: BinaryCrossEntropy()(Z, Y[:, 0]), r"logits have shape \(4, 3\) and target \(4,\)"),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(SettingError, match=message):
        make()
