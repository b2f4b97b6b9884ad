"""Random crop, flip, AutoAugment and normalization of a whole batch of images at once."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from datamodules.sampling.sample_seeds import random_integers, seeded


class BatchTransform:
    """Turns a batch of pixels into the network's input; made to be a loader's ``collate_fn``.

    In order: random crop, random flip, AutoAugment, conversion to float32, resizing, ``(pixel - mean) / std``. What is
    random about an image depends on its seed alone, not on the rest of the batch.

    Args:
        mean: Mean of each channel, in units of the pixels (0 to 255 for most images).
        std: Standard deviation of each channel, in units of the pixels.
        crop_padding: Padding of the random crop in pixels, as in :func:`random_crop`; 0 crops nothing.
        flip: Mirror each image left to right with probability 1/2.
        autoaugment: AutoAugment with its policy for CIFAR-10 (Cubuk et al., CVPR 2019), for images of 3 channels.
        image_size: Resize to this side, bicubic with antialiasing, at the end; None for the size of the pixels.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        crop_padding: int = 0,
        flip: bool = False,
        autoaugment: bool = False,
        image_size: int | None = None,
    ) -> None:
        self.set_input(mean, std, image_size)
        self.crop_padding = crop_padding
        self.flip = flip
        self.policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10) if autoaugment else None

    def set_input(self, mean: Sequence[float], std: Sequence[float], image_size: int | None) -> None:
        """Set what the network takes; the arguments are those of the class."""
        self.mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
        self.image_size = image_size

    def normalize(self, images: Tensor) -> Tensor:
        """Pixels (..., C, H, W) to the network's input, float32, without augmentation."""
        images = images.float()
        if self.image_size not in (None, images.shape[-1]):
            images = F.interpolate(
                images.view(-1, *images.shape[-3:]), size=(self.image_size,) * 2, mode="bicubic", antialias=True
            ).view(*images.shape[:-2], self.image_size, self.image_size)
        return images.sub_(self.mean).div_(self.std)

    def __call__(self, batch: tuple[Tensor, Tensor], seeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Transform the images and pass the labels through.

        Args:
            batch: Pixels, uint8 (B, C, H, W), and labels, int64 (B,).
            seeds: One seed for each image, int64 (B,), from the training loader; None draws them from torch's default
                generator.

        Returns:
            Images, float32 (B, C, H, W), and the same labels.
        """
        images, labels = batch
        if self.crop_padding or self.flip or self.policy is not None:
            seeds = torch.randint(2**63 - 1, (len(images),)) if seeds is None else seeds
            if self.crop_padding:
                images = random_crop(images, self.crop_padding, seeds)
            if self.flip:
                images = random_flip(images, seeds)
            if self.policy is not None:
                images = augment_each(self.policy, images, seeds)
        return self.normalize(images), labels


def random_crop(images: Tensor, padding: int, seeds: Tensor) -> Tensor:
    """Shift each image by up to ``padding`` pixels along either axis, every shift equally likely.

    This is torchvision's ``RandomCrop(size, padding)`` with a shift for each image: a crop of the original size from
    the image padded with zeros, which are black before normalization.

    Args:
        images: Pixels of any dtype (B, C, H, W).
        padding: Largest shift in pixels, at least 0.
        seeds: One seed for each image, int64 (B,).

    Returns:
        The shifted images, of the same dtype and shape.
    """
    size, _, height, width = images.shape
    windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
    down, right = (random_integers(seeds, 2 * padding + 1, draw) for draw in (0, 1))
    return windows[torch.arange(size, device=images.device), :, down, right]


def random_flip(images: Tensor, seeds: Tensor) -> Tensor:
    """Mirror each image left to right with probability 1/2.

    Args:
        images: Pixels of any dtype (B, C, H, W).
        seeds: One seed for each image, int64 (B,).

    Returns:
        The images, of the same dtype and shape.
    """
    mirrored = (random_integers(seeds, 2, draw=2) == 1).view(-1, 1, 1, 1)
    return torch.where(mirrored, images.flip(3), images)


def augment_each(transform: Callable[[Tensor], Tensor], images: Tensor, seeds: Tensor) -> Tensor:
    """Apply a transform that draws from torch's default generator to each image, under the image's own seed.

    Args:
        transform: From an image to an image of the same dtype and shape, such as torchvision's AutoAugment.
        images: Pixels (B, C, H, W).
        seeds: One seed for each image, int64 (B,).

    Returns:
        The images, of the same dtype and shape.
    """
    augmented = []
    for image, seed in zip(images, seeds.tolist(), strict=True):
        with seeded(seed):
            augmented.append(transform(image))
    return torch.stack(augmented)
