"""How well probabilities are calibrated: expected calibration error and log-loss of each class group."""

import math
from collections.abc import Mapping

from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

CALIBRATION_BINS = 15
LEAST = 1e-38
"""A probability of 0 counts as this in the log-loss: float32 has nothing much smaller."""


def calibration_by_group(
    probabilities: Tensor, labels: Tensor, masks: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    r"""Expected calibration error and log-loss of the samples of each class group.

    .. math::
        \text{ECE}_G = \sum_b \frac{|B_b|}{N_G} \bigl| \text{acc}(B_b) - \text{conf}(B_b) \bigr|, \qquad
        \text{LL}_G = -\frac{1}{N_G} \sum_{i : y_i \in G} \log p_{y_i}(x_i)

    over the :math:`N_G` samples whose true class is in the group, in 15 bins of equal width of the confidence, the
    probability of the predicted class; by torchmetrics.

    Args:
        probabilities: (N, C).
        labels: int64 (N,).
        masks: the groups' classes, bool (C,) by name.

    Returns:
        ``ece`` and ``log_loss`` by group, nan for a group without samples.

    Source:
        Guo et al., *On Calibration of Modern Neural Networks*, ICML 2017, arXiv 1706.04599, section 2.
    """
    found = {}
    for name, mask in masks.items():
        inside = mask.to(labels.device)[labels]
        chosen, own = probabilities[inside], labels[inside]
        if not len(own):
            found[name] = {"ece": math.nan, "log_loss": math.nan}
            continue
        error = multiclass_calibration_error(chosen.float(), own, probabilities.shape[1], n_bins=CALIBRATION_BINS)
        log_loss = -chosen.gather(1, own[:, None]).double().clamp(min=LEAST).log().mean()
        found[name] = {"ece": float(error), "log_loss": float(log_loss)}
    return found
