"""Gradient checkpointing of a network's blocks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from imbsam.errors import SettingError
from lightning_modules.backbones.blocks import named_blocks


def checkpoint_blocks(network: nn.Module) -> None:
    """Keep no activations inside the blocks, and compute them again in the backward pass.

    The same random numbers are drawn again (dropout), so the gradient is the same.

    Args:
        network: changed in place.

    Raises:
        SettingError: it has no blocks.
    """
    blocks = named_blocks(network)
    if not blocks:
        raise SettingError(
            f"gradient_checkpointing is true, and {type(network).__name__} has no blocks: set it to false"
        )
    for _, block in blocks:
        block.forward = partial(_checkpointed, block.forward)  # type: ignore[method-assign]


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
