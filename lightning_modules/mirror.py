"""Prediction from an image and its mirror image."""

from collections.abc import Callable

from torch import Tensor


def average_with_mirrored(logits: Tensor, forward: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The mean of the logits of each image and of its mirror image, left to right.

    Args:
        logits: those of the images, (B, C).
        forward: from images to logits.
        images: (B, channels, H, W).

    Returns:
        Logits (B, C).
    """
    return (logits + forward(images.flip(-1))) / 2
