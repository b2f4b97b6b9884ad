"""Augmentation of images from files: the ImageNet standard, RandAugment and AutoAugment."""

from collections.abc import Sequence
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from imbsam.checks import check_choice, check_interval, check_whole_numbers

Augment = Literal["none", "standard", "randaugment", "autoaugment"]


class ImageTransform:
    """Turns a PIL image into the network's input.

    ``none`` (and so every evaluation): the shorter side to ``image_size * 256 / 224``, then the central crop.
    ``standard``: a random crop of 8 % to 100 % of the area, resized, and a random flip (Szegedy et al., CVPR 2015).
    ``randaugment`` (Cubuk et al., NeurIPS 2020; 2 operations of magnitude 9) and ``autoaugment`` (Cubuk et al., CVPR
    2019; the policy found on ImageNet) come after these two. At the end: float32 in [0, 1], ``(pixel - mean) / std``.

    All draws come from torch's default generator, so under a seed of its own a sample's augmentation depends on that
    seed alone (:class:`~datamodules.sampling.seeded_samples.SeededSamples`).

    Args:
        augment: none, standard, randaugment or autoaugment.
        image_size: Side S of the result in pixels.
        color_jitter: j: brightness, contrast and saturation are each multiplied by a number in [1 - j, 1 + j]. Ignored
            with ``none``.
        mean: Mean of each channel, in [0, 1].
        std: Standard deviation of each channel, in [0, 1].

    Raises:
        SettingError: A setting is out of range.
    """

    def __init__(
        self, augment: Augment, image_size: int, color_jitter: float, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        check_choice(Augment, augment=augment)
        check_interval("[0, 1]", color_jitter=color_jitter)
        self.augment, self.color_jitter = augment, color_jitter
        self.set_input(image_size, mean, std)

    def set_input(self, image_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set what the network takes; the arguments are those of the class."""
        check_whole_numbers(image_size=image_size)
        self.image_size = image_size
        if self.augment == "none":
            steps = [v2.Resize(round(image_size * 256 / 224)), v2.CenterCrop(image_size)]
        else:
            jitter = self.color_jitter
            steps = [v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip()]
            if jitter:
                steps.append(v2.ColorJitter(jitter, jitter, jitter))
        if self.augment == "randaugment":
            steps.append(v2.RandAugment())
        elif self.augment == "autoaugment":
            steps.append(v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET))
        steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
        self.steps = v2.Compose(steps)

    def needs_host(self) -> str:
        """The setting that runs on PIL images alone, or nothing: crops and flips run on tensors too, on any device."""
        if self.augment in ("randaugment", "autoaugment"):
            return f"data.augment={self.augment}"
        return f"data.color_jitter={self.color_jitter:g}" if self.color_jitter and self.augment != "none" else ""

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform an RGB image of any size into float32 (3, S, S)."""
        transformed: Tensor = self.steps(image)
        return transformed
