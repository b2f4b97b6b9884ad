"""Gradient checkpointing of a network's blocks."""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from imbsam.capture.graphs import CaptureError
from imbsam.errors import SettingError
from lightning_modules.backbones.blocks import named_blocks


def checkpoint_blocks(network: nn.Module) -> None:
    """Keep no activations inside the blocks, and compute them again in the backward pass.

    The same random numbers are drawn again (dropout), so the gradient is the same. For that the generators are read,
    which a CUDA graph forbids: blocks that draw cannot be captured, and others are captured without it.

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
        block.forward = _CheckpointedForward(block)  # type: ignore[method-assign]


class _CheckpointedForward:
    """The forward of a block, which keeps no activations.

    Args:
        block: the block, with the forward of its class.
    """

    def __init__(self, block: nn.Module) -> None:
        self._forward = block.forward
        self._name = type(block).__name__
        self._draws = False
        """Whether the last forward that was not captured has drawn on the GPU; a warm-up comes before every capture."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        if torch.compiler.is_compiling() or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return self._checkpointed(*args, **kwargs)
        if torch.cuda.is_current_stream_capturing():
            if self._draws:
                raise CaptureError(
                    f"gradient_checkpointing is true, and {self._name} draws random numbers (dropout, stochastic "
                    "depth), which a graph cannot draw again"
                )
            return self._checkpointed(*args, preserve_rng_state=False, **kwargs)
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        before = generator.get_offset()
        found = self._checkpointed(*args, **kwargs)
        self._draws = generator.get_offset() != before
        return found

    def _checkpointed(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self._forward, *args, use_reentrant=False, **kwargs)
