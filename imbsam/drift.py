"""Have predictions moved away from a reference, such as the validation part's? Two-sample tests with effect sizes.

A p-value says whether a difference can be chance, and in a large file none can; the effect says whether it matters.
Where reference and new rows are of one distribution, each test's p-value is at most alpha in at most a share alpha of
all draws (Kolmogorov-Smirnov above 1,000 rows: asymptotically).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from imbsam.checks import check_interval
from imbsam.errors import SettingError

__all__ = ["Shift", "bonferroni", "score_shift", "share_shift", "smallest_distance", "tail_shift"]

RESAMPLES = 1999
"""Of the chi-square test: its smallest p-value is 1 in 2,000."""
EXACT = 1000
"""Up to this many rows the Kolmogorov-Smirnov test is exact; beyond, its law is that of large samples."""


@dataclass(frozen=True)
class Shift:
    """One comparison.

    Attributes:
        quantity: what is compared.
        test: by which test.
        effect: its size; 0 is none, except of :func:`tail_shift`, where it is a ratio and 1 is none.
        material: whether the effect is large enough to matter.
        p_value: probability of such a difference, or a larger one, where there is none.
    """

    quantity: str
    test: str
    effect: float
    material: bool
    p_value: float


def score_shift(reference: Tensor, scores: Tensor, material: float = 0.1, quantity: str = "scores") -> Shift:
    """Two-sample Kolmogorov-Smirnov test; the effect is its distance, the largest one between the distributions.

    Equal scores make it conservative.

    Args:
        reference: finite (N,), N from 1.
        scores: finite (M,), M from 1.
        material: distance from which a shift matters: at least this share of the rows has moved.
        quantity: what the scores are.

    Raises:
        SettingError: there are no rows, or a score is not finite.

    Source:
        Hodges, Arkiv för Matematik 3, 1958; by scipy.
    """
    from scipy.stats import ks_2samp

    check_interval("(0, 1]", material=material)
    old, new = _numbers("reference", reference), _numbers("scores", scores)
    found = ks_2samp(old, new, method="exact" if max(len(old), len(new)) <= EXACT else "asymp")
    distance = float(found.statistic)
    return Shift(quantity, "two-sample Kolmogorov-Smirnov", distance, distance >= material, float(found.pvalue))


def smallest_distance(reference: int, rows: int, alpha: float) -> float:
    """The Kolmogorov-Smirnov distance from which a shift is significant: less cannot be told from chance.

    Args:
        reference: rows of the reference.
        rows: new rows.
        alpha: level, in (0, 1).
    """
    return min(1.0, math.sqrt(-math.log(alpha / 2) / 2 * (1 / reference + 1 / rows)))


def tail_shift(reference: Tensor, scores: Tensor, share: float = 0.05, factor: float = 2.0, seed: int = 0) -> Shift:
    """How many new scores are above the reference's highest ``share``; the effect is their number / the expected one.

    The distance of two distributions hardly sees when anomalies double from 1 to 2 %; this does. Exact, whatever the
    scores: of M new rows those above the k-th highest of N have the law BetaBinomial(M, k, N - k + 1). Equal scores are
    ordered at random.

    Args:
        reference: finite (N,), N from 1.
        scores: finite (M,), M from 1.
        share: of the reference, in (0, 1).
        factor: the effect matters from this, and down to its inverse.
        seed: of the order of equal scores.

    Raises:
        SettingError: there are no rows, or a score is not finite.

    Source:
        The law of exceedances: David and Nagaraja, *Order Statistics*, 2003, section 2.4 and exercise 2.4.2.
    """
    from scipy.stats import betabinom

    check_interval("(0, 1)", share=share)
    old, new = _numbers("reference", reference), _numbers("scores", scores)
    k = max(1, round(share * (len(old) + 1)))
    random = np.random.default_rng(seed).random(len(old) + len(new))
    from_above = np.lexsort((random, np.concatenate([old, new])))[::-1]
    above = int(np.flatnonzero(from_above < len(old))[k - 1]) - (k - 1)  # new rows before the k-th of the reference
    law = betabinom(len(new), k, len(old) - k + 1)
    p_value = min(1.0, 2 * float(min(law.cdf(above), law.sf(above - 1))))
    effect = above / float(law.mean())
    test = f"exact, above the highest {100 * share:g} % of the reference"
    return Shift("highest scores", test, effect, not 1 / factor < effect < factor, p_value)


def share_shift(reference: Tensor, counts: Tensor, material: float = 0.1, seed: int = 0) -> Shift:
    """Chi-square test of homogeneity of class counts; the effect is the total variation distance of the shares.

    The p-value is by random permutations of the rows, and so holds for classes with few rows or none, where the law of
    large samples does not.

    Args:
        reference: rows of each class, int64 (C,), not all 0.
        counts: the new rows, int64 (C,), not all 0.
        material: distance from which a shift matters: this share of the rows would have to be of other classes.
        seed: of the permutations.

    Raises:
        SettingError: there are no rows, or the shapes differ.

    Source:
        Hope, *A Simplified Monte Carlo Significance Test Procedure*, JRSS B 30(3), 1968.
    """
    check_interval("(0, 1]", material=material)
    if reference.shape != counts.shape:
        raise SettingError(f"reference has {len(reference)} classes and counts {len(counts)}: give the same classes")
    old, new = reference.cpu().numpy().astype(np.int64), counts.cpu().numpy().astype(np.int64)
    if not old.sum() or not new.sum():
        raise SettingError("reference or counts has no rows: give at least one of each")
    effect = float(np.abs(old / old.sum() - new / new.sum()).sum() / 2)
    both = (old + new)[old + new > 0]
    expected = both * new.sum() / both.sum()
    drawn = np.random.default_rng(seed).multivariate_hypergeometric(
        both, int(new.sum()), size=RESAMPLES, method="marginals"
    )
    # with the margins fixed, the statistic grows with the squared deviations of one row of the table
    found, chance = (((n - expected) ** 2 / expected).sum(axis=-1) for n in (new[old + new > 0], drawn))
    p_value = (1 + int((chance >= found * (1 - 1e-12)).sum())) / (1 + RESAMPLES)  # equal tables count as such
    test = f"chi-square, {RESAMPLES:,} permutations"
    return Shift("predicted classes", test, effect, effect >= material, p_value)


def bonferroni(shifts: Sequence[Shift]) -> list[float]:
    """The p-values, corrected for how many there are: one of them is below alpha by chance at most in a share alpha."""
    return [min(1.0, len(shifts) * shift.p_value) for shift in shifts]


def _numbers(name: str, values: Tensor) -> np.ndarray:
    numbers: np.ndarray = values.detach().double().cpu().numpy()
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise SettingError(f"{name} has shape {tuple(numbers.shape)}: give finite numbers, one a row, at least one")
    return numbers
