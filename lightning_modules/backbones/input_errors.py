"""Images that do not fit a network, in one line."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from imbsam.errors import SettingError

FAILURES = (RuntimeError, AssertionError, ValueError)
"""What networks raise for such images."""


def input_error(network: nn.Module, images: Tensor, choice: Any = None) -> SettingError | None:
    """Why a forward has failed, if it is the images' size or channels.

    Args:
        network: the network.
        images: what it was called with.
        choice: the setting ``backbone`` as in a config, for the message.

    Returns:
        None for any other reason.
    """
    if images.dim() != 4:
        return None
    name = type(network).__name__
    if isinstance(choice, Mapping):
        name = " ".join([choice["class_path"].rpartition(".")[2], *filter(None, [choice["init_args"].get("name")])])
    stem = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    if stem is not None and images.shape[1] != stem.in_channels:
        return SettingError(
            f"backbone {name} takes images of {stem.in_channels} channels and these have {images.shape[1]}: set "
            f"backbone.in_channels to {images.shape[1]} (in_chans for timm's), or choose another backbone"
        )
    size, found = _size_of(network), images.shape[-1]
    if size is not None and size != found:
        return SettingError(
            f"backbone {name} takes images of {size} pixels and these have {found}: set data.image_size to {size}, "
            f"or the size in model.backbone.settings to {found} (img_size for Timm, force_image_size for OpenCLIP, "
            "image_size for others), at which pretrained positions are interpolated"
        )
    return None


def _size_of(network: nn.Module) -> int | None:
    """The only size of images that a network takes, where it says; the libraries' transformers do."""
    for module in network.modules():
        for attribute in ("img_size", "image_size"):
            size = getattr(module, attribute, None)
            size = size[0] if isinstance(size, (tuple, list)) and size else size
            if isinstance(size, int):
                return size
    return None
