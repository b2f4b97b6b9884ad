r"""Thresholds on a score for a wanted recall, precision or number of false alarms, with what they promise.

An alarm is a score from the threshold up, and a threshold is always a score that occurred, so that ties are alarms
together or not at all.

What an interval means. The threshold is chosen on the very samples that its recall is counted on. For a wanted recall
that is no harm: with n positives the threshold is the score of the k-th highest of them, k fixed beforehand. For
continuous scores the recall R of that threshold on new samples is then the probability above an order statistic, which
has the law :math:`\text{Beta}(k, n - k + 1)`, whatever the law of the scores. Clopper-Pearson's lower end for k of n is
the :math:`\alpha / 2` quantile of that very law, so R is below it with probability :math:`\alpha / 2`; the upper end is
the quantile of :math:`\text{Beta}(k + 1, n - k)`, which is larger, so R is above it with less. The same holds for the
false alarms and the negatives. Ties only add alarms. A precision is a ratio whose denominator moves with the
threshold, and the best-looking of many: there it is Clopper-Pearson's interval, widened to the bootstrap's, in which
the threshold is chosen anew on every resample.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from imbsam.checks import check_choice, check_interval
from imbsam.errors import SettingError
from imbsam.intervals import Interval, clopper_pearson

__all__ = ["Threshold", "Wanted", "choose_threshold", "decide"]

Wanted = Literal["recall", "precision", "false_alarms"]
RESAMPLES = 1000
DRAWN_AT_ONCE = 4_000_000
PER_THOUSAND = 1000.0
SLACK = 1e-9
"""0.9 of 10 positives are 9, also in floating point."""


@dataclass(frozen=True)
class Threshold:
    """A threshold and what it does on the samples that it was chosen on.

    Args:
        value: alarms are scores from here up.
        wanted: recall, precision or false_alarms.
        goal: how much of it.
        positives: positives among the samples.
        negatives: negatives among them.
        true_alarms: alarms among the positives.
        false_alarms: alarms among the negatives.
        precision_interval: at ``confidence``.
        confidence: of all intervals.
    """

    value: float
    wanted: str
    goal: float
    positives: int
    negatives: int
    true_alarms: int
    false_alarms: int
    precision_interval: Interval
    confidence: float

    @property
    def recall(self) -> float:
        """Alarms among the positives / positives."""
        return self.true_alarms / self.positives

    @property
    def precision(self) -> float:
        """Positives among the alarms / alarms."""
        return self.true_alarms / max(1, self.true_alarms + self.false_alarms)

    @property
    def false_alarms_per_thousand(self) -> float:
        """Alarms in a thousand negatives, which does not depend on how rare the positives are."""
        return PER_THOUSAND * self.false_alarms / max(1, self.negatives)

    @property
    def recall_interval(self) -> Interval:
        """Clopper-Pearson's."""
        return clopper_pearson(self.true_alarms, self.positives, self.confidence)

    @property
    def false_alarms_interval(self) -> Interval:
        """Clopper-Pearson's, of false alarms per thousand negatives."""
        low, high = clopper_pearson(self.false_alarms, self.negatives, self.confidence)
        return PER_THOUSAND * low, PER_THOUSAND * high


def choose_threshold(
    scores: Tensor, labels: Tensor, wanted: Wanted, goal: float, confidence: float = 0.95, seed: int = 0
) -> Threshold:
    """Choose the threshold that meets a goal at the least cost to the others.

    Of the thresholds that meet it: for a recall the highest, which has the fewest alarms; for a precision and for false
    alarms the lowest, which has the highest recall.

    Args:
        scores: floating (N,), finite, higher is more likely positive; any scale.
        labels: bool or integer (N,), 1 for positives.
        wanted: recall, precision, or false_alarms per thousand negatives.
        goal: recall and precision in (0, 1], false alarms in [0, 1000].
        confidence: of the intervals, in (0, 1).
        seed: of the bootstrap.

    Raises:
        SettingError: a goal out of its range, no positive, no negative, or a goal that no threshold meets: it names the
            best that can be.

    Example:
        >>> scores, labels = torch.tensor([0.9, 0.8, 0.6, 0.5, 0.1]), torch.tensor([1, 0, 1, 0, 0])
        >>> found = choose_threshold(scores, labels, "recall", 1.0)
        >>> round(found.value, 2), found.recall, round(found.precision, 3)
        (0.6, 1.0, 0.667)
    """
    check_choice(Wanted, wanted=wanted)
    check_interval("[0, 1000]" if wanted == "false_alarms" else "(0, 1]", **{wanted: goal})
    check_interval("(0, 1)", confidence=confidence)
    values, positive = scores.detach().double().cpu().numpy(), labels.detach().cpu().numpy().astype(bool)
    if not np.isfinite(values).all():
        raise SettingError("a validation sample has a score that is not finite: the training diverged; lower its rate")
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        what = "positive" if not positives else "negative"
        raise SettingError(
            f"{wanted} is {goal:g}: there is no {what} among the {len(values)} validation samples: raise data.val_share"
        )
    distinct, inverse = np.unique(-values, return_inverse=True)  # from the highest down
    hits, misfires = (np.bincount(inverse[rows], minlength=len(distinct)).cumsum() for rows in (positive, ~positive))
    chosen = _first_to_meet(hits, misfires, wanted, goal)
    if chosen is None:
        raise SettingError(_unmet(hits, misfires, wanted, goal))
    true_alarms, false_alarms = int(hits[chosen]), int(misfires[chosen])
    interval = clopper_pearson(true_alarms, true_alarms + false_alarms, confidence)
    if wanted == "precision":
        low, high = _bootstrapped(inverse, positive, hits, misfires, goal, confidence, seed)
        interval = min(interval[0], low), max(interval[1], high)
    return Threshold(
        float(-distinct[chosen]),
        wanted,
        float(goal),
        positives,
        negatives,
        true_alarms,
        false_alarms,
        interval,
        confidence,
    )


