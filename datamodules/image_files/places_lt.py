"""Places-LT: published lists of "path label" beside the original images."""

from pathlib import Path
from typing import Any, ClassVar

from datamodules.image_files.published import PublishedListsDataModule


class PlacesLTDataModule(PublishedListsDataModule):
    """Places-LT (Liu et al., CVPR 2019): 365 classes of 4,980 to 5 training images, balanced validation and test.

    The benchmark's own validation list is the validation set, so ``val_share`` must be 0.

    Args:
        root: Folder that holds ``train`` and ``val`` of Places365-Standard, both with a folder a class.
        lists: Folder of ``Places_LT_train.txt``, ``Places_LT_val.txt`` and ``Places_LT_test.txt``; null for root.
        **settings: The settings of :class:`~datamodules.image_files.base.ImageFilesDataModule`.
    """

    own_validation = True
    list_names: ClassVar = {part: f"Places_LT_{part}.txt" for part in ("train", "val", "test")}
    advice = (
        'The images (Places365-Standard, small images, "easy directory structure") are from '
        "http://places2.csail.mit.edu/download.html, the lists from "
        "https://github.com/facebookresearch/classifier-balancing (data/Places_LT) or "
        "https://liuziwei7.github.io/projects/LongTail.html; see docs/data.md."
    )
    published: ClassVar = {
        "classes": 365,
        "training images": 62_500,
        "validation images": 7_300,
        "test images": 36_500,
        "images in the largest class": 4980,
        "images in the smallest class": 5,
    }

    def __init__(self, root: str | Path = "data/places365", lists: str | Path | None = None, **settings: Any) -> None:
        super().__init__(root, lists, **settings)
