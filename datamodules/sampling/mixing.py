"""Mixup and CutMix of a training batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from datamodules.sampling.sample_seeds import seeded
from datamodules.sampling.seeded_samples import SeededCollate
from imbsam.errors import SettingError


def check_mixing(mixup: float, cutmix: float) -> None:
    """Refuse an alpha that no Beta distribution has.

    Raises:
        SettingError: One is below 0 or not a number.
    """
    for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
        if not 0 <= alpha < float("inf"):
            raise SettingError(
                f"{name}={alpha} is no alpha of a Beta distribution: pass a number above 0, or 0 for none."
            )


class MixedBatches:
    """A ``collate_fn`` that mixes every image of a batch with its neighbour.

    A mixed image has the target p_i = lambda * onehot(own class) + (1 - lambda) * onehot(neighbour's).
    lambda is one for the batch, from Beta(alpha, alpha), and drawn under the first sample's seed, so that it depends on
    (seed, epoch, draw) alone. For CutMix it is the share of the image that the pasted box leaves.

    Args:
        collate: Makes the batch ``(images, labels)``, float (B, channels, H, W) and int64 (B,).
        num_classes: Number of classes C.
        mixup: alpha of mixup, 0 for none.
        cutmix: alpha of CutMix, 0 for none; where both are set, either one has probability 1/2.

    Source:
        Zhang et al., *mixup*, ICLR 2018, arXiv 1710.09412; Yun et al., *CutMix*, ICCV 2019, arXiv 1905.04899;
        torchvision's implementation.
    """

    def __init__(self, collate: Callable[..., Any], num_classes: int, mixup: float, cutmix: float) -> None:
        self.collate = SeededCollate(collate)
        self.mixers: list[v2.Transform] = []
        if mixup:
            self.mixers.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
        if cutmix:
            self.mixers.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))

    def __call__(self, samples: Any, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Make the batch and mix it.

        Args:
            samples: What the data set read.
            seeds: One seed for each sample, int64 (B,).

        Returns:
            Images, as ``collate`` makes them, and class probabilities, float32 (B, C).
        """
        images, labels = self.collate((samples, seeds))
        with seeded(int(seeds[0]) ^ 1):  # not the seed that the first sample's own augmentation began with
            mixer = self.mixers[int(torch.randint(len(self.mixers), ()))]
            images, probabilities = mixer(images, labels)
        return images, probabilities.float()
