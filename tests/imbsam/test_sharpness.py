"""Sharpness measures, compared with closed forms, a full eigendecomposition and curvlinops."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imbsam import SettingError
from imbsam.sharpness import (
    MEASURES,
    SharpnessMeasures,
    average_rise,
    hessian_trace,
    loss_slice,
    mean_loss,
    top_eigenvalue,
    worst_case_rise,
)

D = 12


class Quadratic(nn.Module):
    """1/2 (w - b)^T H (w - b) for every sample, plus the sample itself; w in two parameters."""

    def __init__(self, smallest=0.1):
        super().__init__()
        torch.manual_seed(0)
        q = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q
        self.eigenvalues = torch.linspace(smallest, 3.0, D, dtype=torch.float64)
        self.hessian = q @ torch.diag(self.eigenvalues) @ q.T
        self.b = torch.randn(D, dtype=torch.float64)
        self.w1 = nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
        self.w2 = nn.Parameter(torch.randn(D - 6, dtype=torch.float64))

    def at(self, w):
        return (w - self.b) @ self.hessian @ (w - self.b) / 2

    @property
    def w(self):
        return torch.cat([self.w1.flatten(), self.w2])

    @property
    def gradient(self):
        return (self.hessian @ (self.w - self.b)).detach()

    def forward(self, samples):
        return self.at(self.w) + samples


SAMPLES = [torch.tensor([0.1, -0.3, 0.4], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)]


@pytest.fixture
def quadratic():
    return Quadratic()


def test_mean_loss(quadratic):
    assert mean_loss(quadratic, quadratic, SAMPLES) == pytest.approx(float(quadratic.at(quadratic.w)) + 0.1)


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_rise_is_the_quadratic_at_sam_direction(quadratic, adaptive):
    g, w = quadratic.gradient, quadratic.w.detach()
    e = 0.3 * (w**2 * g / (w * g).norm() if adaptive else g / g.norm())
    expected = g @ e + e @ quadratic.hessian @ e / 2
    found = worst_case_rise(quadratic, quadratic, SAMPLES, 0.3, adaptive=adaptive)
    assert found == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("smallest", [0.1, -2.0])
def test_more_steps_reach_the_maximum_over_the_ball(smallest):
    """The maximum is at (mu I - H) e = g with ||e|| = rho and mu above the top eigenvalue: found by bisection."""
    quadratic, rho = Quadratic(smallest), 1.5
    values, vectors = torch.linalg.eigh(quadratic.hessian)
    g = vectors.T @ quadratic.gradient
    low, high = float(values[-1]), float(values[-1] + g.norm() / rho)
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if (g / (mu - values)).norm() > rho else (low, mu)
    e = g / (mu - values)
    maximum = float(g @ e + (values * e * e).sum() / 2)
    first = worst_case_rise(quadratic, quadratic, SAMPLES, rho)
    assert first < maximum * 0.999
    assert worst_case_rise(quadratic, quadratic, SAMPLES, rho, steps=300) == pytest.approx(maximum, rel=1e-6)
    rises = [worst_case_rise(quadratic, quadratic, SAMPLES, rho, steps=n) for n in range(5)]
    assert rises == sorted(rises)


def test_without_a_gradient_nothing_rises(quadratic):
    with torch.no_grad():
        quadratic.b.copy_(quadratic.w)
    assert worst_case_rise(quadratic, quadratic, SAMPLES, 0.3) == 0


def test_average_rise_is_half_sigma_squared_times_the_trace(quadratic):
    value, error = average_rise(quadratic, quadratic, SAMPLES, 0.1, directions=600)
    expected = 0.5 * 0.1**2 * float(quadratic.eigenvalues.sum())
    assert error < 0.03 * expected
    assert value == pytest.approx(expected, abs=4 * error)


def test_average_rise_along_one_direction_is_exact_and_adaptive_follows_the_weights(quadratic):
    with torch.no_grad():
        quadratic.w1.zero_()
        quadratic.w2.zero_()
        quadratic.w2[1] = 7.0
    value, error = average_rise(quadratic, quadratic, SAMPLES, 0.1, directions=1, adaptive=True)
    assert error is None
    assert value == pytest.approx(0.5 * 0.7**2 * float(quadratic.hessian[7, 7]), rel=1e-9)


def test_top_eigenvalue_and_trace_of_a_quadratic(quadratic):
    top = top_eigenvalue(quadratic, quadratic, SAMPLES, tolerance=0)
    assert top == pytest.approx(float(quadratic.eigenvalues[-1]), rel=1e-9)
    value, error = hessian_trace(quadratic, quadratic, SAMPLES, probes=600)
    expected = float(quadratic.eigenvalues.sum())
    assert error < 0.03 * expected
    assert value == pytest.approx(expected, abs=4 * error)


def test_trace_of_a_diagonal_hessian_is_exact():
    module = nn.Linear(5, 1, bias=False).double()
    scale = torch.arange(1.0, 6.0, dtype=torch.float64)
    value, error = hessian_trace(module, lambda x: x[:, 0] * (scale * module.weight**2).sum(), [torch.ones(3, 1)])
    assert (value, error) == (pytest.approx(30), pytest.approx(0, abs=1e-12))


@pytest.mark.parametrize("dimensions", [1, 2])
def test_slices_of_a_quadratic(quadratic, dimensions):
    """From the losses at five points, the quadratic's own value in between and on the other side follows."""
    positions, losses = loss_slice(quadratic, quadratic, SAMPLES, dimensions=dimensions, span=2.0, points=5, seed=3)
    assert positions.tolist() == [-2, -1, 0, 1, 2]
    generator = torch.Generator().manual_seed(3)
    directions = []
    for _ in range(dimensions):
        d = torch.randn(2, 3, generator=generator).double()
        torch.randn(D - 6, generator=generator)  # drawn for the vector too, which does not move
        d = d * (quadratic.w1.norm(dim=1) / d.norm(dim=1))[:, None]
        directions.append(torch.cat([d.flatten(), torch.zeros(D - 6)]).detach())
    w = quadratic.w.detach()
    if dimensions == 1:
        expected = torch.stack([quadratic.at(w + a * directions[0]) for a in positions])
    else:
        points = [[quadratic.at(w + a * directions[0] + b * directions[1]) for b in positions] for a in positions]
        expected = torch.tensor(points, dtype=torch.float64)
    torch.testing.assert_close(losses, expected + 0.1)


