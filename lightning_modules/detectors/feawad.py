"""FEAWAD: deviations of the features of an autoencoder."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from imbsam.checks import check_whole_numbers
from imbsam.errors import SettingError
from lightning_modules.detectors.autoencoder import pretrain
from lightning_modules.detectors.detector import Detector, features_of, mlp


class FEAWAD(Detector):
    r"""Feature encoding with autoencoders (Zhou, Song, Zhang, Liu, Zhu, Liu, TNNLS 2021, arXiv 2105.10500).

    An autoencoder, pretrained on the unlabelled samples and trained on with the rest, yields a sample's code h, its
    reconstruction error e = ||x - x'|| and the residual r = (x - x') / e. A network that gets e again at every layer
    scores [h, r, e], and

    .. math::
        L = (1 - y)\, (|\phi(x)| + e) + y\, [\max(0, a - \phi(x)) + \max(0, a - e)], \qquad a = 5

    Half of every batch are labelled anomalies.

    Args:
        input_shape: (d,).
        encoder: sizes of the encoder's layers, the last is the code's; the decoder mirrors them.
        hidden: sizes of the score network's hidden layers (the paper's has 256 and 32).
        margin: a.
        pretrain_steps: steps of the autoencoder before training.
    """

    sampling = "balanced"

    def __init__(
        self,
        input_shape: Sequence[int],
        encoder: Sequence[int] = (128, 64),
        hidden: Sequence[int] = (256, 32),
        margin: float = 5.0,
        pretrain_steps: int = 300,
    ) -> None:
        super().__init__()
        check_whole_numbers(encoder=encoder, hidden=hidden)
        if not encoder:
            raise SettingError("encoder is []: FEAWAD needs an autoencoder, give at least one size")
        d = features_of("FEAWAD", input_shape)
        self.encoder = nn.Sequential(mlp([d, *encoder]), nn.ReLU())
        self.decoder: nn.Sequential = mlp([*reversed(encoder), d])
        sizes = [encoder[-1] + d, *hidden, 1]
        self.layers = nn.ModuleList(nn.Linear(a + 1, b) for a, b in pairwise(sizes))
        self.margin = margin
        self.pretrain_steps = pretrain_steps

    def prepare(self, x: Tensor, labels: Tensor) -> None:
        """Pretrain the autoencoder on the unlabelled samples."""
        pretrain(self.encoder, self.decoder, x[labels == 0], self.pretrain_steps)

    def losses(self, x: Tensor, labels: Tensor) -> Tensor:
        """Deviation of the score from 0, or from the margin, and the same for the reconstruction error."""
        scores, error = self._scores_and_error(x)
        anomalous = (self.margin - scores).relu() + (self.margin - error).relu()
        return torch.where(labels == 1, anomalous, scores.abs() + error)

    def scores(self, x: Tensor) -> Tensor:
        """phi(x)."""
        return self._scores_and_error(x)[0]

    def _scores_and_error(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = self.encoder(x)
        residual = x - self.decoder(code)
        error = (residual.square().sum(dim=1, keepdim=True) + 1e-12).sqrt()  # the root has no gradient at 0
        out = torch.cat([code, residual / error], dim=1)
        for layer in self.layers[:-1]:
            out = layer(torch.cat([out, error], dim=1)).relu()
        return self.layers[-1](torch.cat([out, error], dim=1)).squeeze(1), error.squeeze(1)
