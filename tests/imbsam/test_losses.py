import copy

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch.testing import assert_close

from imbsam.errors import SettingError
from imbsam.losses import CrossEntropy, LogitAdjusted

COUNTS = [120, 30, 7, 1]
ROWS, CLASSES = 9, len(COUNTS)


@pytest.fixture
def logits():
    return 3 * torch.randn(ROWS, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels():
    return torch.arange(ROWS) % CLASSES


@pytest.fixture
def probabilities():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(ROWS, CLASSES, dtype=torch.float64, generator=generator).softmax(1)


def expected_loss(logits, target, counts=None, tau=1.0, smoothing=0.0):
    """The docstring's formula in numpy."""
    f = logits.numpy()
    p = np.eye(CLASSES)[target.numpy()] if target.ndim == 1 else target.numpy()
    q = (1 - smoothing) * p + smoothing / CLASSES
    if counts is not None:
        prior = np.asarray(counts, dtype=np.float64) / np.sum(counts)
        f = f + tau * np.log(prior)
    return torch.from_numpy(-(q * log_softmax(f, axis=1)).sum(1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_cross_entropy_is_its_formula(kind, smoothing, logits, request):
    target = request.getfixturevalue(kind)
    losses = CrossEntropy(label_smoothing=smoothing)(logits, target)
    assert losses.shape == (ROWS,)
    assert_close(losses, expected_loss(logits, target, smoothing=smoothing), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_logit_adjusted_is_its_formula(kind, smoothing, tau, logits, request):
    target = request.getfixturevalue(kind)
    losses = LogitAdjusted(COUNTS, tau=tau, label_smoothing=smoothing)(logits, target)
    assert losses.shape == (ROWS,)
    expected = expected_loss(logits, target, COUNTS, tau, smoothing)
    assert_close(losses, expected, rtol=1e-12, atol=1e-12)


def test_tau_1_is_balanced_softmax(logits, labels):
    weighted = np.asarray(COUNTS) * np.exp(logits.numpy())
    expected = -np.log(weighted[np.arange(ROWS), labels.numpy()] / weighted.sum(1))
    assert_close(LogitAdjusted(COUNTS)(logits, labels), torch.from_numpy(expected))


def test_tau_0_is_cross_entropy(logits, labels):
    assert_close(LogitAdjusted(COUNTS, tau=0)(logits, labels), CrossEntropy()(logits, labels))


@pytest.mark.parametrize("kind", ["labels", "probabilities"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_without_samples_counts_as_one_sample(kind, smoothing, logits, request):
    target = request.getfixturevalue(kind)
    logits.requires_grad_()
    losses = LogitAdjusted([120, 30, 0, 5], label_smoothing=smoothing)(logits, target)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(gradient).all()
    assert_close(losses.detach(), expected_loss(logits.detach(), target, [120, 30, 1, 5], 1.0, smoothing))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [CrossEntropy(), LogitAdjusted(COUNTS)], ids=["ce", "la"])
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_16_bit_logits_lose_nothing_further(loss, dtype, kind, logits, request):
    target = request.getfixturevalue(kind)
    short = logits.to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        inside = loss(short, target)
    assert inside.dtype == torch.float32
    assert_close(inside, loss(short.double(), target).float(), rtol=1e-5, atol=1e-6)
    assert_close(loss(short, target), inside, rtol=0, atol=0)


def test_casting_the_module_does_not_round_the_prior(logits, labels):
    counts = [10007, 1003, 101, 3]
    exact = LogitAdjusted(counts)(logits, labels)
    assert_close(LogitAdjusted(counts).to(torch.bfloat16)(logits, labels), exact, rtol=0, atol=0)


def test_prior_moves_with_the_module_and_is_not_saved():
    loss = LogitAdjusted(COUNTS)
    assert loss.state_dict() == {}
    assert loss.to("meta").class_counts.device.type == "meta"
    copy.deepcopy(LogitAdjusted(COUNTS)).load_state_dict({})


def test_ignored_row_is_0(logits):
    target = torch.full((ROWS,), -100)
    assert LogitAdjusted(COUNTS)(logits, target).tolist() == [0.0] * ROWS


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, float("nan")])
def test_bad_label_smoothing_is_refused(smoothing):
    with pytest.raises(SettingError, match="label_smoothing="):
        CrossEntropy(label_smoothing=smoothing)
    with pytest.raises(SettingError, match="label_smoothing="):
        LogitAdjusted(COUNTS, label_smoothing=smoothing)


@pytest.mark.parametrize("tau", [-1.0, float("nan"), float("inf")])
def test_bad_tau_is_refused(tau):
    with pytest.raises(SettingError, match="tau="):
        LogitAdjusted(COUNTS, tau=tau)


def test_bad_counts_are_refused():
    with pytest.raises(SettingError, match="class_counts"):
        LogitAdjusted([0, 0])
    with pytest.raises(SettingError, match="class_counts"):
        LogitAdjusted([1.5, 2.0])


def test_shapes_that_do_not_fit_are_refused(logits, labels):
    with pytest.raises(SettingError, match=r"4 classes.*class_counts 3"):
        LogitAdjusted(COUNTS[:3])(logits, labels)
    with pytest.raises(SettingError, match="shape"):
        CrossEntropy()(logits, labels[:-1])
    with pytest.raises(SettingError, match="shape"):
        CrossEntropy()(logits[0], labels[0])
