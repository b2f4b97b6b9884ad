r"""Calibration of probabilities on held-out samples: temperature scaling, vector scaling, isotonic regression.

Every ``fit_*`` returns a map that is called with new logits or scores. Its fields are plain numbers and tensors: a
checkpoint can hold them (``dataclasses.asdict``). Fit on samples that the model was not trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imbsam.checks import check_numbers
from imbsam.errors import SettingError
from imbsam.messages import first_few

__all__ = ["Isotonic", "Temperature", "VectorScaling", "fit_isotonic", "fit_temperature", "fit_vector_scaling"]

LOG_BOUND = 10.0
"""A temperature is sought between exp(-10) and exp(10), as scikit-learn does."""


@dataclass(frozen=True)
class Temperature:
    r"""Temperature scaling: :math:`\operatorname{softmax}(f / T)`.

    Args:
        temperature: T > 0; above 1 makes the probabilities less confident.
    """

    temperature: float

    def __call__(self, logits: Tensor) -> Tensor:
        """Log-probabilities (N, C) of logits (N, C)."""
        return (logits / self.temperature).log_softmax(dim=1)


@dataclass(frozen=True)
class VectorScaling:
    r"""Vector scaling: :math:`\operatorname{softmax}(w \odot f + b)`.

    Args:
        scale: w (C,).
        bias: b (C,).
    """

    scale: Tensor
    bias: Tensor

    def __call__(self, logits: Tensor) -> Tensor:
        """Log-probabilities (N, C) of logits (N, C)."""
        return (self.scale.to(logits) * logits + self.bias.to(logits)).log_softmax(dim=1)


@dataclass(frozen=True)
class Isotonic:
    """A non-decreasing map from the score to the probability of class 1, linear between its points, flat outside.

    Args:
        scores: the points' scores (K,), increasing, float64.
        probabilities: theirs (K,), non-decreasing, strictly between 0 and 1, float64.
    """

    scores: Tensor
    probabilities: Tensor

    def __call__(self, scores: Tensor) -> Tensor:
        """Log-probabilities of the two classes, float64 (N, 2), of scores (N,), higher for class 1."""
        x = scores.double()
        points, values = self.scores.to(x), self.probabilities.to(x)
        if len(points) == 1:
            one = values.expand_as(x)
        else:
            # ONNX has no binary search; counting needs N x K memory
            counted = torch.compiler.is_compiling()
            right = (x[:, None] >= points).sum(dim=1) if counted else torch.searchsorted(points, x, right=True)
            right = right.clamp(1, len(points) - 1)
            start, end = points[right - 1], points[right]
            one = torch.lerp(values[right - 1], values[right], ((x - start) / (end - start)).clamp(0, 1))
        return torch.stack([torch.log1p(-one), one.log()], dim=1)


def fit_temperature(logits: Tensor, labels: Tensor, penalty: float = 1.0) -> Temperature:
    r"""Fit the temperature of the least log-loss.

    .. math::
        \min_T\; \frac 1N \sum_i -\log \operatorname{softmax}(f(x_i) / T)_{y_i} + \frac{\lambda}{2N} (\log T)^2

    Without the penalty, as published, a validation part that is classified without an error has no best temperature:
    the colder the better, and one with a single error is nearly as bad. The penalty is the log of a normal prior of
    :math:`\log T` around 0; with many samples it does not matter.

    Args:
        logits: floating (N, C), finite.
        labels: int64 (N,). Classes may be missing.
        penalty: :math:`\lambda` from 0; 0 is the published method, with a temperature of 1 where there is no best one.

    Raises:
        SettingError: there is no sample, a logit is not finite, or ``penalty`` is negative.

    Source:
        Guo et al., *On Calibration of Modern Neural Networks*, ICML 2017, arXiv 1706.04599, section 4.2; the penalty is
        ours.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
        >>> fitted = fit_temperature(logits, torch.tensor([0, 0, 1, 1]), penalty=0)
        >>> round(fitted.temperature, 4)  # right in 3 of 4: the softmax of 4 / T is 3 / 4
        3.641
    """
    from scipy.optimize import minimize_scalar

    check_numbers(penalty=penalty)
    logits, labels = _checked(logits, labels)
    if penalty == 0 and bool((logits.gather(1, labels[:, None]) >= logits).all()):  # separable, or no logit differs
        return Temperature(1.0)

    def loss(log_beta: float) -> float:
        log_loss = torch.nn.functional.cross_entropy(np.exp(log_beta) * logits, labels)
        return float(log_loss) + penalty / (2 * len(labels)) * log_beta**2

    found = minimize_scalar(loss, bounds=(-LOG_BOUND, LOG_BOUND), method="bounded", options={"xatol": 1e-10})
    return Temperature(float(np.exp(-found.x)))


def fit_vector_scaling(
    logits: Tensor, labels: Tensor, penalty: float = 1.0, class_names: Sequence[str] | None = None
) -> VectorScaling:
    r"""Fit a scale and a bias for each class by the least log-loss.

    .. math::
        \min_{w, b}\; \frac 1N \sum_i -\log \operatorname{softmax}(w \odot f(x_i) + b)_{y_i}
        + \frac{\lambda}{2N} \bigl( \|w - 1\|^2 + \|b\|^2 \bigr)

    Without the penalty, as published, a class with a handful of samples that are all right or all wrong has no finite
    best parameters. The penalty is the log of a normal prior of deviation :math:`1 / \sqrt\lambda` around the
    uncalibrated model; with many samples it does not matter. The problem is convex, and for :math:`\lambda > 0` has
    exactly one solution.

    Args:
        logits: floating (N, C), finite.
        labels: int64 (N,); every class must occur.
        penalty: :math:`\lambda` from 0; 0 is the published method.
        class_names: names for the message.

    Raises:
        SettingError: a class has no sample, a logit is not finite, or ``penalty`` is negative.

    Source:
        Guo et al., *On Calibration of Modern Neural Networks*, ICML 2017, arXiv 1706.04599, section 4.2; the penalty is
        ours.
    """
    from scipy.optimize import minimize

    check_numbers(penalty=penalty)
    logits, labels = _checked(logits, labels)
    samples, classes = logits.shape
    if missing := [c for c in range(classes) if not bool((labels == c).any())]:
        names = [class_names[c] if class_names else str(c) for c in missing]
        raise SettingError(
            f"method is vector: {len(missing)} of {classes} classes have no validation sample "
            f"({first_few(names, 5)}): set it to temperature, or raise data.val_share"
        )
    at_start = torch.stack([torch.ones(classes), torch.zeros(classes)]).double()

    def loss_and_gradient(parameters: Any) -> tuple[float, Any]:
        both = torch.from_numpy(parameters).reshape(2, classes).requires_grad_()
        loss = torch.nn.functional.cross_entropy(both[0] * logits + both[1], labels)
        loss = loss + penalty / (2 * samples) * (both - at_start).square().sum()
        (gradient,) = torch.autograd.grad(loss, both)
        return float(loss.detach()), gradient.flatten().numpy()

    with torch.enable_grad():
        options = {"maxiter": 2000, "ftol": 1e-12, "gtol": 1e-8}
        found = minimize(loss_and_gradient, at_start.flatten().numpy(), jac=True, method="L-BFGS-B", options=options)
    scale, bias = torch.from_numpy(found.x).reshape(2, classes)
    return VectorScaling(scale.clone(), bias.clone())


def fit_isotonic(scores: Tensor, labels: Tensor) -> Isotonic:
    """Fit scikit-learn's isotonic regression of two classes on a score.

    The probabilities are kept between 1 / (N + 2) and its complement (the rule of succession), with N samples:
    scikit-learn's 0 and 1 would make a single surprise infinitely unlikely.

    Args:
        scores: floating (N,), finite, higher for class 1; any scale.
        labels: int64 (N,), 0 or 1; both must occur.

    Raises:
        SettingError: a class has no sample, or a score is not finite.

    Source:
        Zadrozny and Elkan, *Transforming Classifier Scores into Accurate Multiclass Probability Estimates*, KDD 2002.

    Example:
        >>> calibrate = fit_isotonic(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 1, 0, 1]))
        >>> calibrate(torch.tensor([0.0, 2.5, 9.0])).exp()[:, 1]
        tensor([0.1667, 0.5000, 0.8333], dtype=torch.float64)
    """
    from sklearn.isotonic import IsotonicRegression

    _, labels = _checked(scores[:, None], labels)
    ones = int(labels.sum())
    if not 0 < ones < len(labels) or int(labels.max()) > 1:
        what = "positive" if ones == 0 else "negative"
        raise SettingError(
            f"method is isotonic: the validation part has no {what} among {len(labels)} samples: raise data.val_share"
        )
    least = 1 / (len(labels) + 2)
    fitted = IsotonicRegression(y_min=least, y_max=1 - least, out_of_bounds="clip").fit(
        scores.double().cpu().numpy(), labels.double().numpy()
    )
    points = (torch.from_numpy(np.asarray(p, dtype=np.float64)) for p in (fitted.X_thresholds_, fitted.y_thresholds_))
    return Isotonic(*points)


def _checked(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """In float64 on the CPU."""
    if len(labels) == 0:
        raise SettingError("the validation part has no sample to calibrate on: set data.val_share")
    if not bool(logits.isfinite().all()):
        raise SettingError("a validation sample has a score that is not finite: the training diverged; lower its rate")
    return logits.detach().double().cpu(), labels.detach().long().cpu()
