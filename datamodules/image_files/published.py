"""Published benchmarks: lists of the original images, compared with what their papers say."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from datamodules.image_files.base import ImageFilesDataModule
from datamodules.image_files.dataset import ImageFiles
from datamodules.image_files.lists import ImageSplits, folder_names, read_txt
from imbsam.errors import SettingError


class PublishedListsDataModule(ImageFilesDataModule):
    """A benchmark whose lists, long-tailed already, say which of the original images are in which part.

    Attributes:
        list_names: File names of the lists of "path label": ``train``, ``test`` and perhaps ``val``.
        published: What the published lists hold, by the names in :meth:`load_datasets`.

    Args:
        root: Folder that the paths in the lists are relative to.
        lists: Folder of the lists; null for root.
        **settings: The settings of :class:`~datamodules.image_files.base.ImageFilesDataModule`.
    """

    list_names: ClassVar[dict[str, str]] = {}
    published: ClassVar[dict[str, int]] = {}

    def __init__(self, root: str | Path, lists: str | Path | None = None, **settings: Any) -> None:
        super().__init__(root, ratio=1, profile="none", **settings)
        self.lists = self.root if lists is None else Path(lists).expanduser()

    def read_splits(self) -> ImageSplits:
        """Read the lists; a class is named after its folder.

        Raises:
            SettingError: A list is missing, or is not a list of paths and labels.
        """
        parts = {}
        for part, name in self.list_names.items():
            if not (path := self.lists / name).is_file():
                raise SettingError(f"there is no {path}: set data.lists to the folder that holds it. {self.advice}")
            parts[part] = read_txt(path)
        return ImageSplits(folder_names(parts["train"]), **parts)

    def load_datasets(self) -> tuple[ImageFiles, Tensor, ImageFiles]:
        """The images by their paths, and ``class_names``; warns if the lists are not the published ones."""
        splits, counts = self.splits, torch.bincount(self.splits.train.labels)
        sizes = {
            "classes": len(splits.class_names),
            "training images": len(splits.train),
            "validation images": len(splits.val) if splits.val is not None else 0,
            "test images": len(splits.test),
            "images in the largest class": int(counts.max()),
            "images in the smallest class": int(counts.min()),
        }
        if wrong := [f"{sizes[name]:,} {name}, not {n:,}" for name, n in self.published.items() if sizes[name] != n]:
            rank_zero_warn(f"{type(self).__name__}: these lists are not the published ones: {'; '.join(wrong)}.")
        return super().load_datasets()