def small_net(norm=True):
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3) if norm else nn.Identity(), nn.Tanh(), nn.Dropout(0.5)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 4)).double()
    with torch.no_grad():
        net(torch.randn(16, 1, 4, 4, dtype=torch.float64))  # running statistics that are not the first ones
    x, y = torch.randn(40, 1, 4, 4, dtype=torch.float64), torch.arange(40) % 4
    return net, lambda batch: F.cross_entropy(net(batch[0]), batch[1], reduction="none"), x, y


def chunks(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


def full_hessian(net, x, y):
    """Dense, by torch's own functional Hessian, of the net in evaluation mode."""
    net.eval()
    names, params = zip(*net.named_parameters(), strict=True)
    flat = nn.utils.parameters_to_vector(params).detach()

    def loss(vector):
        parts = [part.view_as(p) for part, p in zip(vector.split([p.numel() for p in params]), params, strict=True)]
        logits = torch.func.functional_call(net, dict(zip(names, parts, strict=True)), x)
        return F.cross_entropy(logits, y)

    hessian = torch.autograd.functional.hessian(loss, flat)
    net.train()
    return hessian


def test_a_small_net_against_its_full_eigendecomposition():
    net, losses, x, y = small_net()
    values = torch.linalg.eigvalsh(full_hessian(net, x, y))
    assert values[0] < -1e-3  # not convex: the largest, not the largest in absolute value, is asked for
    assert top_eigenvalue(net, losses, chunks(x, y, 16)) == pytest.approx(float(values[-1]), rel=1e-3)
    assert top_eigenvalue(net, losses, chunks(x, y, 40), tolerance=0) == pytest.approx(float(values[-1]), rel=1e-9)
    value, error = hessian_trace(net, losses, chunks(x, y, 16), probes=300)
    assert value == pytest.approx(float(values.sum()), abs=4 * error)
    assert error < 0.1 * value


def test_agrees_with_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    from scipy.sparse.linalg import eigsh

    net, losses, x, y = small_net()
    found = top_eigenvalue(net, losses, chunks(x, y, 16), tolerance=0)
    net.eval()
    data = chunks(x, y, 16)
    operator = curvlinops.HessianLinearOperator(net, nn.CrossEntropyLoss(), list(net.parameters()), data)
    expected = eigsh(operator.to_scipy(), k=1, which="LA", return_eigenvectors=False)[0]
    assert found == pytest.approx(float(expected), rel=1e-6)


FEW = {"steps": 3, "directions": 3, "probes": 3, "tolerance": 0}


def test_chunks_do_not_change_the_numbers():
    net, losses, x, y = small_net()
    whole = dict(SharpnessMeasures(**FEW).measure(net, losses, chunks(x, y, 40)))
    parts = dict(SharpnessMeasures(**FEW).measure(net, losses, chunks(x, y, 7)))
    assert tuple(whole) == MEASURES
    for measure in MEASURES:
        assert parts[measure].value == pytest.approx(whole[measure].value, rel=1e-8, abs=1e-12)
    _, slice_of_whole = loss_slice(net, losses, chunks(x, y, 40), points=3)
    _, slice_of_parts = loss_slice(net, losses, chunks(x, y, 7), points=3)
    torch.testing.assert_close(slice_of_parts, slice_of_whole)


def test_batchnorm_is_measured_with_its_running_statistics():
    net, losses, x, y = small_net()
    logits = net.eval()(x)
    net.train()
    assert mean_loss(net, losses, chunks(x, y, 7)) == pytest.approx(float(F.cross_entropy(logits, y)))


def state(net):
    tensors = [*net.parameters(), *net.buffers(), *(p.grad for p in net.parameters() if p.grad is not None)]
    return (
        [t.detach().clone() for t in tensors],
        [m.training for m in net.modules()],
        [None if p.grad is None else p.grad.data_ptr() for p in net.parameters()],
        torch.get_rng_state(),
    )


def assert_unchanged(before, net):
    tensors, modes, grads, generator = state(net)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before[0], strict=True))
    assert (modes, grads) == before[1:3]
    assert torch.equal(generator, before[3])


