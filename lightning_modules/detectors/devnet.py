"""DevNet: scores that deviate from a Gaussian reference."""

from collections.abc import Sequence

import torch
from torch import Tensor

from imbsam.checks import check_whole_numbers
from lightning_modules.detectors.detector import ScoreNetwork


class DevNet(ScoreNetwork):
    r"""Deviation network (Pang, Shen, van den Hengel, KDD 2019, arXiv 1911.08623).

    The deviation of a score phi(x) is counted in standard deviations of reference scores, l = 5,000 draws from N(0, 1):

    .. math::
        dev(x) = \frac{\phi(x) - \mu_R}{\sigma_R}, \qquad
        L = (1 - y)\,|dev(x)| + y \max(0,\, a - dev(x)), \qquad a = 5

    The network has one hidden layer; half of every batch are labelled anomalies.

    Args:
        input_shape: (d,).
        hidden: sizes of the hidden layers (the paper's DevNet has one of 20).
        margin: a.
        reference_draws: l, drawn once when the network is built.
    """

    sampling = "balanced"
    reference_mean: Tensor
    reference_std: Tensor

    def __init__(
        self,
        input_shape: Sequence[int],
        hidden: Sequence[int] = (20,),
        margin: float = 5.0,
        reference_draws: int = 5000,
    ) -> None:
        super().__init__(input_shape, hidden)
        check_whole_numbers(reference_draws=reference_draws)
        self.margin = margin
        draws = torch.randn(reference_draws)
        self.register_buffer("reference_mean", draws.mean())
        self.register_buffer("reference_std", draws.std())

    def losses(self, x: Tensor, labels: Tensor) -> Tensor:
        """The deviation loss, equation (6) of the paper."""
        deviation = (self.scores(x) - self.reference_mean) / self.reference_std
        return torch.where(labels == 1, (self.margin - deviation).relu(), deviation.abs())
