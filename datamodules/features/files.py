"""Files of features: the inputs of a network's classifier for every sample, and what they depend on."""

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imbsam.errors import SettingError

FORMAT = 1
PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Features:
    """Features of one part of the data.

    Attributes:
        features: float32 (N, 1 + copies, d): without augmentation, then the augmented copies.
        labels: int64 (N,).
    """

    features: Tensor
    labels: Tensor


def write_features(path: Path, parts: Mapping[str, Features], description: Mapping[str, Any]) -> None:
    """Write a file (.npz) in one move, so that an interrupted command leaves none.

    Args:
        path: the file.
        parts: train, test and perhaps val.
        description: plain data: what the features depend on, with ``class_names``.
    """
    arrays = {f"{name}_{field}": getattr(part, field).numpy() for name, part in parts.items() for field in vars(part)}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        np.savez(file, description=np.asarray(json.dumps({"format": FORMAT, **description})), **arrays)
    os.replace(unfinished, path)


def read_features(path: Path) -> tuple[dict[str, Features], dict[str, Any]]:
    """Read what :func:`write_features` wrote.

    Returns:
        The parts by their names, and the description.

    Raises:
        SettingError: the file is missing, cut off, or of another kind.
    """
    again = "make it with imbsam features"
    if not path.is_file():
        raise SettingError(f"data.path is {path}: there is no such file; {again}")
    try:
        with np.load(path, allow_pickle=False) as file:
            if "description" not in file.files:
                raise SettingError(f"data.path is {path}, which holds no features; {again}")
            description: dict[str, Any] = json.loads(str(file["description"]))
            if description["format"] != FORMAT:
                raise SettingError(f"data.path is {path}, in the format of another version of imbsam: {again} again")
            arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "description"}
        fields = ("features", "labels")
        parts = {n: Features(*(arrays[f"{n}_{f}"] for f in fields)) for n in PARTS if f"{n}_labels" in arrays}
        parts["train"], parts["test"]
        return parts, description
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise SettingError(f"data.path is {path}, which cannot be read ({reason}); {again} again") from error
