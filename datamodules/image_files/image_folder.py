"""A folder of images a class: the layout of torchvision's ImageFolder."""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from datamodules.image_files.base import ImageFilesDataModule
from datamodules.image_files.disk import images_below
from datamodules.image_files.lists import ImageSplits, ListedImages, hold_out_test
from imbsam.errors import SettingError
from imbsam.messages import first_few

PARTS = ("train", "val", "test")


class ImageFolderLTDataModule(ImageFilesDataModule):
    """Your own images in a folder a class, as they are or subsampled to an imbalance ratio.

    Args:
        root: Folder that holds ``train`` and, if you have them, ``val`` and ``test``, each with a folder a class; or
            that holds the folders of the classes itself. A class is named after its folder and includes the images in
            folders below it.
        test_share: Share of each class to test on if there is no ``test``, in (0, 1); the same images for every seed.
        **settings: The settings of :class:`~datamodules.image_files.base.ImageFilesDataModule`.
    """

    def __init__(
        self,
        root: str | Path,
        test_share: float = 0.2,
        **settings: Any,
    ) -> None:
        super().__init__(root, **settings)
        self.test_share = test_share
        self.own_validation = (self.root / "val").is_dir()
        self.check_validation()

    def prepare_data(self) -> None:
        """Find the images; files found this way need no second check.

        Raises:
            SettingError: A folder is missing, a class has no image, or links form a loop.
        """
        _ = self.only_predicts or self.splits

    def read_splits(self) -> ImageSplits:
        """Find the images of every class."""
        if not self.root.is_dir():
            raise SettingError(f"data.root is {self.root}, which is no folder: give one that holds a folder a class")
        there = [part for part in PARTS if (self.root / part).is_dir()]
        if there and "train" not in there:
            raise SettingError(f"data.root is {self.root}, which has {' and '.join(there)} but no train: add it")
        if there and (unread := sorted(set(_classes(self.root)) - set(PARTS))):
            rank_zero_warn(
                f"data.root is {self.root}, which has a folder train, so only train, val and test are read, not "
                f"{first_few(unread)}."
            )
        names = _classes(self.root / "train" if there else self.root)
        parts = {part or "train": _find(self.root, part, names) for part in there or [""]}
        if "test" not in parts:
            parts["train"], parts["test"] = hold_out_test(parts["train"], names, self.test_share)
        return ImageSplits(names, **parts)


def _classes(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise SettingError(f"{folder} has no folders: make one for each class, and put its images there")
    return names


def _find(root: Path, part: str, names: list[str]) -> ListedImages:
    """The images of every class, sorted."""
    folder = root / part
    if unknown := sorted(set(_classes(folder)) - set(names)):
        raise SettingError(
            f"{folder} has classes that {root / 'train'} does not have: {first_few(unknown)}: add or remove them"
        )
    paths, labels, empty = [], [], []
    for label, name in enumerate(tqdm(names, f"reading {folder}", leave=False, disable=None)):
        images = sorted(images_below(folder / name)) if (folder / name).is_dir() else []
        paths += [os.path.relpath(path, root) for path in images]
        labels += [label] * len(images)
        if not images:
            empty.append(name)
    if empty and part in ("", "train"):
        raise SettingError(
            f"{folder} has classes without an image ({', '.join(IMG_EXTENSIONS)}): {first_few(empty)}: fill or remove "
            "them"
        )
    return ListedImages.from_paths(os.fspath(folder), paths, labels)
