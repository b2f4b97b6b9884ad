"""The baseline: a classifier of labelled anomalies against everything else."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from imbsam.errors import SettingError
from lightning_modules.detectors.detector import ScoreNetwork


class WeightedClassifier(ScoreNetwork):
    r"""Logistic loss of labelled anomalies against unlabelled samples, with a larger weight for the anomalies.

    .. math::
        L = (1 - y)\, w_0 \log(1 + e^{\phi(x)}) + y\, w_1 \log(1 + e^{-\phi(x)})

    with inverse-frequency weights w_c = n / (2 n_c) of the n training samples (mean 1), or w = 1.

    Args:
        input_shape: (d,).
        hidden: sizes of the hidden layers.
        weighted: use inverse-frequency weights; set it to false for balanced sampling.
    """

    sampling = "natural"
    weight: Tensor

    def __init__(self, input_shape: Sequence[int], hidden: Sequence[int] = (20,), weighted: bool = True) -> None:
        super().__init__(input_shape, hidden)
        self.weighted = weighted
        self.register_buffer("weight", torch.ones(2))

    def prepare(self, x: Tensor, labels: Tensor) -> None:
        """Count the classes."""
        if not self.weighted:
            return
        counts = labels.bincount(minlength=2)
        if not counts.all():
            raise SettingError("the training part has no labelled anomaly: raise data.labelled_share")
        self.weight.copy_(len(labels) / (2 * counts))

    def losses(self, x: Tensor, labels: Tensor) -> Tensor:
        """Weighted binary cross-entropy."""
        losses = F.binary_cross_entropy_with_logits(self.scores(x), labels.to(x.dtype), reduction="none")
        return self.weight[labels] * losses
