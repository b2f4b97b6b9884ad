"""DeepSAD: pulls unlabelled samples to a centre and pushes labelled anomalies away from it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from imbsam.checks import check_whole_numbers
from imbsam.deep_sad import CODE_SIZE, HIDDEN, DeepSADObjective, initialise
from imbsam.errors import SettingError
from lightning_modules.detectors.autoencoder import pretrain
from lightning_modules.detectors.detector import Detector, mlp


class DeepSAD(Detector):
    r"""Deep semi-supervised anomaly detection (Ruff et al., ICLR 2020, arXiv 1906.02694).

    The objective is :class:`imbsam.deep_sad.DeepSADObjective`, which the scikit-learn estimator uses too. The encoder
    has no bias (with one, it could map everything to the centre). Batches are drawn naturally. The encoder is an MLP
    for tables and two convolutions for images; neither has BatchNorm. The paper pretrains the encoder as half of an
    autoencoder; on tables that gained nothing (docs/anomaly.md), so it is off by default.

    Args:
        input_shape: (d,), or (channels, H, W) with H and W divisible by 4.
        hidden: sizes of the MLP's hidden layers ([] for none), or channels of the two convolutions.
        code_size: dimensions of the encoder's output.
        eta: weight of the labelled anomalies' loss.
        pretrain_steps: steps of the autoencoder before training.
    """

    sampling = "natural"

    def __init__(
        self,
        input_shape: Sequence[int],
        hidden: Sequence[int] | None = None,
        code_size: int = CODE_SIZE,
        eta: float = 1.0,
        pretrain_steps: int = 0,
    ) -> None:
        super().__init__()
        images = len(input_shape) == 3
        hidden = list(hidden if hidden is not None else ((8, 16) if images else HIDDEN))
        check_whole_numbers(hidden=hidden, code_size=code_size)
        self.input_shape = tuple(input_shape)
        self.sizes = (hidden, code_size)
        self.pretrain_steps = pretrain_steps
        self.encoder: nn.Sequential
        if images:
            self.encoder = self._image_encoder()
        else:
            self.encoder = mlp([*input_shape, *hidden, code_size], bias=False, activation=nn.LeakyReLU)
            initialise(self.encoder)
        self.objective = DeepSADObjective(code_size, eta)

    def prepare(self, x: Tensor, labels: Tensor) -> None:
        """Pretrain if `pretrain_steps` is set, then set the centre and the spread."""
        decoder = self._decoder().to(x.device)  # not needed afterwards
        pretrain(self.encoder, decoder, x, self.pretrain_steps, weight_decay=1e-6)
        with torch.no_grad():
            self.objective.fit(torch.cat([self.encoder(chunk) for chunk in torch.split(x, 8192)]))

    def losses(self, x: Tensor, labels: Tensor) -> Tensor:
        """Squared distance of unlabelled samples, its inverse for labelled anomalies: the paper's objective."""
        losses: Tensor = self.objective(self.encoder(x), labels == 1)
        return losses

    def scores(self, x: Tensor) -> Tensor:
        """Squared distance from the centre, in units of its mean before training."""
        return self.objective.distances(self.encoder(x))

    def _image_encoder(self) -> nn.Sequential:
        channels, height, width = self.input_shape
        hidden, code_size = self.sizes
        if len(hidden) != 2 or height % 4 or width % 4:
            raise SettingError(
                f"hidden is {hidden} for images of {height} x {width}: give two numbers of channels, and images whose "
                "sides are divisible by 4"
            )
        layers: list[nn.Module] = []
        for inputs, outputs in ((channels, hidden[0]), (hidden[0], hidden[1])):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.LeakyReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(hidden[1] * height // 4 * (width // 4), code_size, bias=False)
        )

    def _decoder(self) -> nn.Sequential:
        """The encoder's mirror image."""
        hidden, code_size = self.sizes
        if len(self.input_shape) == 1:
            return mlp([code_size, *reversed(hidden), *self.input_shape], bias=False, activation=nn.LeakyReLU)
        channels, height, width = self.input_shape
        return nn.Sequential(
            nn.Linear(code_size, hidden[1] * (height // 4) * (width // 4), bias=False),
            nn.Unflatten(1, (hidden[1], height // 4, width // 4)),
            nn.LeakyReLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(hidden[1], hidden[0], 3, padding=1, bias=False),
            nn.LeakyReLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(hidden[0], channels, 3, padding=1, bias=False),
        )
