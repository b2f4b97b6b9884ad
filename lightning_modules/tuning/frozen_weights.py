"""Checkpoints without the frozen weights: taking these out, and putting them back from the pretrained network."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from imbsam.errors import SettingError
from lightning_modules.weight_files import FROZEN_WEIGHTS, digest

STATES = {"state_dict", "current_model_state"}
"""In a checkpoint: the weights; with Lightning's WeightAveraging, their average and then the weights themselves."""


def frozen_digest(network: nn.Module, names: Sequence[str]) -> str:
    """A SHA-256 of some tensors of a network, in bfloat16: it is the same for frozen weights in either precision."""
    state = network.state_dict()
    tensors = {name: state[name].cpu() for name in names}
    return digest({n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in tensors.items()})


def leave_out(checkpoint: dict[str, Any], names: Sequence[str], found: str) -> None:
    """Leave the frozen weights out of a checkpoint.

    Args:
        checkpoint: Lightning's, changed in place.
        names: the frozen tensors of ``backbone``.
        found: their digest.
    """
    left_out = {f"backbone.{name}" for name in names}
    for key in STATES & checkpoint.keys():
        checkpoint[key] = {n: t for n, t in checkpoint[key].items() if n not in left_out}
    checkpoint[FROZEN_WEIGHTS] = found


def put_back(checkpoint: dict[str, Any], network: nn.Module, names: Sequence[str], source: str) -> None:
    """Put the frozen weights back into a checkpoint.

    Args:
        checkpoint: Lightning's, changed in place.
        network: with the pretrained weights.
        names: its frozen tensors.
        source: where they are from.

    Raises:
        SettingError: they are not those of the training.
    """
    if frozen_digest(network, names) != checkpoint[FROZEN_WEIGHTS]:
        raise SettingError(
            f"ckpt_path is a checkpoint without the frozen weights, and those of backbone_weights, {source}, are not "
            "the ones that it was trained with"
        )
    state: dict[str, Tensor] = network.state_dict()
    for key in STATES & checkpoint.keys():
        checkpoint[key] = {**checkpoint[key], **{f"backbone.{n}": state[n] for n in names}}
