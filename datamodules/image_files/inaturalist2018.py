"""iNaturalist 2018: the competition's JSON files, or the lists of "path label" made of them."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from datamodules.image_files.lists import ImageSplits, ListedImages, names_of_folders, read_txt
from datamodules.image_files.published import PublishedListsDataModule
from imbsam.errors import SettingError


class INaturalist2018DataModule(PublishedListsDataModule):
    """iNaturalist 2018: 8,142 species, 437,513 training images of 1,000 to 2 a species.

    As in all of the literature the official validation set, 3 images a species, is the test set. For a validation set
    of your own hold out a part of the training images with ``val_share``.

    Args:
        root: Folder that holds ``train_val2018``.
        lists: Folder of ``train2018.json`` and ``val2018.json`` or, where they are missing, of
            ``iNaturalist18_train.txt`` and ``iNaturalist18_val.txt``; null for root.
        **settings: The settings of :class:`~datamodules.image_files.base.ImageFilesDataModule`.
    """

    mean = (0.466, 0.471, 0.380)  # of Kang et al. (ICLR 2020), and of those who came after
    std = (0.195, 0.194, 0.192)
    advice = "Images and JSON files are from https://github.com/visipedia/inat_comp/tree/master/2018; see docs/data.md."
    published: ClassVar = {
        "classes": 8142,
        "training images": 437_513,
        "test images": 24_426,
        "images in the largest class": 1000,
        "images in the smallest class": 2,
    }

    def __init__(self, root: str | Path = "data/inaturalist", lists: str | Path | None = None, **settings: Any) -> None:
        root = os.fspath(root)  # in each constructor, whose arguments are recorded in checkpoints
        lists = None if lists is None else os.fspath(lists)
        super().__init__(root, lists, **settings)

    def read_splits(self) -> ImageSplits:
        """Read the JSON files, whose categories name the classes, or the lists.

        Raises:
            SettingError: Neither is there, or a file is broken.
        """
        for names, read in (
            (("train2018.json", "val2018.json"), _read_json),
            (("iNaturalist18_train.txt", "iNaturalist18_val.txt"), _read_lists),
        ):
            files = [self.lists / name for name in names]
            if all(file.is_file() for file in files):
                return read(*files)
        raise SettingError(
            f"{self.lists} has neither train2018.json and val2018.json nor iNaturalist18_train.txt and "
            f"iNaturalist18_val.txt: set data.lists to the folder that holds them. {self.advice}"
        )


def _read_lists(train: Path, val: Path) -> ImageSplits:
    images = read_txt(train)
    return ImageSplits(names_of_folders(images), images, None, read_txt(val))


def _read_json(train: Path, val: Path) -> ImageSplits:
    categories, images = _annotated(train)
    ids = sorted(categories)
    label_of = {category: label for label, category in enumerate(ids)}
    repeated = {name for name, number in Counter(categories.values()).items() if number > 1}
    names = [f"{categories[i]} ({i})" if categories[i] in repeated else categories[i] for i in ids]
    parts = []
    for path, found in ((train, images), (val, _annotated(val)[1])):
        if unknown := sorted({category for _, category in found} - label_of.keys()):
            raise SettingError(f"{path} has annotations of category {unknown[0]}, which {train.name} does not name.")
        paths, labels = [name for name, _ in found], [label_of[category] for _, category in found]
        parts.append(ListedImages.from_paths(path.name, paths, labels))
    return ImageSplits(names, parts[0], None, parts[1])


def _annotated(path: Path) -> tuple[dict[int, str], list[tuple[str, int]]]:
    """Names of the categories by id, and the images in the file's order with their categories.

    Each object of the file is cut down to the two fields that are needed while it is parsed: a file of this size,
    104 MB, takes 250 MB at its peak and not 470.
    """
    try:
        with path.open(encoding="utf-8") as file:
            content = json.load(file, object_hook=_needed)
        category_of = dict(content["annotations"])
        found = [(name, category_of[number]) for number, name in content["images"]]
        categories = {number: str(name) for number, name in content["categories"]}
    except (ValueError, KeyError, TypeError) as error:
        raise SettingError(
            f"{path} is no COCO-style file of images, annotations and categories ({type(error).__name__}: {error}): "
            "download it again."
        ) from error
    return categories, found


def _needed(entry: dict[str, Any]) -> Any:
    """(image, category) of an annotation, (id, path) of an image, (id, name) of a category."""
    if "category_id" in entry:
        return entry["image_id"], entry["category_id"]
    if "file_name" in entry:
        return entry["id"], entry["file_name"]
    if "name" in entry and "id" in entry:
        return entry["id"], entry["name"]
    return entry
