"""Lists of images and labels: reading, splitting, and checks against the classes."""

import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from datamodules.sampling.stratified import held_out_mask
from imbsam.checks import check_interval
from imbsam.errors import SettingError
from imbsam.messages import first_few


@dataclass(frozen=True)
class ListedImages:
    """Images and their labels.

    Attributes:
        source: Where the list comes from, for messages.
        paths: Paths relative to a root (or absolute), numpy bytes (N,).
        labels: Class indices, int64 (N,); or multi-label, 0 and 1, int64 (N, C).
    """

    source: str
    paths: Any
    labels: Tensor

    @staticmethod
    def from_paths(
        source: str, paths: Iterable[str], labels: Iterable[Any], class_names: Sequence[str] | None = None
    ) -> "ListedImages":
        """Build it from paths as text and integer labels; a duplicate path is kept once.

        Args:
            source: Where the list comes from.
            paths: Paths; ``a.jpg`` and ``./a.jpg`` are the same.
            labels: Class indices; or a tuple of 0 and 1, one number for each class.
            class_names: What a message calls the classes; None for their indices.

        Raises:
            SettingError: A path has two labels.
        """
        label_of: dict[str, int] = {}
        kept: list[str] = []
        repeated: set[str] = set()
        for path, label in zip(paths, labels, strict=True):
            file = os.path.normpath(path)
            if (first := label_of.setdefault(file, label)) != label:
                one, other = (_named(c, class_names) for c in (first, label))
                raise SettingError(f"{source}: {path} has two labels, {one} and {other}: keep one")
            if len(label_of) > len(kept):
                kept.append(path)
            else:
                repeated.add(file)
        if repeated:
            rank_zero_warn(
                f"{source} lists {len(repeated):,} images more than once, such as {min(repeated)}: each is kept once"
            )
        packed = np.array([os.fsencode(path) for path in kept], dtype=np.bytes_)
        return ListedImages(source, packed, torch.tensor(list(label_of.values()), dtype=torch.int64))

    def take(self, mask: Tensor) -> "ListedImages":
        """The images where the mask, bool (N,), is True."""
        return ListedImages(self.source, self.paths[mask.numpy()], self.labels[mask])

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.labels)


def _named(label: Any, class_names: Sequence[str] | None) -> str:
    """A class index, or 0 and 1 for each class, in words."""
    if isinstance(label, tuple):
        names = class_names or [str(c) for c in range(len(label))]
        return ";".join(name for name, has in zip(names, label, strict=True) if has) or "no class"
    return str(label) if class_names is None else class_names[label]


@dataclass(frozen=True)
class ImageSplits:
    """The parts of a data set.

    Attributes:
        class_names: Names of the C classes.
        train: Training images, before any subsampling and any validation split.
        test: Test images.
        val: Its own validation images, or None.
    """

    class_names: list[str]
    train: ListedImages
    test: ListedImages
    val: ListedImages | None = None

    def parts(self) -> list[ListedImages]:
        """Training, validation (if any) and test images."""
        return [part for part in (self.train, self.val, self.test) if part is not None]


def read_txt(path: Path) -> ListedImages:
    """Read lines of "path label", the label a number from 0; paths may have spaces, and empty lines do not count.

    Raises:
        SettingError: A line is something else, or there is none.
    """
    paths, labels = [], []
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            name, _, label = line.strip().rpartition(" ")
            if name and label.isdecimal():
                paths.append(name.strip())
                labels.append(int(label))
            elif line.strip():
                raise SettingError(f"{path}, line {number} is {line.strip()[:80]!r}: write a path and a label from 0")
    if not paths:
        raise SettingError(f"{path} lists no images: write a path and a label on each line")
    return ListedImages.from_paths(path.name, paths, labels)


def check_classes(splits: ImageSplits) -> None:
    """Check that every class has a training image, every label a class, and every image one label.

    Warns of class names that differ only in case, spaces or the encoding of accents.

    Raises:
        SettingError: It names the classes, or the image; or there is only one class.
    """
    names, train = splits.class_names, splits.train
    if len(names) < 2:
        raise SettingError(
            f"{train.source} has a single class, {names[0]}, and a classifier needs two: give every class a folder of "
            "its own in data.root, or a label of its own in the list"
        )
    warn_of_names_alike(train.source, names)
    for part in splits.parts():
        if outside := np.setdiff1d(part.labels.numpy(), np.arange(len(names))).tolist():
            raise SettingError(
                f"{part.source} has labels {first_few(outside)}, and {train.source} has the {len(names)} "
                f"classes 0 to {len(names) - 1}: add training images of every class"
            )
    for part, other in combinations(splits.parts(), 2):
        _, here, there = np.intersect1d(part.paths, other.paths, return_indices=True)
        for i, j in zip(here, there, strict=True):
            if part.labels[i] != other.labels[j]:
                raise SettingError(
                    f"{os.fsdecode(part.paths[i])} has two labels, {names[part.labels[i]]} in {part.source} and "
                    f"{names[other.labels[j]]} in {other.source}: keep one"
                )
    if empty := (torch.bincount(train.labels, minlength=len(names)) == 0).nonzero().flatten().tolist():
        shown = [str(c) if names[c] == str(c) else f"{c} ({names[c]})" for c in empty]
        raise SettingError(
            f"{train.source} has no image of class {first_few(shown)}: add some, or leave the class out and "
            "number the others from 0 without gaps"
        )


def warn_of_names_alike(source: str, class_names: Sequence[str]) -> None:
    """Warn of class names that differ only in case, spaces or the encoding of accents."""
    alike: dict[str, list[str]] = {}
    for name in class_names:
        alike.setdefault(" ".join(unicodedata.normalize("NFKC", name).casefold().split()), []).append(name)
    for same in alike.values():
        if len(same) > 1:
            rank_zero_warn(
                f"{source} has the classes {' and '.join(map(repr, same))}, which count as different; if they "
                "are one class, give it one name"
            )


def hold_out_test(
    images: ListedImages, class_names: Sequence[str], test_share: float, strata: Tensor | None = None
) -> tuple[ListedImages, ListedImages]:
    """Split off a test part, the same share in (0, 1) of every class and the same images whatever the seed of a run.

    See :func:`~datamodules.sampling.stratified.held_out_mask`.

    Args:
        images: All images.
        class_names: Names of the classes, or of the strata.
        test_share: The share.
        strata: What the share is of, int64 (N,); None for the classes.

    Returns:
        Training and test images.

    Raises:
        SettingError: ``test_share`` is out of range.
    """
    check_interval("(0, 1)", test_share=test_share)
    strata = images.labels if strata is None else strata
    test = held_out_mask(strata, class_names, torch.Generator().manual_seed(0), test_share=test_share)
    return images.take(~test), images.take(test)


def folder_names(train: ListedImages) -> list[str]:
    """Name each class after the folder of its images, or by its number unless every class has one folder to itself."""
    labels, first = np.unique(train.labels.numpy(), return_index=True)
    num_classes = int(labels[-1]) + 1
    folders = [os.path.basename(os.path.dirname(os.fsdecode(path))) for path in train.paths[first]]
    one_each = all(folders) and len(set(folders)) == num_classes
    return folders if one_each else [str(c) for c in range(num_classes)]
