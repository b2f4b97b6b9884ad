"""The perturbation e; ascend and restore."""

import math

import pytest
import torch

from imbsam.perturbation import Ascent, perturbation


def tensors(*dtypes):
    torch.manual_seed(0)
    return [torch.randn(3, 4).to(dtype) for dtype in dtypes], [torch.randn(3, 4).to(dtype) for dtype in dtypes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_restores_bit_for_bit(dtype):
    weights, grads = tensors(dtype, dtype)
    before = [w.clone() for w in weights]
    ascent = Ascent(weights)
    ascent.restore()  # before the ascent: nothing
    ascent.ascend(perturbation(grads, 1.0))
    assert not torch.equal(weights[0], before[0])
    ascent.restore()
    ascent.restore()
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_length_is_rho_over_all_tensors_of_different_types():
    e = perturbation(tensors(torch.float64, torch.float32)[1], 0.3)
    assert [part.dtype for part in e] == [torch.float64, torch.float32]
    assert math.sqrt(sum((part.double() ** 2).sum() for part in e)) == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
def test_complex_and_real_gradients_together(adaptive):
    weights, grads = tensors(torch.complex64, torch.float32)
    grads[0] = torch.complex(*torch.randn(2, 3, 4)).conj()
    flat = torch.cat([torch.view_as_real(grads[0].resolve_conj()).flatten(), grads[1].flatten()]).clone()
    sizes = torch.cat([weights[0].abs().repeat_interleave(2, dim=1).flatten(), weights[1].flatten()])
    expected = 0.3 * flat * sizes**2 / (flat * sizes).norm() if adaptive else 0.3 * flat / flat.norm()
    e = perturbation(grads, 0.3, weights=weights if adaptive else None)
    found = torch.cat([torch.view_as_real(e[0].resolve_conj()).flatten(), e[1].flatten()])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layout", ["channels last", "transposed", "with gaps", "empty"])
def test_any_layout(layout):
    g = torch.randn(4, 6, 3, 3)
    there = {
        "channels last": g.to(memory_format=torch.channels_last),
        "transposed": g.transpose(0, 1),
        "with gaps": g[:, ::2],
        "empty": g[:0],
    }[layout]
    e = perturbation([torch.ones(2), there], 1.0)
    torch.testing.assert_close(e[1], there / math.sqrt(2 + float((there**2).sum())))


def test_norm_of_half_precision_gradients_does_not_overflow():
    _, grads = tensors(torch.float16)
    e = perturbation([g.sign() * 30_000 for g in grads], 1.0)  # squares are beyond float16
    assert e[0].float().norm() == pytest.approx(1.0, rel=1e-2)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("adaptive", [False, True])
def test_non_finite_or_zero_gradient_moves_nothing(bad, adaptive):
    weights, grads = tensors(torch.float32, torch.float32)
    along = weights if adaptive else None
    grads[1][0, 0] = bad
    assert not any(e.any() for e in perturbation(grads, 1.0, weights=along))
    assert not any(e.any() for e in perturbation([torch.zeros_like(w) for w in weights], 1.0, weights=along))


def test_gradient_too_small_to_scale_moves_nothing():
    """A tail class that is fitted to the last bit has subnormal gradients; 0.05 / 1e-41 would be infinite."""
    e = perturbation([torch.full((4,), 1e-41), torch.zeros(3)], 0.05)
    assert not any(part.any() for part in e)
