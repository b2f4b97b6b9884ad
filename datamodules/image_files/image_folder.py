"""A folder of images a class: the layout of torchvision's ImageFolder."""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from rich.progress import track
from torchvision.datasets.folder import IMG_EXTENSIONS

from datamodules.base.long_tail import Profile
from datamodules.image_files.base import ImageFilesDataModule
from datamodules.image_files.disk import images_below
from datamodules.image_files.lists import ImageSplits, ListedImages, hold_out_test
from imbsam.errors import SettingError
from imbsam.messages import first_few


class ImageFolderLTDataModule(ImageFilesDataModule):
    """Images of your own in a folder a class, as they are or subsampled to an imbalance ratio.

    Args:
        root: Folder that holds ``train`` and, where you have them, ``val`` and ``test``, each with a folder a class; or
            that holds the folders of the classes itself. A class is named after its folder; its images may lie in
            folders below that.
        test_share: Share of each class that is the test set where there is no ``test``, in (0, 1); the same images for
            every seed.
        ratio: Imbalance ratio, largest class / smallest class, at least 1; with a profile only.
        profile: ``none`` keeps every training image; ``exponential`` or ``step`` subsamples them to ``ratio``.
        **settings: The settings of :class:`~datamodules.image_files.base.ImageFilesDataModule`.
    """

    def __init__(
        self,
        root: str | Path,
        test_share: float = 0.2,
        ratio: float = 100,
        profile: Profile = "none",
        **settings: Any,
    ) -> None:
        root = os.fspath(root)  # checkpoints refuse a Path
        super().__init__(root, ratio=ratio, profile=profile, **settings)
        self.test_share = test_share
        self.own_validation = (self.root / "val").is_dir()
        self.check_validation()

    def prepare_data(self) -> None:
        """Find the images; what was just found need not be checked on disk again.

        Raises:
            SettingError: A folder is missing, a class has no image, or links lead in a circle.
        """
        assert self.only_predicts or self.splits

    def read_splits(self) -> ImageSplits:
        """Find the images of every class."""
        if not self.root.is_dir():
            raise SettingError(f"root={os.fspath(self.root)!r} is no folder: pass one that holds a folder a class.")
        if not (self.root / "train").is_dir():
            if beside := [part for part in ("val", "test") if (self.root / part).is_dir()]:
                raise SettingError(f"root={os.fspath(self.root)!r} has {' and '.join(beside)}, but no folder train.")
            names = _classes(self.root)
            train, test = hold_out_test(_find(self.root, "", names), names, self.test_share)
            return ImageSplits(names, train, None, test)
        if unread := sorted(set(_classes(self.root)) - {"train", "val", "test"}):
            rank_zero_warn(
                f"root={os.fspath(self.root)!r} has a folder train, so only train, val and test are read, not "
                f"{first_few(unread)}."
            )
        names = _classes(self.root / "train")
        parts = {
            part: _find(self.root, part, names) for part in ("train", "val", "test") if (self.root / part).is_dir()
        }
        if "test" not in parts:
            parts["train"], parts["test"] = hold_out_test(parts["train"], names, self.test_share)
        return ImageSplits(names, parts["train"], parts.get("val"), parts["test"])


def _classes(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise SettingError(f"{folder} has no folders: make one for each class, and put its images there.")
    return names


def _find(root: Path, part: str, names: list[str]) -> ListedImages:
    """The images of every class, sorted."""
    folder = root / part
    if strange := sorted(set(_classes(folder)) - set(names)):
        raise SettingError(f"{folder} has classes that {root / 'train'} does not have: {first_few(strange)}.")
    console = Console(stderr=True)
    classes = track(names, f"reading {folder}", console=console, transient=True, disable=not console.is_terminal)
    paths, labels, empty = [], [], []
    for label, name in enumerate(classes):
        found = sorted(images_below(folder / name)) if (folder / name).is_dir() else []
        paths += [os.path.relpath(path, root) for path in found]
        labels += [label] * len(found)
        if not found:
            empty.append(name)
    if empty and part in ("", "train"):
        raise SettingError(
            f"{folder} has classes without an image ({', '.join(IMG_EXTENSIONS)}): {first_few(empty)}. Fill or remove "
            "them."
        )
    return ListedImages.from_paths(os.fspath(folder), paths, labels)
