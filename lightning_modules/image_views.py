"""Views of an image whose logits a test averages: mirror images and crops."""

import torch.nn.functional as F
from torch import Tensor


def five_crops(images: Tensor, enlarge: int) -> list[Tensor]:
    """Enlarge images, and crop their centre and corners at the size that they had.

    Args:
        images: floating (B, channels, H, W).
        enlarge: pixels by which height and width grow (bilinear), >= 1.

    Returns:
        Five tensors (B, channels, H, W): the centre, then the corners row by row.

    Source:
        The test-time ensembling of Shi et al., *Long-Tail Learning with Foundation Model: Heavy Fine-Tuning Hurts*
        (LIFT), ICML 2024, arXiv 2309.10019, which resizes the image's file to 224 + 24 pixels: no multiple of the 16
        pixels of a ViT's patch, so that the crops cut the patches elsewhere.
    """
    height, width = images.shape[-2:]
    large = F.interpolate(images, size=(height + enlarge, width + enlarge), mode="bilinear", align_corners=False)
    middle = enlarge // 2
    corners = [(top, left) for top in (0, enlarge) for left in (0, enlarge)]
    return [large[..., top : top + height, left : left + width] for top, left in [(middle, middle), *corners]]


def image_views(images: Tensor, mirror: bool, enlarge: int | None) -> list[Tensor]:
    """The views of a test.

    Args:
        images: floating (B, channels, H, W).
        mirror: add the mirror image of every view.
        enlarge: take :func:`five_crops` in place of the image itself; None for the image.

    Returns:
        1, 2, 5 or 10 tensors (B, channels, H, W).
    """
    views = [images] if enlarge is None else five_crops(images, enlarge)
    return [*views, *(view.flip(-1) for view in views)] if mirror else views
