"""The files of CIFAR-10 and CIFAR-100 in torchvision's layout: fetched where missing, read without trust."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
    """Download and extract the archive where its folder is missing; a folder that is there is never touched.

    The checksum of the archive is checked. An archive that already lies in ``root`` is not downloaded again.

    Args:
        root: Folder that holds, or shall hold, the data set's folder.
        source: torchvision's class of the data set, for its names, address and checksum.

    Raises:
        SettingError: The folder is missing and the archive cannot be had.
    """
    if (root / source.base_folder).exists():
        return
    try:
        download_and_extract_archive(source.url, root, filename=source.filename, md5=source.tgz_md5)
    except (OSError, RuntimeError) as error:  # no network, no permission, full disk; a wrong checksum
        reason = " ".join(str(error).split())
        raise SettingError(_missing(root, source, f"downloading {source.filename} failed ({reason})")) from error


def read_cifar(root: Path, source: type[CIFAR10]) -> tuple[ImageArrays, ImageArrays, list[str]]:
    """Read the training set, the test set and the class names.

    Files are read as found, whatever their checksums, by an unpickler that makes numpy arrays and basic
    types only.

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
        raise SettingError(_missing(root, source, "it was not downloaded (prepare_data() does that)"))
    meta = _unpickle(root, source, source.meta["filename"])
    names = meta.get(source.meta["key"])
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise SettingError(_broken(root, source, source.meta["filename"], "has no class names"))
    train = _read_batches(root, source, [name for name, _ in source.train_list], len(names))
    test = _read_batches(root, source, [name for name, _ in source.test_list], len(names))
    return train, test, names


def _read_batches(root: Path, source: type[CIFAR10], files: Sequence[str], num_classes: int) -> ImageArrays:
    images, labels = [], []
    for file in files:
        batch = _unpickle(root, source, file)
        pixels = batch.get("data")
        targets = np.asarray(batch.get("fine_labels", batch.get("labels")))
        if (
            not isinstance(pixels, np.ndarray)
            or pixels.dtype != np.uint8
            or pixels.shape[1:] != (3 * 32 * 32,)
            or len(pixels) == 0
        ):
            raise SettingError(_broken(root, source, file, "has no uint8 pixels of shape (N, 3072)"))
        if targets.shape != pixels.shape[:1] or targets.dtype.kind not in "iu":
            raise SettingError(_broken(root, source, file, f"has no labels for its {len(pixels)} images"))
        if targets.min() < 0 or targets.max() >= num_classes:
            raise SettingError(_broken(root, source, file, f"has labels outside [0, {num_classes})"))
        images.append(pixels)
        labels.append(targets)
    pixels = torch.from_numpy(np.concatenate(images)).view(-1, 3, 32, 32)
    return ImageArrays(pixels, torch.from_numpy(np.concatenate(labels)).long())


def _unpickle(root: Path, source: type[CIFAR10], file: str) -> dict[str, Any]:
    try:
        with (root / source.base_folder / file).open("rb") as stream:
            content = _ArrayUnpickler(stream, encoding="latin1").load()
    except FileNotFoundError as error:
        raise SettingError(_broken(root, source, file, "is missing")) from error
    except Exception as error:  # a damaged pickle may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SettingError(_broken(root, source, file, f"cannot be read ({reason})")) from error
    if not isinstance(content, dict):
        raise SettingError(_broken(root, source, file, f"holds a {type(content).__name__}, not a dictionary"))
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


def _missing(root: Path, source: type[CIFAR10], what: str) -> str:
    return (
        f"data.root={str(root)!r} has no folder {source.base_folder}, and {what}: set data.root to the "
        f"folder that holds {source.base_folder}, or extract {source.filename} (from {_PAGE}) there."
    )


def _broken(root: Path, source: type[CIFAR10], file: str, what: str) -> str:
    return (
        f"data.root={str(root)!r}: {source.base_folder}/{file} {what}: delete that folder and run again to "
        f"download it, or extract {source.filename} (from {_PAGE}) there anew."
    )
