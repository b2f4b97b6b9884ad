"""Weights of a network from a local file."""

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from imbsam.errors import SettingError
from imbsam.messages import first_few
from lightning_modules.backbones.heads import classifier_name

__all__ = ["load_weights", "mismatch", "read_file"]


def load_weights(network: nn.Module, path: str | Path) -> list[str]:
    """Copy a file's weights into a network, and print how many they are.

    Args:
        network: a classification network, with any head; changed in place.
        path: a state_dict (``.pt``, ``.pth``, read with ``weights_only=True``, or ``.safetensors``), on its own or
            under the key "state_dict" or "model"; or a checkpoint of imbsam (``.ckpt``). The prefix ``module.`` of
            ``DataParallel`` is removed.

    Returns:
        the tensors of the classifier that keep their initialization: all of them if the file's do not fit (another
        number of classes, another head, or none).

    Raises:
        SettingError: the file cannot be read, or another tensor is missing, unknown or of another shape.
    """
    weights, own = _read_state_dict(path), network.state_dict()
    head = classifier_name(network) + "."
    kept = {name: tensor for name, tensor in own.items() if name.startswith(head)}
    if mismatch({name: tensor for name, tensor in weights.items() if name.startswith(head)}, kept):
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(head)}
    else:
        kept = {}
    # files of torch before 0.4.1 have no num_batches_tracked
    optional = [name for name in own if name.endswith("num_batches_tracked") and name not in weights]
    if wrong := mismatch(weights, {n: t for n, t in own.items() if n not in kept and n not in optional}):
        raise SettingError(f"backbone_weights is {path}, which does not fit {type(network).__name__}: {wrong}")
    network.load_state_dict(weights, strict=False)
    stays = f"; as initialized: {', '.join(kept)}" if kept else ""
    rank_zero_info(f"backbone_weights: {len(weights)} of {len(own)} tensors from {path}{stays}")
    return list(kept)


def mismatch(weights: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """How tensors differ from a network's in names and shapes, or "" if they fit.

    Example:
        >>> mismatch({"a": torch.ones(2)}, {"a": torch.ones(3), "b": torch.ones(1)})
        '1 missing (b), 1 of another shape (a is (2,), not (3,))'
    """
    shapes = {n: (weights[n], own[n]) for n in own if n in weights and isinstance(own[n], Tensor)}
    wrong = {
        "missing": [name for name in own if name not in weights],
        "unknown": [name for name in weights if name not in own],
        "of another shape": [
            f"{n} is {tuple(a.shape)}, not {tuple(b.shape)}" for n, (a, b) in shapes.items() if a.shape != b.shape
        ],
    }
    return ", ".join(f"{len(names)} {what} ({first_few(names, 3)})" for what, names in wrong.items() if names)


def read_file(path: str | Path, setting: str, weights_only: bool = True, mmap: bool = False) -> Any:
    """Read what torch or safetensors saved, to the CPU and without running code in it.

    Args:
        path: the file.
        setting: the setting that named it, for the error.
        weights_only: as in torch.load; false runs code in the file.
        mmap: as in torch.load; true leaves tensors on the disk until they are used.

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
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*TorchScript archive.*")  # refused below
            return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise SettingError(
                f"{setting} is {path}: it holds {code[1]} beside tensors and plain data: reading that could run code, "
                "so it is refused; save it again without that object"
            ) from error
        raise SettingError(f"{setting} is {path}: it is cut off, or not a file of torch.save") from error


def _read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The network's tensors by their names in the network."""
    content = read_file(path, "backbone_weights")
    for key in ("state_dict", "model"):  # where training scripts save the network's state_dict
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise SettingError(f"backbone_weights is {path}: it holds no state_dict; save model.state_dict()")
    weights = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if any(name.startswith("backbone.") for name in weights):  # our checkpoints have more than the backbone
        weights = {n.removeprefix("backbone."): t for n, t in weights.items() if n.startswith("backbone.")}
    return {n.removeprefix("module."): t for n, t in weights.items()}
