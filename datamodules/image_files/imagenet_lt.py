"""ImageNet-LT: published lists of "path label" beside the original images."""

from pathlib import Path
from typing import Any, ClassVar

from datamodules.image_files.published import PublishedListsDataModule


class ImageNetLTDataModule(PublishedListsDataModule):
    """ImageNet-LT (Liu et al., CVPR 2019): 1,000 classes of 1,280 to 5 training images, balanced validation and test.

    The benchmark's own validation list is the validation set, so ``val_share`` must be 0.

    Args:
        root: Folder that holds ImageNet's ``train`` and ``val``, both with a folder a class.
        lists: Folder of ``ImageNet_LT_train.txt``, ``ImageNet_LT_val.txt`` and ``ImageNet_LT_test.txt``; null for root.
        **settings: The settings of :class:`~datamodules.image_files.base.ImageFilesDataModule`.
    """

    own_validation = True
    list_names: ClassVar = {part: f"ImageNet_LT_{part}.txt" for part in ("train", "val", "test")}
    advice = (
        "The images (ILSVRC 2012, validation images moved into a folder a class) are from https://image-net.org, the "
        "lists from https://github.com/facebookresearch/classifier-balancing (data/ImageNet_LT) or "
        "https://liuziwei7.github.io/projects/LongTail.html; see docs/data.md."
    )
    published: ClassVar = {
        "classes": 1000,
        "training images": 115_846,
        "validation images": 20_000,
        "test images": 50_000,
        "images in the largest class": 1280,
        "images in the smallest class": 5,
    }

    def __init__(self, root: str | Path = "data/imagenet", lists: str | Path | None = None, **settings: Any) -> None:
        super().__init__(root, lists, **settings)
