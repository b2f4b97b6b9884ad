import copy
import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch.testing import assert_close

from imbsam.errors import SettingError
from imbsam.losses import LDAM, CrossEntropy, Focal, LogitAdjusted, VectorScaling

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
@pytest.mark.parametrize(
    "loss", [CrossEntropy(), LogitAdjusted(COUNTS), Focal(), LDAM(COUNTS), VectorScaling(COUNTS)], ids=repr
)
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
    for loss in (LogitAdjusted(COUNTS), Focal(), LDAM(COUNTS), VectorScaling(COUNTS)):
        assert loss(logits, target).tolist() == [0.0] * ROWS


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, float("nan")])
def test_bad_label_smoothing_is_refused(smoothing):
    with pytest.raises(SettingError, match="label_smoothing is"):
        CrossEntropy(label_smoothing=smoothing)
    with pytest.raises(SettingError, match="label_smoothing is"):
        LogitAdjusted(COUNTS, label_smoothing=smoothing)


@pytest.mark.parametrize("tau", [-1.0, float("nan"), float("inf")])
def test_bad_tau_is_refused(tau):
    with pytest.raises(SettingError, match="tau is"):
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


# --- focal, LDAM, vector scaling: their papers' formulas in plain Python, row by row ---


def softmax(row):
    return [math.exp(f) / sum(math.exp(g) for g in row) for f in row]


def focal(row, y, gamma):
    """Lin et al., equation 4, with the softmax's probability."""
    p = softmax(row)[y]
    return -((1 - p) ** gamma) * math.log(p)


def ldam(row, y, max_margin, scale, counts=COUNTS):
    """Cao et al., section 3.2 and their code: CE(s (cos - Delta_y)), where the logits are s cos."""
    cosines = [f / scale for f in row]
    margins = [n ** (-1 / 4) for n in counts]
    margins = [max_margin / max(margins) * m for m in margins]
    shifted = [scale * (c - margins[y] * (j == y)) for j, c in enumerate(cosines)]
    return -math.log(softmax(shifted)[y])


def vector_scaling(row, y, gamma, tau, counts=COUNTS):
    """Kini et al.: log(1 + sum over the other classes c of exp(iota_c - iota_y + Delta_c f_c - Delta_y f_y))."""
    delta = [(n / max(counts)) ** gamma for n in counts]
    iota = [tau * math.log(n / sum(counts)) for n in counts]
    others = [c for c in range(len(row)) if c != y]
    return math.log(1 + sum(math.exp(iota[c] - iota[y] + delta[c] * row[c] - delta[y] * row[y]) for c in others))


PAPERS = {
    "focal 2": (Focal(), focal, (2.0,)),
    "focal 0.5": (Focal(0.5), focal, (0.5,)),
    "ldam": (LDAM(COUNTS), ldam, (0.5, 30.0)),
    "ldam 0.3, 16": (LDAM(COUNTS, max_margin=0.3, scale=16), ldam, (0.3, 16.0)),
    "vector scaling": (VectorScaling(COUNTS), vector_scaling, (0.3, 1.0)),
    "vector scaling 0.05, 0.75": (VectorScaling(COUNTS, gamma=0.05, tau=0.75), vector_scaling, (0.05, 0.75)),
}


@pytest.mark.parametrize("kind", ["labels", "probabilities"])
@pytest.mark.parametrize("name", PAPERS)
def test_loss_is_its_papers(name, kind, logits, request):
    """For probabilities the expected loss: of mixup's two labels, lambda times one and 1 - lambda times the other."""
    loss, formula, settings = PAPERS[name]
    target = request.getfixturevalue(kind)
    losses = loss(logits, target)
    assert losses.shape == (ROWS,)
    of_class = [[formula(row, j, *settings) for j in range(CLASSES)] for row in logits.tolist()]
    if kind == "labels":
        expected = [row[y] for row, y in zip(of_class, target.tolist(), strict=True)]
    else:
        expected = [np.dot(q, row) for q, row in zip(target.tolist(), of_class, strict=True)]
    assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["labels", "probabilities"])
@pytest.mark.parametrize("name", PAPERS)
def test_gradient_is_that_of_the_loss(name, kind, logits, request):
    target = request.getfixturevalue(kind)
    assert torch.autograd.gradcheck(lambda f: PAPERS[name][0](f, target), logits.requires_grad_())


@pytest.mark.parametrize(
    "loss",
    [Focal(0), LDAM(COUNTS, max_margin=0), VectorScaling(COUNTS, gamma=0, tau=0), VectorScaling([5, 5, 5, 5])],
    ids=["gamma 0", "margin 0", "gamma and tau 0", "equal counts"],
)
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_limits_are_cross_entropy(loss, kind, logits, request):
    target = request.getfixturevalue(kind)
    assert_close(loss(logits, target), CrossEntropy()(logits, target), rtol=1e-12, atol=1e-12)


