"""The images that one long-tailed split needs, in a single compressed file."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datamodules.base.long_tailed import LongTailedDataModule
from datamodules.image_arrays.dataset import ImageArrays
from datamodules.sampling.host_copies import copied_to, pinned_for
from imbsam.errors import SettingError


class PackedImages(ImageArrays):
    """A data set of N images, M of which are present.

    It keeps the labels of all N images, so that the same seed draws the same samples from it as from the whole set.

    Args:
        images: The images that are present, uint8 (M, C, H, W).
        indices: Their indices in the whole set, int64 (M,).
        labels: Class indices of the whole set, int64 (N,).
    """

    def __init__(self, images: Tensor, indices: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels
        self.position = torch.full_like(labels, -1)
        self.position[indices] = torch.arange(len(indices))

    def select(self, indices: Tensor) -> "PackedImages":
        """The images at these indices of the whole set, int64 (K,), even if some are not present."""
        positions = self.position[indices]
        present = torch.argwhere(positions >= 0).flatten()
        return PackedImages(self.images[positions[present]], present, self.labels[indices])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A batch of B images, uint8 (B, C, H, W), and their labels, int64 (B,), on the host.

        Raises:
            SettingError: An image is not in the file.
        """
        batch = torch.tensor(indices, dtype=torch.int64)
        positions = self.position[batch]
        if missing := int((positions < 0).sum()):
            raise SettingError(
                f"{missing} of the samples drawn are not in the packed file, which holds those of one seed, ratio and "
                "profile: set data.seed, data.profile and data.draw to those, and data.ratio to that or a larger one"
            )
        return self.images[copied_to(positions, self.device)], pinned_for(self.labels[batch], self.device)


def pack_images(path: Path, data: LongTailedDataModule) -> None:
    """Write the training and validation images of a DataModule and all test images, losslessly, to one file.

    Args:
        path: The file, its name ending in ``.npz``.
        data: A DataModule of :class:`~datamodules.image_arrays.dataset.ImageArrays`.

    Raises:
        SettingError: The DataModule's images are not arrays in memory.
    """
    data.setup()
    indices = data.kept_samples
    train, _, test = data.load_datasets()
    if type(train) is not ImageArrays or type(test) is not ImageArrays:
        raise SettingError(f"data is a {type(data).__name__}: give one whose images are arrays in memory")
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
            names = file["class_names"].tolist()
            arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "class_names"}
        train = PackedImages(arrays["train_images"], arrays["train_indices"].long(), arrays["train_labels"].long())
        return train, ImageArrays(arrays["test_images"], arrays["test_labels"].long()), names
    except (OSError, EOFError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise SettingError(
            f"data.root is {path}, which cannot be read ({reason}): make the file again with scripts/reproduce.py pack"
        ) from error
