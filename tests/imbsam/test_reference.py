"""The reference, compared with the derivative worked out by hand for least squares."""

import numpy as np
import pytest
import torch

from imbsam import PartitionedSAM, reference


@pytest.mark.parametrize("adaptive", [False, True])
def test_least_squares(adaptive):
    """l_i = (x_i w - t_i)^2 / 2, whose gradient is x_i (x_i w - t_i)."""
    random = np.random.default_rng(0)
    x, t, w = random.normal(size=(8, 3)), random.normal(size=8), random.normal(size=3)
    c, a = random.uniform(size=8), random.uniform(size=8)
    weight = torch.tensor(w, requires_grad=True)

    def losses():
        return (torch.tensor(x) @ weight - torch.tensor(t)).square() / 2

    loss = reference.backward(losses, [weight], torch.tensor(c), torch.tensor(a), rho=0.7, adaptive=adaptive)

    def gradient(at, factor):
        return (factor * (x @ at - t)) @ x / 8

    g_s = gradient(w, a * c)
    e = 0.7 * w**2 * g_s / np.linalg.norm(w * g_s) if adaptive else 0.7 * g_s / np.linalg.norm(g_s)
    np.testing.assert_allclose(weight.grad, gradient(w, a * (1 - c)) + gradient(w + e, a * c))
    np.testing.assert_array_equal(weight.detach(), w)
    assert float(loss) == pytest.approx(np.mean(a * (x @ w - t) ** 2 / 2))


@pytest.mark.parametrize("own", ["reference", "engine"])
def test_two_groups_of_classes(own):
    """Each with its own e: l_i = (x_i w - t_i)^2 / 2 again."""
    random = np.random.default_rng(0)
    x, t, w = random.normal(size=(8, 3)), random.normal(size=8), random.normal(size=3)
    y, a, c, rho = np.array([0, 1, 2, 0, 1, 2, 0, 0]), np.array([2.0, 1.0, 0.5]), np.array([0.5, 1.0, 0.25]), (0.7, 0.2)
    of_group = np.stack([c[y] * (y != 1), c[y] * (y == 1)])  # class 1 is a group of its own
    module = torch.nn.Linear(3, 1, bias=False).double()
    module.weight.data = torch.tensor(w)[None]

    def losses(rows=slice(None)):
        return (module(torch.tensor(x)[rows])[:, 0] - torch.tensor(t)[rows]).square() / 2

    if own == "engine":
        sam = PartitionedSAM(module, partition=[0, 1, 0], radius=rho, sharpness_weight=c, class_weight=a, rho=1.0)
        sam.backward(losses, torch.tensor(y))
    else:
        reference.backward(losses, [module.weight], torch.tensor(of_group), torch.tensor(a[y]), rho=rho)

    def gradient(at, factor):
        return (factor * (x @ at - t)) @ x / 8

    wanted = gradient(w, a[y] * (1 - c[y]))
    for c_k, rho_k in zip(of_group, rho, strict=True):
        g_k = gradient(w, a[y] * c_k)
        wanted += gradient(w + rho_k * g_k / np.linalg.norm(g_k), a[y] * c_k)
    np.testing.assert_allclose(module.weight.grad[0], wanted)
    np.testing.assert_array_equal(module.weight.detach()[0], w)


def test_without_a_sharp_sample_it_is_the_plain_gradient():
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    x = torch.eye(2)
    reference.backward(lambda: (x @ weight).square(), [weight], torch.zeros(2), rho=0.5)
    torch.testing.assert_close(weight.grad, torch.tensor([1.0, 2.0]))
