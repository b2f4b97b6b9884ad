"""Confidence intervals of shares and means: Clopper-Pearson where it is a binomial, else the bootstrap."""

import numpy as np
from torch import Tensor

from imbsam.checks import check_interval

__all__ = ["Interval", "clopper_pearson", "mean_interval"]

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


def mean_interval(values: Tensor, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
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
