"""DeepSAD's objective, for the command line's detector and the scikit-learn estimator."""

import torch
from torch import Tensor, nn

HIDDEN = (64,)
CODE_SIZE = 32
"""Sizes of the network for tables."""

LEARNING_RATE = 1e-3
BATCH_SIZE = 256
WEIGHT_DECAY = 1e-6
PASSES = 100
"""Adam's settings, the batch size, and the passes over the training samples where there is no validation loss."""


class DeepSADObjective(nn.Module):
    r"""Deep semi-supervised anomaly detection (Ruff et al., ICLR 2020, arXiv 1906.02694).

    The codes z of all samples are pulled towards a centre c, those of labelled anomalies pushed away from it:

    .. math::
        \ell_i = \begin{cases} d_i & \text{unlabelled or normal} \\ \alpha / (d_i + 10^{-6}) & \text{anomaly}
        \end{cases}, \qquad d_i = \frac{\|z_i - c\|^2}{s}

    c is the mean code before training, its components at least 0.1 from 0, and s the mean squared distance from c then.
    The authors' code has no s: d then depends on the scale of features and network, and where the mean d is 100 the
    labelled anomalies' 1/d counts for next to nothing.

    Args:
        code_size: dimensions of a code.
        anomaly_weight: :math:`\alpha`; the paper's eta.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, code_size: int, anomaly_weight: float = 1.0) -> None:
        super().__init__()
        self.anomaly_weight = anomaly_weight
        self.register_buffer("centre", torch.zeros(code_size))
        self.register_buffer("spread", torch.ones(()))

    @torch.no_grad()
    def fit(self, codes: Tensor) -> None:
        """Set centre and spread from the codes (N, code_size) of all training samples, before training."""
        centre = codes.mean(dim=0)
        # away from 0, which a network without biases reaches by weights 0
        self.centre.copy_(torch.where(centre < 0, centre.clamp(max=-0.1), centre.clamp(min=0.1)))
        self.spread.copy_((codes - self.centre).square().sum(dim=1).mean())

    def distances(self, codes: Tensor) -> Tensor:
        """d, the anomaly score, (N,)."""
        distances: Tensor = (codes - self.centre).square().sum(dim=1) / self.spread
        return distances

    def forward(self, codes: Tensor, anomalous: Tensor) -> Tensor:
        """The loss of every sample (N,); `anomalous`, bool (N,), marks the labelled anomalies."""
        distances = self.distances(codes)
        return torch.where(anomalous, self.anomaly_weight / (distances + 1e-6), distances)


def initialise(network: nn.Module, generator: torch.Generator | None = None) -> None:
    """He's normal initialisation of the linear layers, 0 for their biases."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
