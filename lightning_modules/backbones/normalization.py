"""The normalisation that a backbone's ``norm`` setting chooses."""

import math

from torch import nn

from imbsam.errors import SettingError

__all__ = ["norm_layer"]


def norm_layer(norm: str, channels: int) -> nn.Module:
    """Return a normalisation of ``channels`` feature maps.

    Args:
        norm: "batch" for BatchNorm, "group" for GroupNorm, with which the samples of a batch do not see each other.
        channels: the number of feature maps, >= 1.

    Returns:
        ``nn.BatchNorm2d``, or ``nn.GroupNorm`` with groups of 8 channels or more, and at most 32 groups (a
        divisor of ``channels``, so fewer where that does not divide it).

    Raises:
        SettingError: ``norm`` is another name.

    Source:
        Wu and He, *Group Normalization*, ECCV 2018, arXiv 1803.08494 (32 groups by default).

    Example:
        >>> norm_layer("group", 64).num_groups
        8
    """
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        return nn.GroupNorm(math.gcd(32, max(1, channels // 8), channels), channels)
    raise SettingError(f"norm is {norm}: choose one of batch, group")
