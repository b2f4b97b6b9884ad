"""Mixup and CutMix of a training batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from datamodules.sampling.host_copies import pinned_for
from datamodules.sampling.sample_seeds import seeded
from datamodules.sampling.seeded_samples import SeededCollate


class MixedBatches:
    """A ``collate_fn`` that mixes every image of a batch with its neighbour.

    A mixed image has the target p_i = lambda * onehot(own class) + (1 - lambda) * onehot(neighbour's). A batch has one
    lambda, from Beta(alpha, alpha), drawn under the first sample's seed, so that it depends on (seed, epoch, draw)
    alone. For CutMix it is the share of the image outside the pasted box. Images are mixed on the device they are on,
    targets on the host, and nothing waits.

    Args:
        collate: Makes the batch ``(images, labels)``, float (B, channels, H, W), and int64 (B,) on the host.
        num_classes: Number of classes C.
        mixup: alpha of mixup, 0 for none.
        cutmix: alpha of CutMix, 0 for none; with both set, either one has probability 1/2.

    Source:
        Zhang et al., *mixup*, ICLR 2018, arXiv 1710.09412; Yun et al., *CutMix*, ICCV 2019, arXiv 1905.04899;
        torchvision's implementation.
    """

    def __init__(self, collate: Callable[..., Any], num_classes: int, mixup: float, cutmix: float) -> None:
        self.collate = SeededCollate(collate)
        kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        self.mixers = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]

    def __call__(self, samples: Any, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Collate samples with their seeds, int64 (B,), and mix: images, and class probabilities, float32 (B, C)."""
        images, labels = self.collate((samples, seeds))
        with seeded(int(seeds[0]) ^ 1):  # not the seed that the first sample's own augmentation began with
            mixer = self.mixers[int(torch.randint(len(self.mixers), ()))]
            images, probabilities = mixer(images, labels)
        return images, pinned_for(probabilities.float(), images.device)
