"""Positional embeddings for another image size than that of their training."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_PREFIXES = (1, 0, 2, 5)
"""Numbers of tokens before the grid: a class token, none, a distillation token too, four registers too."""


def is_positional_embedding(name: str) -> bool:
    """Whether a tensor is a table of absolute positions, by its name in timm, torchvision, open_clip, transformers.

    Example:
        >>> is_positional_embedding("vision_model.embeddings.position_embedding.weight")
        True
    """
    last = name.removesuffix(".weight").rpartition(".")[2]  # transformers' CLIP has an nn.Embedding
    return last in ("pos_embed", "pos_embedding", "positional_embedding", "position_embedding", "position_embeddings")


def why_not_interpolated(name: str) -> str:
    """Why a table of positions of another shape does not fit, to be put behind a message; "" for another tensor."""
    if is_positional_embedding(name):
        return ": positions are interpolated from a square grid to a square grid alone"
    if "relative_position" in name or "relative_coords" in name:
        return ": relative positions are not interpolated: set the window and image size of the weights"
    return ""


def resample_positions(table: Tensor, positions: int) -> Tensor | None:
    """Interpolate a table of positions to another grid, bicubic with antialiasing.

    Args:
        table: floating (N, D) or (1, N, D): the tokens before the grid, then its positions in rows.
        positions: the new number M of all of them; both grids must be square.

    Returns:
        A table of M positions, of the same dtype; None if no grid fits.

    Source:
        Dosovitskiy et al., *An Image is Worth 16x16 Words*, ICLR 2021, arXiv 2010.11929, section 3.2.

    Example:
        >>> import torch
        >>> resample_positions(torch.ones(1, 197, 8), 37).shape
        torch.Size([1, 37, 8])
    """
    old = table.shape[-2]
    for prefix in _PREFIXES:
        sides = [math.isqrt(max(0, number - prefix)) for number in (old, positions)]
        if min(sides) == 0 or [side**2 + prefix for side in sides] != [old, positions]:
            continue
        before, grid = table[..., :prefix, :], table[..., prefix:, :]
        image = grid.reshape(1, sides[0], sides[0], -1).permute(0, 3, 1, 2).float()
        image = F.interpolate(image, size=(sides[1], sides[1]), mode="bicubic", antialias=True)
        resampled = image.permute(0, 2, 3, 1).reshape(*grid.shape[:-2], sides[1] ** 2, -1).to(table.dtype)
        return torch.cat([before, resampled], dim=-2)
    return None
