"""The files of CIFAR-10 and CIFAR-100: downloaded by torchvision, read by an unpickler that runs no code.

torchvision's own reader refuses files whose checksums are not those of the original archive, such as files that were
rebuilt from lossless images, and would run any code in a pickle that passes.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import download_and_extract_archive

from datamodules.image_arrays.dataset import ImageArrays
from imbsam.errors import SettingError

_ARRAY_NAMES: dict[str, Any] = {
    "_codecs.encode": str.encode,  # how protocols up to 2 write bytes
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "numpy._core.multiarray._reconstruct": np.empty(0).__reduce__()[0],
    "numpy._core.numeric._frombuffer": np.empty(0).__reduce_ex__(5)[0],
}
_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


def fetch_cifar(root: Path, source: type[CIFAR10]) -> None:
    """Download the archive, check its checksum and extract it, unless its folder exists.

    An archive that is already in ``root`` is not downloaded again.

    Args:
        root: Folder that holds, or will hold, the data set's folder.
        source: torchvision's class of the data set, for its names, address and checksum.

    Raises:
        SettingError: The folder is missing and the archive cannot be downloaded.
    """
    if (root / source.base_folder).exists():
        return
    try:
        download_and_extract_archive(source.url, root, filename=source.filename, md5=source.tgz_md5)
    except (OSError, RuntimeError) as error:  # no network, no permission, full disk; a wrong checksum
        reason = " ".join(str(error).split())
        raise _missing(root, source, f"downloading {source.filename} failed ({reason})") from error


def read_cifar(root: Path, source: type[CIFAR10]) -> tuple[ImageArrays, ImageArrays, list[str]]:
    """Read the training set, the test set and the class names, whatever the files' checksums.

    Args:
        root: Folder that holds the data set's folder.
        source: torchvision's class of the data set, for its names.

    Returns:
        Training set and test set, images of (3, 32, 32), and the C names of the classes.

    Raises:
        SettingError: A file is missing, cut off or not what its name says.
    """
    folder = root / source.base_folder
    if not folder.exists():
        raise _missing(root, source, "it was not downloaded (prepare_data() does that)")
    file = source.meta["filename"]
    try:
        names = _unpickle(folder / file)[source.meta["key"]]
        if not isinstance(names, list) or not names:
            raise ValueError("no class names")
        parts = []
        for files in (source.train_list, source.test_list):
            batches = []
            for file, _ in files:
                batches.append(_images(_unpickle(folder / file), len(names)))
            images, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
            parts.append(ImageArrays(images, labels))
    except Exception as error:  # a damaged pickle may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        damage = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({reason})"
        raise SettingError(
            f"data.root is {root}, where {source.base_folder}/{file} {damage}: delete that folder and run again to "
            f"download it, or extract {source.filename} (from {_PAGE}) there again"
        ) from error
    return parts[0], parts[1], names


def _images(batch: dict[str, Any], num_classes: int) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(batch["data"]).view(-1, 3, 32, 32)
    labels = torch.tensor(batch["fine_labels"] if "fine_labels" in batch else batch["labels"])
    ImageArrays(images, labels)  # checks dtypes and shapes
    if not len(labels) or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"no images, or labels outside [0, {num_classes})")
    return images, labels


def _unpickle(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        content: dict[str, Any] = _ArrayUnpickler(stream, encoding="latin1").load()
    return content


class _ArrayUnpickler(pickle.Unpickler):
    """Makes numpy arrays and Python's basic types; a pickle may otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        """The few names that a pickled array needs; no other is imported."""
        # numpy 1 and numpy 2 call the same module by different names
        name = f"{module.replace('numpy.core', 'numpy._core')}.{name}"
        if name not in _ARRAY_NAMES:
            raise pickle.UnpicklingError(f"it asks for {name}, which is no array")
        return _ARRAY_NAMES[name]


def _missing(root: Path, source: type[CIFAR10], what: str) -> SettingError:
    return SettingError(
        f"data.root is {root}, which has no folder {source.base_folder}, and {what}: set data.root to the "
        f"folder that holds {source.base_folder}, or extract {source.filename} (from {_PAGE}) there"
    )
