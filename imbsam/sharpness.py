r"""Sharpness of the loss of a group of samples around the weights.

Every function takes ``(module, losses, batches)``: the model, a function from one batch to its per-sample losses, and
the group's samples in batches small enough for one backward pass. The loss is the mean over all samples of all batches,

.. math::
    L(w) = \frac1N \sum_i l_i(w),

so its value does not depend on how the samples are batched. While a function runs the module is in evaluation mode
(BatchNorm uses its running statistics: the deployed function is measured). Afterwards, and after an exception or
Ctrl-C, its weights are bit-identical, and its modes, buffers, ``.grad`` and torch's default generators are restored.
Random draws come from ``seed`` alone, on the CPU, so that they are the same on every device; frozen parameters do not
move.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from imbsam.checks import check_numbers, check_whole_numbers
from imbsam.errors import SettingError
from imbsam.perturbation import Ascent, perturbation
from imbsam.snapshot import Buffers, RandomState

__all__ = [
    "MEASURES",
    "Estimate",
    "SharpnessMeasures",
    "average_rise",
    "hessian_trace",
    "loss_slice",
    "mean_loss",
    "top_eigenvalue",
    "worst_case_rise",
]

BatchLosses = Callable[[Any], Tensor]
"""From one batch to the losses of its samples, shape (R,)."""

MEASURES = ("loss", "sam_rise", "max_rise", "average_rise", "top_eigenvalue", "trace")
"""What :class:`SharpnessMeasures` measures, in this order."""


class Estimate(NamedTuple):
    """A measured value, with its standard error if it is a mean over random draws."""

    value: float
    standard_error: float | None = None


def mean_loss(module: nn.Module, losses: BatchLosses, batches: Iterable[Any]) -> float:
    """The loss L(w) of which all measures are taken.

    Args:
        module: the model, wrapped or not.
        losses: from one batch to its per-sample losses, shape (R,), computed with ``module``.
        batches: the samples; iterated over many times by the other functions, so a list or a loader that does not
            shuffle, not a generator.

    Returns:
        L(w), summed in float64.

    Raises:
        SettingError: there is no sample, or ``losses`` does not return one loss for each sample.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> mean_loss(model, lambda x: model(x)[:, 0], [torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 3.0]])])
        4.0
    """
    with _measuring(module):
        return _loss(losses, batches)


def worst_case_rise(
    module: nn.Module,
    losses: BatchLosses,
    batches: Iterable[Any],
    rho: float = 0.05,
    *,
    steps: int = 0,
    adaptive: bool = False,
) -> float:
    r"""Rise of the loss at the worst point of a ball of radius rho, or a lower bound of it.

    With ``steps=0`` this is SAM's own first-order answer, the point that SAM trains at:

    .. math::
        L(w + e) - L(w), \qquad e = \rho\, g(w) / \|g(w)\|, \qquad g = \nabla L

    (0 where g is 0). Each further step goes to the point of the sphere that the gradient found there points to,
    :math:`e \leftarrow \rho\, g(w + e) / \|g(w + e)\|`, the conditional-gradient method, which has no step size; the
    largest rise of all points visited is returned. For a convex quadratic it tends to the maximum over the ball; for a
    net it is a lower bound.

    Args:
        module: as for :func:`mean_loss`.
        losses: as for :func:`mean_loss`.
        batches: as for :func:`mean_loss`.
        rho: radius of the ball, from 0.
        steps: further steps after SAM's.
        adaptive: the ball is ||e / w|| <= rho instead (ASAM, Kwon et al., ICML 2021), which does not change when two
            layers' weights are scaled against each other.

    Returns:
        The rise.

    Raises:
        SettingError: a setting is outside its range, or as for :func:`mean_loss`.

    Source:
        Foret et al., *Sharpness-Aware Minimization*, ICLR 2021, arXiv 2010.01412, equation 2.
    """
    check_numbers(rho=rho)
    check_whole_numbers(0, steps=steps)
    with _measuring(module) as (params, weights):
        at_w, gradient = _loss_and_gradient(losses, batches, params)
        rises = []
        for step in range(steps + 1):
            weights.restore()
            weights.ascend(perturbation(gradient, rho, weights=params if adaptive else None))
            if step < steps:
                perturbed, gradient = _loss_and_gradient(losses, batches, params)
            else:
                perturbed = _loss(losses, batches)
            rises.append(perturbed - at_w)
        return float(torch.tensor(rises, dtype=torch.float64).max())  # Python's max would lose a nan


def average_rise(
    module: nn.Module,
    losses: BatchLosses,
    batches: Iterable[Any],
    sigma: float = 0.01,
    *,
    directions: int = 20,
    adaptive: bool = False,
    seed: int = 0,
) -> Estimate:
    r"""Mean rise of the loss in random directions.

    .. math::
        \mathrm E\, L(w + e) - L(w), \qquad e = \sigma \sqrt d\; z / \|z\|, \qquad z \sim N(0, I)

    with d weights: noise of standard deviation :math:`\sigma` on every weight, its length fixed. Every direction is
    used both ways, e and -e, which cancels the slope. For a quadratic the mean is :math:`\frac12 \sigma^2\,
    \mathrm{tr} H`.

    Args:
        module: as for :func:`mean_loss`.
        losses: as for :func:`mean_loss`.
        batches: as for :func:`mean_loss`.
        sigma: standard deviation of the noise, from 0.
        directions: number of random directions, at least 1.
        adaptive: noise in proportion to each weight's size instead: e = sigma ||w|| (w z) / ||w z||.
        seed: seed of the directions.

    Returns:
        The mean over the directions and its standard error (None for one direction).

    Raises:
        SettingError: a setting is outside its range, or as for :func:`mean_loss`.

    Source:
        Average-case sharpness, standard and adaptive: Andriushchenko et al., *A Modern Look at the Relationship
        between Sharpness and Generalization*, ICML 2023, arXiv 2302.07011, section 3.
    """
    check_numbers(sigma=sigma)
    check_whole_numbers(directions=directions)
    with _measuring(module) as (params, weights):
        generator = torch.Generator().manual_seed(seed)
        scales = [p.detach().clone() if adaptive else torch.ones_like(p) for p in params]
        length = sigma * float(torch.stack([s.float().square().sum().cpu() for s in scales]).sum().sqrt())
        at_w = _loss(losses, batches)
        rises = []
        for _ in range(directions):
            direction = [s * _normal(s, generator) for s in scales]
            both = []
            for sign in (1.0, -1.0):
                weights.ascend(perturbation([sign * d for d in direction], length))
                both.append(_loss(losses, batches))
                weights.restore()
            rises.append(sum(both) / 2 - at_w)
        return _estimate(rises)


def top_eigenvalue(
    module: nn.Module, losses: BatchLosses, batches: Iterable[Any], *, tolerance: float = 1e-3, seed: int = 0
) -> float:
    r"""The largest eigenvalue of the Hessian :math:`\nabla^2 L(w)`, by SciPy's Lanczos method.

    Takes about 20 to 60 Hessian-vector products, each two backward passes over all samples, and 20 vectors of the
    weights' size in main memory.

    Args:
        module: as for :func:`mean_loss`; it must be twice differentiable.
        losses: as for :func:`mean_loss`.
        batches: as for :func:`mean_loss`.
        tolerance: relative accuracy of the eigenvalue, from 0 (machine precision).
        seed: seed of the first vector.

    Returns:
        The eigenvalue; nan where the method did not converge (``tolerance`` too small, or a Hessian of 0).

    Raises:
        SettingError: a setting is outside its range, or as for :func:`mean_loss`.
    """
    # here: imbsam needs torch only, this function the extra `sharpness`
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

    check_numbers(tolerance=tolerance)
    with _measuring(module) as (params, _):
        dtype = reduce(torch.promote_types, {p.dtype for p in params}, torch.float32)
        generator = torch.Generator().manual_seed(seed)
        start = torch.cat([_normal(p, generator).cpu().flatten() for p in params]).to(dtype)

        def product(vector: Any) -> Any:
            flat = torch.split(torch.as_tensor(vector).flatten(), [p.numel() for p in params])
            parts = [part.view_as(p).to(p) for part, p in zip(flat, params, strict=True)]
            products = _hessian_product(losses, batches, params, parts)
            return torch.cat([h.flatten().cpu().to(dtype) for h in products]).numpy()

        size = len(start)
        if size < 3:  # too small for Lanczos
            columns = [torch.as_tensor(product(unit)) for unit in torch.eye(size, dtype=dtype)]
            return float(torch.linalg.eigvalsh(torch.stack(columns))[-1])
        operator = LinearOperator((size, size), matvec=product, dtype=start.numpy().dtype)
        try:
            values = eigsh(operator, k=1, which="LA", tol=tolerance, v0=start.numpy(), return_eigenvectors=False)
        except ArpackError:
            return math.nan
        return float(values[0])


def hessian_trace(
    module: nn.Module, losses: BatchLosses, batches: Iterable[Any], *, probes: int = 30, seed: int = 0
) -> Estimate:
    r"""The trace of the Hessian :math:`\nabla^2 L(w)`, by Hutchinson's estimate.

    .. math::
        \mathrm{tr} H \approx \frac1m \sum_k z_k^\top H z_k, \qquad z_k \in \{-1, 1\}^d \text{ at random}

    Args:
        module: as for :func:`top_eigenvalue`.
        losses: as for :func:`mean_loss`.
        batches: as for :func:`mean_loss`.
        probes: number m of random vectors, at least 1; each costs one Hessian-vector product.
        seed: seed of the vectors.

    Returns:
        The mean over the vectors and its standard error (None for one vector).

    Raises:
        SettingError: a setting is outside its range, or as for :func:`mean_loss`.

    Source:
        Hutchinson, *A stochastic estimator of the trace of the influence matrix*, 1989.
    """
    check_whole_numbers(probes=probes)
    with _measuring(module) as (params, _):
        generator = torch.Generator().manual_seed(seed)
        draws = []
        for _ in range(probes):
            z = [(2 * torch.randint(2, p.shape, generator=generator) - 1).to(p) for p in params]
            products = _hessian_product(losses, batches, params, z)
            draws.append(math.fsum(float((a * b).sum()) for a, b in zip(z, products, strict=True)))
        return _estimate(draws)


def loss_slice(
    module: nn.Module,
    losses: BatchLosses,
    batches: Iterable[Any],
    *,
    dimensions: int = 1,
    span: float = 1.0,
    points: int = 21,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The loss along one random direction, or on a plane of two, with filter normalisation.

    L(w + a d_1) or L(w + a d_1 + b d_2), where each filter of a direction (the weights of one output channel or neuron)
    has the norm of the weights' own filter; biases and normalisation parameters, which have one dimension, do not
    move. So a step of 1 is as long as the weights themselves, and slices of two networks can be compared.

    Args:
        module: as for :func:`mean_loss`.
        losses: as for :func:`mean_loss`.
        batches: as for :func:`mean_loss`.
        dimensions: 1 or 2.
        span: the slice goes from -span to span, above 0.
        points: points in each dimension, at least 2; an odd number has w itself in the middle.
        seed: seed of the directions: the same for every group of samples, so that the groups' slices are comparable.

    Returns:
        The positions a, float64 (points,), and the losses, float64 (points,) or (points, points) with a along the rows.

    Raises:
        SettingError: a setting is outside its range, or as for :func:`mean_loss`.

    Source:
        Li et al., *Visualizing the Loss Landscape of Neural Nets*, NeurIPS 2018, arXiv 1712.09913, section 4.
    """
    if dimensions not in (1, 2):
        raise SettingError(f"dimensions is {dimensions}: give 1 or 2")
    check_numbers(above=True, span=span)
    check_whole_numbers(2, points=points)
    positions = torch.linspace(-span, span, points, dtype=torch.float64)
    with _measuring(module) as (params, weights):
        generator = torch.Generator().manual_seed(seed)
        directions = [[_filter_normalised(p, generator) for p in params] for _ in range(dimensions)]
        grid = torch.cartesian_prod(*[positions] * dimensions).view(-1, dimensions)
        values = []
        for point in grid.tolist():
            weights.ascend([sum(a * d for a, d in zip(point, ds, strict=True)) for ds in zip(*directions, strict=True)])
            values.append(_loss(losses, batches))
            weights.restore()
    return positions, torch.tensor(values, dtype=torch.float64).view([points] * dimensions)


