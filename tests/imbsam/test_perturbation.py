"""Climb and return."""

import pytest
import torch

from imbsam.perturbation import Perturbation


def tensors(*dtypes):
    torch.manual_seed(0)
    return [torch.randn(3, 4).to(dtype) for dtype in dtypes], [torch.randn(3, 4).to(dtype) for dtype in dtypes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_returns_bit_for_bit(dtype):
    weights, grads = tensors(dtype, dtype)
    before = [w.clone() for w in weights]
    perturbation = Perturbation(weights)
    perturbation.come_back()  # before the climb: nothing
    perturbation.climb(grads, 1.0)
    assert not torch.equal(weights[0], before[0])
    perturbation.come_back()
    perturbation.come_back()
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_length_is_rho_over_all_tensors_of_different_types():
    weights, grads = tensors(torch.float64, torch.float32)
    before = [w.clone() for w in weights]
    Perturbation(weights).climb(grads, 0.3)
    length = sum(((w - b).double() ** 2).sum() for w, b in zip(weights, before, strict=True)).sqrt()
    assert length == pytest.approx(0.3, rel=1e-6)


def test_norm_of_half_precision_gradients_does_not_overflow():
    weights, grads = tensors(torch.float16)
    grads = [g.sign() * 30_000 for g in grads]  # squares are beyond float16
    before = weights[0].clone()
    Perturbation(weights).climb(grads, 1.0)
    assert (weights[0] - before).float().norm() == pytest.approx(1.0, rel=1e-2)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("adaptive", [False, True])
def test_non_finite_or_zero_gradient_moves_nothing(bad, adaptive):
    weights, grads = tensors(torch.float32, torch.float32)
    before = [w.clone() for w in weights]
    grads[1][0, 0] = bad
    Perturbation(weights).climb(grads, 1.0, adaptive=adaptive)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    Perturbation(weights).climb([torch.zeros_like(w) for w in weights], 1.0, adaptive=adaptive)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