FUNCTIONS = [mean_loss, worst_case_rise, average_rise, top_eigenvalue, hessian_trace, loss_slice]


def prepared():
    net, losses, x, y = small_net()
    net[1].eval()  # one module in evaluation mode, the others training
    net[0].weight.grad = torch.randn_like(net[0].weight)
    net[0].bias.requires_grad_(False)
    return net, losses, chunks(x, y, 16)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_everything_is_restored(function):
    net, losses, batches = prepared()
    before = state(net)
    torch.manual_seed(5)  # the same place in the end, not the same draw
    before = (*before[:3], torch.get_rng_state())

    def noisy(batch):  # a model that draws in evaluation mode, and writes into a buffer
        net[1].running_mean.add_(0.1 * torch.rand(3, dtype=torch.float64))
        return losses(batch)

    function(net, noisy, batches)
    assert_unchanged(before, net)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_everything_is_restored_after_an_exception(function, error):
    net, losses, batches = prepared()
    before = state(net)
    calls = 0

    def failing(batch):
        nonlocal calls
        calls += 1
        if calls == (2 if function is mean_loss else 6):  # at w + e, for those that perturb
            raise error
        torch.rand(1)
        return losses(batch)

    with pytest.raises(error):
        function(net, failing, batches)
    assert_unchanged(before, net)


def test_a_seed_gives_the_same_numbers_and_another_gives_others():
    net, losses, x, y = small_net()
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))
        found.append(dict(SharpnessMeasures(**FEW, seed=seed).measure(net, losses, chunks(x, y, 16))))
    assert found[0] == found[1]
    for measure in ("average_rise", "trace"):
        assert found[0][measure] != found[2][measure]
    slices = [loss_slice(net, losses, chunks(x, y, 16), points=3, seed=seed)[1] for seed in (0, 0, 1)]
    assert torch.equal(slices[0], slices[1])
    assert not torch.equal(slices[0], slices[2])


def test_frozen_parameters_stay():
    net, losses, x, y = small_net()
    for p in net[0].parameters():
        p.requires_grad_(False)
    seen = []

    def watching(batch):
        seen.append((net[0].weight.detach().clone(), net[5].weight.detach().clone()))
        return losses(batch)

    worst_case_rise(net, watching, [(x, y)])
    assert torch.equal(seen[0][0], seen[-1][0])
    assert not torch.equal(seen[0][1], seen[-1][1])


def test_attention_has_a_second_derivative():
    torch.manual_seed(0)
    net = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(3, 5, 8)
    trace = hessian_trace(net, lambda x: net(x, x, x, need_weights=False)[0].square().mean((1, 2)), [x], probes=2)
    assert trace.value != 0


def test_a_loss_that_is_linear_in_the_weights_has_no_curvature():
    net = nn.Linear(3, 1)
    batches = [torch.ones(2, 3)]
    assert hessian_trace(net, lambda x: net(x)[:, 0], batches).value == 0
    assert worst_case_rise(net, lambda x: net(x)[:, 0], batches, 0.5) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda *a: worst_case_rise(*a, -0.1), "rho is -0.1"),
        (lambda *a: worst_case_rise(*a, float("nan")), "rho is nan"),
        (lambda *a: worst_case_rise(*a, steps=-1), "steps is -1"),
        (lambda *a: average_rise(*a, float("inf")), "sigma is inf"),
        (lambda *a: average_rise(*a, directions=0), "directions is 0"),
        (lambda *a: top_eigenvalue(*a, tolerance=-1), "tolerance is -1"),
        (lambda *a: hessian_trace(*a, probes=0), "probes is 0"),
        (lambda *a: loss_slice(*a, dimensions=3), "dimensions is 3"),
        (lambda *a: loss_slice(*a, span=0), "span is 0"),
        (lambda *a: loss_slice(*a, points=1), "points is 1"),
        (lambda *_: SharpnessMeasures(rho=-1), "rho is -1"),
        (lambda net, losses, _: mean_loss(net, losses, []), "no sample"),
        (lambda net, losses, batches: worst_case_rise(net, losses, iter(batches)), "no generator"),
        (lambda net, _, batches: mean_loss(net, lambda b: net(b[0]), batches), r"losses returned shape \(16, 4\)"),
        (lambda _, losses, batches: mean_loss(nn.Tanh(), losses, batches), "no trainable parameter"),
    ],
)
def test_wrong_settings(call, message):
    net, losses, x, y = small_net()
    with pytest.raises(SettingError, match=message):
        call(net, losses, chunks(x, y, 16))