@dataclass(frozen=True)
class SharpnessMeasures:
    """All measures of one group of samples, with their settings.

    Args:
        rho: radius of the ball of ``sam_rise`` and ``max_rise``.
        steps: further steps of ``max_rise``.
        sigma: standard deviation of the noise of ``average_rise``.
        directions: random directions of ``average_rise``.
        adaptive: the three rises relative to each weight's size.
        tolerance: relative accuracy of ``top_eigenvalue``.
        probes: random vectors of ``trace``.
        seed: seed of all random draws.
    """

    rho: float = 0.05
    steps: int = 10
    sigma: float = 0.01
    directions: int = 20
    adaptive: bool = False
    tolerance: float = 1e-3
    probes: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a wrong setting before anything is measured.

        Raises:
            SettingError: a setting is outside its range.
        """
        check_numbers(rho=self.rho, sigma=self.sigma, tolerance=self.tolerance)
        check_whole_numbers(0, steps=self.steps)
        check_whole_numbers(directions=self.directions, probes=self.probes)

    def measure(self, module: nn.Module, losses: BatchLosses, batches: Iterable[Any]) -> Iterator[tuple[str, Estimate]]:
        """Measure one after another, so that a caller can show how far it is.

        Args:
            module: as for :func:`mean_loss`.
            losses: as for :func:`mean_loss`.
            batches: as for :func:`mean_loss`.

        Yields:
            The name of each of :data:`MEASURES` and its estimate.

        Example:
            >>> model = nn.Linear(1, 1, bias=False)
            >>> _ = nn.init.constant_(model.weight, 3.0)
            >>> measures = SharpnessMeasures(rho=0.1, sigma=0.1)
            >>> for name, estimate in measures.measure(model, lambda x: model(x)[:, 0] ** 2, [torch.ones(4, 1)]):
            ...     print(f"{name} {estimate.value:.3f}")
            loss 9.000
            sam_rise 0.610
            max_rise 0.610
            average_rise 0.010
            top_eigenvalue 2.000
            trace 2.000
        """
        model = (module, losses, batches)
        yield "loss", Estimate(mean_loss(*model))
        yield "sam_rise", Estimate(worst_case_rise(*model, self.rho, adaptive=self.adaptive))
        yield "max_rise", Estimate(worst_case_rise(*model, self.rho, steps=self.steps, adaptive=self.adaptive))
        draws: dict[str, Any] = {"directions": self.directions, "adaptive": self.adaptive, "seed": self.seed}
        yield "average_rise", average_rise(*model, self.sigma, **draws)
        yield "top_eigenvalue", Estimate(top_eigenvalue(*model, tolerance=self.tolerance, seed=self.seed))
        yield "trace", hessian_trace(*model, probes=self.probes, seed=self.seed)


@contextmanager
def _measuring(module: nn.Module) -> Iterator[tuple[list[nn.Parameter], Ascent]]:
    """Evaluation mode, everything restored afterwards; yields the trainable parameters and what perturbs them."""
    params = [p for p in module.parameters() if p.requires_grad]
    if not params:
        raise SettingError(f"module {type(module).__name__} has no trainable parameter: nothing can be perturbed")
    modes = [(m, m.training) for m in module.modules()]
    buffers, random_state = Buffers(module), RandomState({p.device for p in params})
    weights = Ascent(params)

    def restore() -> None:
        weights.restore()
        buffers.restore()
        random_state.restore()
        for m, training in modes:
            m.training = training

    try:
        module.eval()
        # neither attention's fused kernels nor a compiled module have a second derivative
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
            yield params, weights
    finally:
        try:
            restore()
        except BaseException:  # a second Ctrl-C
            restore()
            raise


def _sample_losses(losses: BatchLosses, batches: Iterable[Any]) -> Iterator[Tensor]:
    """The losses of each batch's samples."""
    samples = 0
    for batch in batches:
        values = losses(batch)
        if values.dim() != 1:
            shape = tuple(values.shape)
            raise SettingError(f'losses returned shape {shape}: return one loss per sample (reduction="none")')
        samples += len(values)
        yield values
    if samples == 0:
        raise SettingError("batches has no sample: give at least one, and no generator, which can be read only once")


