"""Confidence intervals of shares, means and ranking measures: exact for a binomial, else as each function says."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from imbsam.checks import check_interval

if TYPE_CHECKING:  # `imbsam report` does without torch
    from torch import Tensor

__all__ = ["Interval", "auroc_interval", "clopper_pearson", "mean_interval", "t_interval", "wilson"]

Interval = tuple[float, float]


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """The exact (conservative) interval of a binomial share, by scipy; (0, 1) without trials.

    Args:
        successes: 0 to ``trials``.
        trials: from 0.
        confidence: in (0, 1).

    Source:
        Clopper and Pearson, Biometrika 26(4), 1934.

    Example:
        >>> tuple(round(end, 3) for end in clopper_pearson(9, 10))
        (0.555, 0.997)
    """
    from scipy.stats import binomtest

    check_interval("(0, 1)", confidence=confidence)
    if trials == 0:
        return 0.0, 1.0
    low, high = binomtest(successes, trials).proportion_ci(confidence, method="exact")
    return float(low), float(high)


def mean_interval(values: "Tensor", confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Percentile bootstrap of a mean of values of which few differ, such as costs.

    Args:
        values: (N,), N from 1.
        confidence: in (0, 1).
        resamples: how often it is drawn.
        seed: of the draws.

    Source:
        Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 13.
    """
    check_interval("(0, 1)", confidence=confidence)
    distinct, counts = np.unique(values.double().cpu().numpy(), return_counts=True)
    # the rows drawn of each distinct value are a multinomial: the same law as drawing rows, and small
    drawn = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), size=resamples)
    means = drawn @ distinct / counts.sum()
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def wilson(share: float, samples: float, confidence: float = 0.95) -> Interval:
    """Wilson's interval, for what is nearly a binomial share of so many samples; (0, 1) without samples.

    * The mean recall of K classes with n_c samples each: ``samples`` is K^2 / sum(1 / n_c). That is conservative, since
      the classes' recalls differ and p (1 - p) is concave.
    * Average precision: ``samples`` is the number of positives, as in Boyd, Eng and Page, *Area under the
      Precision-Recall Curve: Point Estimates and Confidence Intervals*, ECML PKDD 2013, section 3, who take Wald's
      interval; this one does not end at a single point where the average precision is 1.

    Args:
        share: in [0, 1].
        samples: from 0, not necessarily whole.
        confidence: in (0, 1).

    Source:
        Wilson, *Probable Inference, the Law of Succession, and Statistical Inference*, JASA 22, 1927.

    Example:
        >>> tuple(round(end, 3) for end in wilson(0.9, 10))
        (0.596, 0.982)
    """
    check_interval("(0, 1)", confidence=confidence)
    check_interval("[0, 1]", share=share)
    if samples <= 0:
        return 0.0, 1.0
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    middle, width = share + z * z / (2 * samples), z * math.sqrt(share * (1 - share) / samples + (z / samples / 2) ** 2)
    return max(0.0, (middle - width) / (1 + z * z / samples)), min(1.0, (middle + width) / (1 + z * z / samples))


def auroc_interval(auroc: float, positives: int, negatives: int, confidence: float = 0.95) -> Interval:
    """Newcombe's interval of the area under the ROC curve, from the area and the counts alone.

    Args:
        auroc: in [0, 1].
        positives: from 0; without any, or without negatives, the interval is (0, 1).
        negatives: from 0.
        confidence: in (0, 1).

    Source:
        Newcombe, *Confidence intervals for an effect size measure based on the Mann-Whitney statistic, Part 2*,
        Statistics in Medicine 25, 2006, method 5.

    Example:
        >>> tuple(round(end, 3) for end in auroc_interval(1.0, 10, 100))
        (0.891, 1.0)
    """
    check_interval("(0, 1)", confidence=confidence)
    check_interval("[0, 1]", auroc=auroc)
    if not positives or not negatives:
        return 0.0, 1.0
    z, others = statistics.NormalDist().inv_cdf((1 + confidence) / 2), (positives + negatives) / 2 - 1

    def excluded(area: float) -> bool:
        spread = 1 + others * (1 - area) / (2 - area) + others * area / (1 + area)
        return (auroc - area) ** 2 > z * z * area * (1 - area) * spread / (positives * negatives)

    return _edge(excluded, 0.0, auroc), _edge(excluded, 1.0, auroc)


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's interval of a mean, such as that of a measure over seeds.

    Args:
        values: at least two.
        confidence: in (0, 1).
    """
    from scipy.stats import t

    check_interval("(0, 1)", confidence=confidence)
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    width = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * error
    return mean - width, mean + width


def _edge(excluded: Callable[[float], bool], outside: float, inside: float) -> float:
    """Where exclusion ends, between an end of the range and a value that is inside."""
    if not excluded(outside):
        return outside
    for _ in range(60):
        middle = (outside + inside) / 2
        outside, inside = (middle, inside) if excluded(middle) else (outside, middle)
    return inside
