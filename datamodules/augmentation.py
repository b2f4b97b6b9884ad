"""Random crop, flip and normalisation of a whole batch of images at once."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class BatchTransform:
    """Turns a batch of pixels into the network's input; made to be a loader's ``collate_fn``.

    In order: random crop, random flip, conversion to float32, ``(pixel - mean) / std``. The random numbers
    come from torch's default generator: the main process's, or the one the loader seeds in each worker.

    Args:
        mean: Mean of each channel, in units of the pixels (0 to 255 for most images).
        std: Standard deviation of each channel, in units of the pixels.
        crop_padding: Padding of the random crop in pixels, as in :func:`random_crop`; 0 crops nothing.
        flip: Mirror each image left to right with probability 1/2.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], crop_padding: int = 0, flip: bool = False) -> None:
        self.mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
        self.crop_padding = crop_padding
        self.flip = flip

    def __call__(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Transform the images and hand the labels through.

        Args:
            batch: Pixels, uint8 (B, C, H, W), and labels, int64 (B,).

        Returns:
            Images, float32 (B, C, H, W), and the same labels.
        """
        images, labels = batch
        if self.crop_padding:
            images = random_crop(images, self.crop_padding)
        if self.flip:
            images = random_flip(images)
        return images.float().sub_(self.mean).div_(self.std), labels


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Shift each image by up to ``padding`` pixels along either axis, every shift equally likely.

    That is a random crop of the images' own size from the images padded with zeros. Padded before
    normalisation, as in torchvision's ``RandomCrop(size, padding)``, the border is black.

    Args:
        images: Pixels of any dtype (B, C, H, W).
        padding: Largest shift in pixels, at least 0.

    Returns:
        The shifted images, of the same dtype and shape.
    """
    size, _, height, width = images.shape
    windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
    down, right = torch.randint(2 * padding + 1, (2, size), device=images.device)
    return windows[torch.arange(size, device=images.device), :, down, right]


def random_flip(images: Tensor) -> Tensor:
    """Mirror each image left to right with probability 1/2.

    Args:
        images: Pixels of any dtype (B, C, H, W).

    Returns:
        The images, of the same dtype and shape.
    """
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(3), images)