@torch.no_grad()
def _loss(losses: BatchLosses, batches: Iterable[Any]) -> float:
    sums = [(float(values.cpu().double().sum()), len(values)) for values in _sample_losses(losses, batches)]
    return sum(total for total, _ in sums) / sum(samples for _, samples in sums)


def _loss_and_gradient(
    losses: BatchLosses, batches: Iterable[Any], params: list[nn.Parameter]
) -> tuple[float, list[Tensor]]:
    total, samples = 0.0, 0
    gradient = [torch.zeros_like(p) for p in params]
    for values in _sample_losses(losses, batches):
        torch._foreach_add_(gradient, torch.autograd.grad(values.sum(), params, materialize_grads=True))
        total += float(values.detach().cpu().double().sum())
        samples += len(values)
    torch._foreach_div_(gradient, samples)
    return total / samples, gradient


def _hessian_product(
    losses: BatchLosses, batches: Iterable[Any], params: list[nn.Parameter], vector: list[Tensor]
) -> list[Tensor]:
    """H v, by differentiating g^T v."""
    samples = 0
    product = [torch.zeros_like(p) for p in params]
    for values in _sample_losses(losses, batches):
        samples += len(values)
        gradient = torch.autograd.grad(values.sum(), params, create_graph=True, materialize_grads=True)
        curved = [(g, v) for g, v in zip(gradient, vector, strict=True) if g.requires_grad]
        if curved:
            outputs, along = zip(*curved, strict=True)
            torch._foreach_add_(product, torch.autograd.grad(outputs, params, along, materialize_grads=True))
    torch._foreach_div_(product, samples)
    return product


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)


def _filter_normalised(parameter: nn.Parameter, generator: torch.Generator) -> Tensor:
    direction = _normal(parameter, generator)
    if parameter.dim() < 2:
        return torch.zeros_like(parameter)
    lengths = [t.detach().flatten(1).norm(dim=1) for t in (parameter, direction)]
    scaled: Tensor = direction * (lengths[0] / lengths[1]).view(-1, *[1] * (parameter.dim() - 1))
    return scaled


def _estimate(draws: list[float]) -> Estimate:
    values = torch.tensor(draws, dtype=torch.float64)
    return Estimate(float(values.mean()), float(values.std() / len(draws) ** 0.5) if len(draws) > 1 else None)
