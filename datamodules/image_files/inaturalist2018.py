"""iNaturalist 2018: the competition's JSON files, or the lists of "path label" made from them."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from datamodules.image_files.lists import ImageSplits, ListedImages
from datamodules.image_files.published import PublishedListsDataModule
from imbsam.errors import SettingError


class INaturalist2018DataModule(PublishedListsDataModule):
    """iNaturalist 2018: 8,142 species, 437,513 training images of 1,000 to 2 a species.

    As throughout the literature the official validation set, 3 images a species, is the test set. ``val_share`` holds
    out training images for validation.

    Args:
        root: Folder that holds ``train_val2018``.
        lists: Folder of ``train2018.json`` and ``val2018.json`` or, if they are missing, of
            ``iNaturalist18_train.txt`` and ``iNaturalist18_val.txt``; null for root.
        **settings: The settings of :class:`~datamodules.image_files.base.ImageFilesDataModule`.
    """

    mean = (0.466, 0.471, 0.380)  # of Kang et al. (ICLR 2020) and the work that followed
    std = (0.195, 0.194, 0.192)
    list_names: ClassVar = {"train": "iNaturalist18_train.txt", "test": "iNaturalist18_val.txt"}
    advice = "Images and JSON files are from https://github.com/visipedia/inat_comp/tree/master/2018; see docs/data.md."
    published: ClassVar = {
        "classes": 8142,
        "training images": 437_513,
        "test images": 24_426,
        "images in the largest class": 1000,
        "images in the smallest class": 2,
    }

    def __init__(self, root: str | Path = "data/inaturalist", lists: str | Path | None = None, **settings: Any) -> None:
        super().__init__(root, lists, **settings)

    def read_splits(self) -> ImageSplits:
        """Read the JSON files, whose categories name the classes, or the lists.

        Raises:
            SettingError: Neither is there, or a file is broken.
        """
        train, val = (self.lists / f"{part}2018.json" for part in ("train", "val"))
        if train.is_file() and val.is_file():
            return _read_json(train, val)
        if all((self.lists / name).is_file() for name in self.list_names.values()):
            return super().read_splits()
        raise SettingError(
            f"{self.lists} has neither train2018.json and val2018.json nor {' and '.join(self.list_names.values())}: "
            f"set data.lists to the folder that holds them. {self.advice}"
        )


def _read_json(train: Path, val: Path) -> ImageSplits:
    categories, train_images = _annotated(train)
    ids = sorted(categories)
    label_of = {category: label for label, category in enumerate(ids)}
    repeated = {name for name, number in Counter(categories.values()).items() if number > 1}
    names = [f"{categories[i]} ({i})" if categories[i] in repeated else categories[i] for i in ids]
    parts = []
    for path, images in ((train, train_images), (val, _annotated(val)[1])):
        if unknown := sorted({category for _, category in images} - label_of.keys()):
            raise SettingError(
                f"{path} has annotations of category {unknown[0]}, which {train.name} does not name: download both"
            )
        paths, labels = [name for name, _ in images], [label_of[category] for _, category in images]
        parts.append(ListedImages.from_paths(path.name, paths, labels))
    return ImageSplits(names, *parts)


def _annotated(path: Path) -> tuple[dict[int, str], list[tuple[str, int]]]:
    """Names of the categories by id, and the images in the file's order with their categories."""
    try:
        content = json.loads(path.read_bytes())
        category_of = {annotation["image_id"]: annotation["category_id"] for annotation in content["annotations"]}
        images = [(image["file_name"], category_of[image["id"]]) for image in content["images"]]
        return {category["id"]: str(category["name"]) for category in content["categories"]}, images
    except (ValueError, KeyError, TypeError) as error:
        raise SettingError(
            f"{path} is no COCO-style file of images, annotations and categories ({type(error).__name__}: {error}): "
            "download it again"
        ) from error
