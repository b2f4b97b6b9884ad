"""The images that one long-tailed split needs, in a single compressed file."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base.long_tailed import LongTailedDataModule
from datamodules.image_arrays.dataset import ImageArrays
from imbsam.errors import SettingError


class PackedImages(Dataset[tuple[Tensor, Tensor]]):
    """A data set of N images, M of which are present; like :class:`ImageArrays` for those.

    It keeps the labels of all N images, so that the same seed draws the same samples from it as from the whole set.

    Args:
        images: The images that are present, uint8 (M, C, H, W).
        indices: Their indices in the whole set, int64 (M,).
        labels: Class indices of the whole set, int64 (N,).
    """

    def __init__(self, images: Tensor, indices: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels
        self.row = torch.full_like(labels, -1)
        self.row[indices] = torch.arange(len(indices))

    def __len__(self) -> int:
        """Number of images N of the whole set."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One image, uint8 (C, H, W), and its label, int64 ()."""
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A batch of B images, uint8 (B, C, H, W), and their labels, int64 (B,).

        Raises:
            SettingError: An image is not in the file.
        """
        wanted = torch.tensor(indices, dtype=torch.int64)
        rows = self.row[wanted]
        if bool((rows < 0).any()):
            raise SettingError(
                f"{int((rows < 0).sum())} of the samples drawn are not in the packed file: it holds those of one seed, "
                "ratio and profile; set data.seed and data.profile to those, and data.ratio to that or a larger one"
            )
        return self.images[rows], self.labels[wanted]


def pack_images(path: Path, data: LongTailedDataModule) -> None:
    """Write the training and validation images of a DataModule and all test images, without loss, to one file.

    Args:
        path: The file, its name ending in ``.npz``.
        data: A DataModule of :class:`~datamodules.image_arrays.dataset.ImageArrays`.

    Raises:
        SettingError: The DataModule's images are not arrays in memory.
    """
    data.setup()
    indices = data.kept_samples
    train, _, test = data.load_datasets()
    if not isinstance(train, ImageArrays) or not isinstance(test, ImageArrays):
        raise SettingError(
            f"the images of {type(data).__name__} are not arrays in memory: only such data sets are packed"
        )
    np.savez_compressed(
        path,
        train_images=train.images[indices].numpy(),
        train_indices=indices.numpy().astype(np.int32),
        train_labels=train.labels.numpy().astype(np.int16),
        test_images=test.images.numpy(),
        test_labels=test.labels.numpy().astype(np.int16),
        class_names=np.asarray(data.class_names),
    )


def read_packed(path: Path) -> tuple[PackedImages, ImageArrays, list[str]]:
    """Read what :func:`pack_images` wrote: training set, test set and class names.

    Raises:
        SettingError: The file is missing, cut off, or another kind of file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
        images, test_images = (torch.from_numpy(content[f"{part}_images"]) for part in ("train", "test"))
        labels, test_labels = (torch.from_numpy(content[f"{part}_labels"]).long() for part in ("train", "test"))
        train = PackedImages(images, torch.from_numpy(content["train_indices"]).long(), labels)
        return train, ImageArrays(test_images, test_labels), content["class_names"].tolist()
    except (OSError, EOFError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise SettingError(
            f"data.root={str(path)!r} cannot be read ({reason}): make the file again with scripts/reproduce.py pack"
        ) from error
