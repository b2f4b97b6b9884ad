"""Weights of a network from a local file."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from imbsam.errors import SettingError
from imbsam.messages import first_few
from lightning_modules.backbones.heads import classifier_name

__all__ = ["load_weights", "read_file"]

_NESTED = ("state_dict", "model")
"""Under which keys training scripts keep the network's state_dict."""


def load_weights(network: nn.Module, path: str | Path) -> list[str]:
    """Copy a file's weights into a network, and say how many they were.

    Args:
        network: a classification network, with any head; changed in place.
        path: a state_dict (``.pt``, ``.pth``, read with ``weights_only=True``, or ``.safetensors``), on its own or
            under the key "state_dict" or "model"; or a checkpoint of ours (``.ckpt``). The prefix ``module.`` of
            ``DataParallel`` is taken away.

    Returns:
        the classifier's tensors that stay as they were initialised: all of them, where the file's do not fit
        (another number of classes, another head, or none).

    Raises:
        SettingError: the file cannot be read, or another tensor is missing, left over or of another shape.
    """
    found, own = _state_dict(path), network.state_dict()
    head = classifier_name(network) + "."
    of_head = [name for name in own if name.startswith(head)]
    left = []
    if {name for name in found if name.startswith(head)} != set(of_head) or any(
        found[name].shape != own[name].shape for name in of_head
    ):
        left = of_head
        found = {name: tensor for name, tensor in found.items() if not name.startswith(head)}
    # files of torch before 0.4.1 have no such counter
    missing = [n for n in own if n not in found and n not in left and not n.endswith("num_batches_tracked")]
    shapes = [n for n in found if n in own and found[n].shape != own[n].shape]
    other = [f"{n} is {tuple(found[n].shape)}, not {tuple(own[n].shape)}" for n in shapes]
    wrong = [(names, what) for names, what in (
        (missing, "missing"), ([n for n in found if n not in own], "unknown"), (other, "of another shape")
    ) if names]  # fmt: skip
    if wrong:
        raise SettingError(
            f"backbone_weights is {path}, which does not fit {type(network).__name__}: "
            + "; ".join(f"{len(names)} {what} ({first_few(names, 3)})" for names, what in wrong)
        )
    network.load_state_dict(found, strict=False)
    stays = f"; as initialised: {', '.join(left)}" if left else ""
    rank_zero_info(f"backbone_weights: {len(found)} of {len(own)} tensors from {path}{stays}")
    return left


def read_file(path: str | Path, setting: str) -> Any:
    """Read what torch or safetensors saved, on the CPU and without running code in it.

    Args:
        path: the file.
        setting: the setting that named it, for the error.

    Raises:
        SettingError: there is no such file, or it cannot be read.
    """
    if not Path(path).is_file():
        what = "a folder" if Path(path).is_dir() else "no such file"
        raise SettingError(f"{setting} is {path}: {what}; name a file")
    if Path(path).suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise SettingError(f"{setting} is {path}: reading it needs safetensors; pip install safetensors") from error
        try:
            return load_file(path)
        except Exception as error:  # its own class, which is not public
            raise SettingError(f"{setting} is {path}: {' '.join(str(error).split())}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SettingError(
            f"{setting} is {path}: it is no file of torch, or holds more than tensors and numbers; load it where you "
            "trust it and save its state_dict"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise SettingError(f"{setting} is {path}: it is cut off or no file of torch") from error


def _state_dict(path: str | Path) -> dict[str, Tensor]:
    """The network's tensors by their names in the network."""
    found = read_file(path, "backbone_weights")
    for key in _NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not any(isinstance(value, Tensor) for value in found.values()):
        raise SettingError(f"backbone_weights is {path}: it holds no state_dict; save model.state_dict()")
    found = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    for prefix, others in (("backbone.", False), ("module.", True)):  # a checkpoint of ours has more than the backbone
        if any(name.startswith(prefix) for name in found):
            found = {n.removeprefix(prefix): t for n, t in found.items() if others or n.startswith(prefix)}
    return found
