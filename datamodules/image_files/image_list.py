"""Images of your own, listed in a CSV or Parquet file with their labels."""

import os
from pathlib import Path
from typing import Any

from datamodules.base.long_tail import Profile
from datamodules.image_files.base import ImageFilesDataModule
from datamodules.image_files.lists import ImageSplits, ListedImages, hold_out_test
from datamodules.tables.columns import read_columns
from imbsam.errors import SettingError
from imbsam.messages import first_few

Rows = list[tuple[str, str]]
"""Path and label of every image."""


class ImageListLTDataModule(ImageFilesDataModule):
    """Images of your own in a table of paths and labels, as they are or subsampled to an imbalance ratio.

    Labels are numbers 0 to C - 1 without a gap, or names (007 is one), which are sorted.

    Args:
        path: CSV file (separated by commas, semicolons or tabs) with a header line, or Parquet file
            (``pip install pandas pyarrow``), of the training images; or of all images, divided by
            ``split_column`` or ``test_share``.
        val_path: Such a file of the validation images.
        test_path: Such a file of the test images.
        root: Folder that the paths in the files are relative to; null for the folder of ``path``.
        path_column: Column of the paths.
        label_column: Column of the labels.
        split_column: Column that says train, val or test; null for none.
        test_share: Share of each class that is the test set where neither a file nor the column names one, in (0, 1);
            the same images for every seed.
        ratio: Imbalance ratio, largest class / smallest class, at least 1; with a profile only.
        profile: ``none`` keeps every training image; ``exponential`` or ``step`` subsamples them to ``ratio``.
        **settings: The settings of :class:`~datamodules.image_files.base.ImageFilesDataModule`.
    """

    advice = "Paths are relative to data.root, or to the folder of data.path where that is null."

    def __init__(
        self,
        path: str | Path,
        val_path: str | Path | None = None,
        test_path: str | Path | None = None,
        root: str | Path | None = None,
        path_column: str = "path",
        label_column: str = "label",
        split_column: str | None = None,
        test_share: float = 0.2,
        ratio: float = 100,
        profile: Profile = "none",
        **settings: Any,
    ) -> None:
        path = os.fspath(path)  # checkpoints refuse a Path
        val_path, test_path, root = (None if p is None else os.fspath(p) for p in (val_path, test_path, root))
        folder = os.path.dirname(path) or "." if root is None else root
        super().__init__(folder, ratio=ratio, profile=profile, **settings)
        self.files: dict[str, str | Path | None] = {"train": path, "val": val_path, "test": test_path}
        self.columns = [path_column, label_column, *([split_column] if split_column else [])]
        self.path_column = path_column
        self.test_share = test_share
        self.own_validation = val_path is not None or split_column is not None  # known once the table is read

    def read_splits(self) -> ImageSplits:
        """Read the tables.

        Raises:
            SettingError: A file, a column or a value is missing, or both a file and the column define a part.
        """
        found: dict[str, Rows] = {}
        for part, file in self.files.items():
            if file is None:
                continue
            if part in found:
                raise SettingError(
                    f"split_column={self.columns[2]} has images of {part}, and {part}_path={file} lists others: leave "
                    "one of them out."
                )
            for row in read_columns(Path(file).expanduser(), self.columns if part == "train" else self.columns[:2]):
                found.setdefault(row[2] if len(row) > 2 else part, []).append((row[0], row[1]))
        if strange := sorted(found.keys() - self.files.keys()):
            raise SettingError(f"split_column={self.columns[2]} has {first_few(strange)}: write train, val or test.")
        if "train" not in found:
            raise SettingError(f"{self.files['train']} has no training image.")
        names = _class_names([label for _, label in found["train"]], str(self.files["train"]))
        parts = {
            part: _listed(f"{self.files[part] or self.files['train']} ({part})", found[part], names) for part in found
        }
        if "test" not in parts:
            parts["train"], parts["test"] = hold_out_test(parts["train"], names, self.test_share)
        return ImageSplits(names, parts["train"], parts.get("val"), parts["test"])


def _class_names(labels: list[str], source: str) -> list[str]:
    """The classes in the order of their indices."""
    found = set(labels)
    if all(label.isdecimal() and str(int(label)) == label for label in found):  # 007 is a name
        numbers = {int(label) for label in found}
        if gaps := sorted(set(range(max(numbers) + 1)) - numbers):
            raise SettingError(
                f"{source} has labels up to {max(numbers)}, but no training image of {first_few(gaps)}: number the "
                "classes from 0 without a gap, or write names."
            )
        return [str(number) for number in sorted(numbers)]
    return sorted(found)


def _listed(source: str, rows: Rows, names: list[str]) -> ListedImages:
    index = {name: i for i, name in enumerate(names)}
    if strange := sorted({label for _, label in rows} - index.keys()):
        raise SettingError(f"{source} has classes without a training image: {first_few(strange)}.")
    return ListedImages.from_paths(source, [path for path, _ in rows], [index[label] for _, label in rows], names)
