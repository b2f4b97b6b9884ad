"""Files with weights: read without running code in them, and compared with a network; weights by their digest."""

import hashlib
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imbsam.errors import SettingError
from imbsam.messages import first_few

FROZEN_WEIGHTS = "frozen_weights"
"""In a checkpoint of the trained part alone: the digest of the weights that it leaves out."""


def is_adapter(name: str) -> bool:
    """Whether a tensor was added by LoRA or AdaptFormer, by its full name."""
    return "lora_" in name or ".adapter." in name


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


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of tensors and their names, hexadecimal.

    Example:
        >>> digest({"a": torch.zeros(2)}) == digest({"a": torch.zeros(2)}) != digest({"b": torch.zeros(2)})
        True
    """
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def read_file(
    path: str | Path,
    setting: str,
    weights_only: bool = True,
    mmap: bool = False,
    instead: str = "save it again without that object",
) -> Any:
    """Read what torch or safetensors saved, to the CPU and without running code in it.

    Args:
        path: the file.
        setting: the setting that named it, for the error.
        weights_only: as in torch.load; false runs code in the file.
        mmap: as in torch.load; true leaves tensors on the disk until they are used.
        instead: what to do with a file that could run code.

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
                f"so it is refused; {instead}"
            ) from error
        raise SettingError(f"{setting} is {path}: it is cut off, or not a file of torch.save") from error
