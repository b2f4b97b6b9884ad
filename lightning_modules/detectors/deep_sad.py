"""DeepSAD: unlabelled rows are drawn to a centre, labelled anomalies pushed away from it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from imbsam.errors import SettingError
from lightning_modules.detectors.autoencoder import pretrain
from lightning_modules.detectors.detector import Detector, check_sizes, mlp


class DeepSAD(Detector):
    r"""Deep semi-supervised anomaly detection (Ruff et al., ICLR 2020, arXiv 1906.02694).

    .. math::
        L = (1 - y)\, \|\phi(x) - c\|^2 + y\, \eta\, (\|\phi(x) - c\|^2 + \epsilon)^{-1}, \qquad \epsilon = 10^{-6}

    phi has no bias (with one, everything could be mapped to c), is pretrained as the encoder of an autoencoder, and c
    is the mean of its outputs over the training rows before training, coordinates nearer to 0 than 0.1 moved to
    +-0.1. Batches are drawn naturally. Tables get an MLP, images two convolutions; neither has BatchNorm.

    Args:
        input_shape: (d,), or (channels, H, W) with H and W divisible by 4.
        hidden: sizes of the MLP's hidden layers, [] for none, or channels of the two convolutions.
        code_size: dimensions of phi(x).
        eta: weight of the labelled anomalies' loss.
        pretrain_steps: steps of the autoencoder before training.
    """

    sampling = "natural"
    centre: Tensor

    def __init__(
        self,
        input_shape: Sequence[int],
        hidden: Sequence[int] | None = None,
        code_size: int = 20,
        eta: float = 1.0,
        pretrain_steps: int = 500,
    ) -> None:
        super().__init__()
        images = len(input_shape) == 3
        hidden = list(hidden if hidden is not None else ((8, 16) if images else (100,)))
        check_sizes(hidden=hidden, code_size=code_size)
        self.input_shape = tuple(input_shape)
        self.sizes = (hidden, code_size)
        self.eta = eta
        self.pretrain_steps = pretrain_steps
        self.encoder: nn.Sequential
        if images:
            self.encoder = self._image_encoder()
        else:
            self.encoder = mlp([*input_shape, *hidden, code_size], bias=False, activation=nn.LeakyReLU)
        self.register_buffer("centre", torch.zeros(code_size))

    def prepare(self, x: Tensor, labels: Tensor) -> None:
        """Pretrain, then set the centre."""
        decoder = self._decoder().to(x.device)  # of no use afterwards
        pretrain(self.encoder, decoder, x, self.pretrain_steps, weight_decay=1e-6)
        with torch.no_grad():
            centre = torch.cat([self.encoder(rows) for rows in torch.split(x, 8192)]).mean(dim=0)
        sign = torch.where(centre < 0, -1.0, 1.0)
        self.centre.copy_(torch.where(centre.abs() < 0.1, 0.1 * sign, centre))

    def losses(self, x: Tensor, labels: Tensor) -> Tensor:
        """Squared distance of unlabelled rows, its inverse for labelled anomalies: the paper's Deep SAD objective."""
        distance = self.scores(x)
        return torch.where(labels == 1, self.eta / (distance + 1e-6), distance)

    def scores(self, x: Tensor) -> Tensor:
        """Squared distance from the centre."""
        distance: Tensor = (self.encoder(x) - self.centre).square().sum(dim=1)
        return distance

    def _image_encoder(self) -> nn.Sequential:
        channels, height, width = self.input_shape
        hidden, code_size = self.sizes
        if len(hidden) != 2 or height % 4 or width % 4:
            raise SettingError(
                f"deep_sad has hidden={hidden} for images of {height} x {width}: give two numbers of channels, and "
                "images whose sides are divisible by 4"
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
