"""Published benchmarks: lists of the original images, compared with what their papers say."""

import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from datamodules.image_files.base import ImageFilesDataModule
from datamodules.image_files.dataset import ImageFiles


class PublishedListsDataModule(ImageFilesDataModule):
    """A benchmark whose lists, long-tailed already, say which of the original images are in which part.

    Attributes:
        published: What the published lists hold, by the names in :meth:`_compare_with_published`.

    Args:
        root: Folder that the paths in the lists are relative to.
        lists: Folder of the lists; null for root.
        **settings: The settings of :class:`~datamodules.image_files.base.ImageFilesDataModule`.
    """

    published: ClassVar[dict[str, int]] = {}

    def __init__(self, root: str | Path, lists: str | Path | None = None, **settings: Any) -> None:
        root = os.fspath(root)  # checkpoints refuse a Path
        lists = None if lists is None else os.fspath(lists)
        super().__init__(root, ratio=1, profile="none", **settings)
        self.lists = self.root if lists is None else Path(lists).expanduser()

    def load_datasets(self) -> tuple[ImageFiles, Tensor, ImageFiles]:
        """The images by their paths, and ``class_names``; warns of lists that are not the published ones."""
        self._compare_with_published()
        return super().load_datasets()

    def _compare_with_published(self) -> None:
        """Warn of lists that are not the published ones: numbers from them are not comparable."""
        splits, counts = self.splits, torch.bincount(self.splits.train.labels)
        found = {
            "classes": len(splits.class_names),
            "training images": len(splits.train),
            "validation images": len(splits.val) if splits.val is not None else 0,
            "test images": len(splits.test),
            "images in the largest class": int(counts.max()),
            "images in the smallest class": int(counts.min()),
        }
        wrong = [f"{found[name]:,} {name}, not {n:,}" for name, n in self.published.items() if found[name] != n]
        if wrong:
            rank_zero_warn(f"{type(self).__name__}: these lists are not the published ones: {'; '.join(wrong)}.")