def test_vector_scaling_without_scaling_is_logit_adjustment(logits, labels):
    assert_close(
        VectorScaling(COUNTS, gamma=0, tau=0.7)(logits, labels), LogitAdjusted(COUNTS, tau=0.7)(logits, labels)
    )


def test_the_largest_margin_is_the_smallest_classs(logits):
    """The margin of each class, measured: the loss of large logits grows by scale * margin."""
    flat = torch.zeros(CLASSES, CLASSES, dtype=torch.float64)
    labels = torch.arange(CLASSES)
    odds = torch.expm1(LDAM(COUNTS, max_margin=0.4, scale=10)(flat, labels)).log() - math.log(CLASSES - 1)
    assert_close(odds / 10, torch.tensor([0.4 * n**-0.25 for n in COUNTS], dtype=torch.float64))


@pytest.mark.parametrize("empty", [0, 2])
def test_a_class_without_samples_changes_no_other(empty, logits, labels):
    """LDAM: it has the smallest class's margin, and the others keep theirs; vector scaling: it counts as one sample."""
    counts = [n if j != empty else 0 for j, n in enumerate([120, 30, 7, 5])]
    filled = [n or 5 for n in counts]
    assert_close(LDAM(counts)(logits, labels), LDAM(filled)(logits, labels))
    filled = [n or 1 for n in counts]
    assert_close(VectorScaling(counts)(logits, labels), VectorScaling(filled)(logits, labels))
    for loss in (LDAM(counts), VectorScaling(counts)):
        soft = torch.full((ROWS, CLASSES), 0.25, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(loss(logits.requires_grad_(), soft).sum(), logits)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("loss", [Focal(0.5), Focal(2), LDAM(COUNTS), VectorScaling(COUNTS)], ids=repr)
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_confident_samples_have_finite_gradients_and_keep_their_precision(loss, kind, request):
    """In float32 a softmax probability is exactly 1 from a lead of 17 on, and 1 - p is then 0."""
    target = request.getfixturevalue(kind)
    sure = torch.zeros(ROWS, CLASSES)
    sure[torch.arange(ROWS), torch.arange(ROWS) % CLASSES] = torch.linspace(10, 60, ROWS)
    sure.requires_grad_()
    losses = loss(sure, target)
    (gradient,) = torch.autograd.grad(losses.sum(), sure)
    exact = sure.detach().double().requires_grad_()
    exact_losses = loss(exact, target)
    (exact_gradient,) = torch.autograd.grad(exact_losses.sum(), exact)
    assert_close(losses.double(), exact_losses, rtol=1e-4, atol=1e-7)
    assert_close(gradient.double(), exact_gradient, rtol=1e-4, atol=1e-6)


def test_vector_scaling_and_ldam_count_as_integers():
    """Casting the module to 16 bits must not round the counts."""
    counts = [10007, 1003, 101, 3]
    x, y = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(0)), torch.arange(ROWS) % CLASSES
    for kind in (LDAM, VectorScaling):
        assert_close(kind(counts).to(torch.bfloat16)(x, y), kind(counts)(x, y), rtol=0, atol=0)
        assert kind(counts).state_dict() == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Focal(gamma=-1), "gamma is -1: give a finite number from 0 .0 is cross-entropy"),
        (lambda: Focal(gamma=math.nan), "gamma is nan"),
        (lambda: LDAM(COUNTS, max_margin=-0.5), "max_margin is -0.5"),
        (lambda: LDAM(COUNTS, scale=0), "scale is 0: give a finite number above 0"),
        (lambda: LDAM([0, 0]), r"class_counts is \[0, 0\], no training sample"),
        (lambda: LDAM([1.5, 2]), "class_counts"),
        (lambda: VectorScaling(COUNTS, gamma=math.inf), "gamma is inf"),
        (lambda: VectorScaling(COUNTS, tau=-1), "tau is -1"),
        (lambda: VectorScaling([0, 0]), "no training sample"),
        (lambda: LDAM(COUNTS[:3])(torch.zeros(2, 4), torch.tensor([0, 1])), "4 classes and class_counts 3"),
        (lambda: VectorScaling(COUNTS[:3])(torch.zeros(2, 4), torch.tensor([0, 1])), "4 classes and class_counts 3"),
        (lambda: Focal()(torch.zeros(2, 4), torch.tensor([0])), "logits have shape"),
        (lambda: LDAM(COUNTS)(torch.zeros(2, 4), torch.zeros(2, 3)), "logits have shape"),
    ],
)
def test_new_losses_refuse_in_one_line(make, message):
    with pytest.raises(SettingError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