def decide(probabilities: Tensor, thresholds: Tensor) -> Tensor:
    """The class that thresholds of single classes decide for.

    Among the classes whose probability is from their threshold up, the one that exceeds it by the largest factor; where
    there is none, the most probable of the classes without a threshold.

    Args:
        probabilities: (N, C).
        thresholds: (C,), nan for a class without one.

    Returns:
        int64 (N,); -1 where every class has a threshold and none is reached.

    Example:
        >>> decide(torch.tensor([[0.8, 0.2], [0.9, 0.1]]), torch.tensor([float("nan"), 0.15]))
        tensor([1, 0])
    """
    limits = thresholds.to(probabilities)
    factor = (probabilities / limits).where(probabilities >= limits, -math.inf)  # nan compares as false
    rest = probabilities.where(limits.isnan(), -math.inf)
    alarmed = (factor > -math.inf).any(dim=1)
    otherwise = rest.argmax(dim=1) if bool(limits.isnan().any()) else torch.full_like(factor[:, 0], -1).long()
    return torch.where(alarmed, factor.argmax(dim=1), otherwise)


def _first_to_meet(hits: Any, misfires: Any, wanted: str, goal: float) -> int | None:
    """The index of the threshold; None where no threshold meets the goal."""
    if wanted == "recall":
        return int((hits >= goal * hits[-1] - SLACK).argmax())
    if wanted == "false_alarms":
        met = misfires <= goal / PER_THOUSAND * misfires[-1] + SLACK
    else:
        met = hits >= goal * (hits + misfires) - SLACK
    return int(met.nonzero()[0][-1]) if met.any() else None


def _unmet(hits: Any, misfires: Any, wanted: str, goal: float) -> str:
    if wanted == "false_alarms":
        top = int(misfires[0])
        return (
            f"false_alarms is {goal:g}: {top} of {int(misfires[-1])} negatives share the highest score, so that any "
            f"alarm has at least {PER_THOUSAND * top / misfires[-1]:.4g} per thousand: ask for that, or for a recall"
        )
    precision = hits / (hits + misfires)
    best = len(precision) - 1 - int(precision[::-1].argmax())
    return (
        f"precision is {goal:g}: the best on the validation part is {precision[best]:.3g} "
        f"({int(hits[best])} of {int(hits[best] + misfires[best])} alarms, recall {hits[best] / hits[-1]:.3g}), since "
        "negatives are among the highest scores: ask for that or less"
    )


def _bootstrapped(
    inverse: Any, positive: Any, hits: Any, misfires: Any, goal: float, confidence: float, seed: int
) -> Interval:
    """The basic bootstrap of a chosen precision: each resample's promise less what its threshold does here."""
    random = np.random.default_rng(seed)
    truth, rows = hits / (hits + misfires), len(inverse)
    chosen = _first_to_meet(hits, misfires, "precision", goal)
    positive = positive[np.argsort(inverse, kind="stable")]
    ends = np.bincount(inverse, minlength=len(hits)).cumsum() - 1
    excess: list[Any] = []
    for draws in np.array_split(np.empty(RESAMPLES), max(1, RESAMPLES * rows // DRAWN_AT_ONCE)):
        # rows of a resample one after another, so that one bincount counts them all
        drawn = random.integers(0, rows, (len(draws), rows)) + rows * np.arange(len(draws))[:, None]
        weights = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        alarms, true_alarms = (counts.cumsum(axis=1)[:, ends] for counts in (weights, weights * positive))
        promised = true_alarms / np.maximum(alarms, 1)  # 0 where the highest scores are not drawn
        met = (true_alarms >= goal * alarms - SLACK) & (alarms > 0)
        last = met.shape[1] - 1 - met[:, ::-1].argmax(axis=1)
        at = np.where(met.any(axis=1), last, promised.argmax(axis=1))
        excess.append(promised[np.arange(len(draws)), at] - truth[at])
    low, high = np.quantile(np.concatenate(excess), [(1 - confidence) / 2, (1 + confidence) / 2])
    return max(0.0, float(truth[chosen] - high)), min(1.0, float(truth[chosen] - low))
