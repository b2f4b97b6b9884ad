r"""Conformal sets of classes that hold the true one with a wanted probability, for every class by itself (Mondrian).

Class j, with :math:`n_j` held-out samples whose conformity to their own class is :math:`s_1, \dots`, belongs to a new
sample's set unless its conformity is below the k-th smallest of them, :math:`k = \lfloor \alpha (n_j + 1) \rfloor`.
A new sample of class j that is exchangeable with them falls below with probability at most
:math:`k / (n_j + 1) \le \alpha`:

.. math::
    P\bigl(j \in S(x) \mid y = j\bigr) \ge 1 - \alpha

over the draw of both. For one draw of held-out samples, as a deployment has, and continuous scores the coverage has the
law :math:`\text{Beta}(n_j + 1 - k,\, k)`: with 20 samples it may be far off, and the interval says how far. A class
with fewer than :math:`1 / \alpha - 1` samples is in every set: the promise holds and says nothing.

Source:
    Vovk, Gammerman and Shafer, *Algorithmic Learning in a Random World*, 2005, section 4.5; Vovk, *Conditional Validity
    of Inductive Conformal Predictors*, ACML 2012, for the law of the coverage; Sadinle, Lei and Wasserman, JASA 114,
    2019, for the probability as conformity.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from imbsam.checks import check_interval
from imbsam.errors import SettingError
from imbsam.intervals import Interval

__all__ = ["ConformalSets", "fit_conformal"]


@dataclass(frozen=True)
class ConformalSets:
    """Sets with class-conditional coverage.

    Args:
        coverage: the wanted probability 1 - alpha.
        limits: a class is in the set from this conformity up, float64 (C,); -inf: always.
        samples: held-out samples of each class, int64 (C,).
    """

    coverage: float
    limits: Tensor
    samples: Tensor

    def __call__(self, conformity: Tensor) -> Tensor:
        """The sets of new samples, bool (N, C), of their conformity (N, C). A set may be empty."""
        return conformity.double() >= self.limits.to(conformity.device)

    def interval(self, index: int, confidence: float = 0.95) -> Interval:
        """Where the coverage of class ``index`` lies on new samples, with this confidence over the held-out ones."""
        from scipy.stats import beta

        below = _below(int(self.samples[index]), self.coverage)
        if below == 0:
            return 1.0, 1.0
        law = beta(int(self.samples[index]) + 1 - below, below)
        return float(law.ppf((1 - confidence) / 2)), float(law.ppf((1 + confidence) / 2))


def fit_conformal(conformity: Tensor, labels: Tensor, coverage: float) -> ConformalSets:
    """Fit the limit of every class on held-out samples.

    Args:
        conformity: (N, C), higher is more like the class: probabilities, or (-score, score) of an anomaly score. Any
            scale, which may differ between classes.
        labels: int64 (N,). A class without samples is in every set.
        coverage: in (0, 1).

    Raises:
        SettingError: ``coverage`` is out of its range, or a conformity is nan.

    Example:
        >>> p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [0.4, 0.6], [0.7, 0.3]])
        >>> sets = fit_conformal(p, torch.tensor([0, 0, 0, 1, 1, 1]), coverage=0.75)
        >>> sets(torch.tensor([[0.95, 0.05], [0.65, 0.35], [0.4, 0.6]])).int()
        tensor([[1, 0], [1, 1], [0, 1]], dtype=torch.int32)
    """
    check_interval("(0, 1)", coverage=coverage)
    if bool(conformity.isnan().any()):
        raise SettingError("a validation sample has a score that is nan: the training diverged; lower its rate")
    scores, own = conformity.detach().double().cpu(), labels.detach().long().cpu()
    limits = torch.full((scores.shape[1],), -math.inf, dtype=torch.float64)
    for index in range(len(limits)):
        of_class = scores[own == index, index].sort().values
        if below := _below(len(of_class), coverage):
            limits[index] = of_class[below - 1]
    return ConformalSets(coverage, limits, own.bincount(minlength=len(limits)))


def _below(samples: int, coverage: float) -> int:
    """The rank floor(alpha (n + 1)), where 0.1 * 10 is 1 in floating point too."""
    return math.floor((1 - coverage) * (samples + 1) + 1e-9)
