"""Images of your own, listed in a CSV or Parquet file with their labels."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from datamodules.image_files.base import ImageFilesDataModule
from datamodules.image_files.lists import ImageSplits, ListedImages, hold_out_test
from datamodules.tables.columns import read_columns
from imbsam.errors import SettingError
from imbsam.messages import first_few

Listed = list[tuple[str, ...]]
"""Path and label of every image, the label in one cell or in several."""


class ImageListLTDataModule(ImageFilesDataModule):
    """Your own images in a table of paths and labels, as they are or subsampled to an imbalance ratio.

    Labels are numbers 0 to C - 1 without gaps, or names (007 is one), which are sorted.

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
        test_share: Share of each class to test on if neither a file nor the column names test images, in (0, 1);
            the same images for every seed.
        **settings: The settings of :class:`~datamodules.image_files.base.ImageFilesDataModule`.
    """

    advice = "Paths are relative to data.root, or to the folder of data.path if that is null."

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
        **settings: Any,
    ) -> None:
        folder = os.path.dirname(path) or "." if root is None else root
        super().__init__(folder, **settings)
        self.files = {"train": path, "val": val_path, "test": test_path}
        self.path_column, self.label_columns, self.split_column = path_column, [label_column], split_column
        self.test_share = test_share
        self.own_validation = val_path is not None or split_column is not None  # known once the table is read

    def read_splits(self) -> ImageSplits:
        """Read the tables.

        Raises:
            SettingError: A file, a column or a value is missing, or both a file and the column define a part.
        """
        listed = self.read_tables()
        train = self.files["train"]
        names = _class_names({label for _, label in listed["train"]}, str(train))
        parts = {part: _indexed(f"{self.files[part] or train} ({part})", listed[part], names) for part in listed}
        if "test" not in parts:
            parts["train"], parts["test"] = hold_out_test(parts["train"], names, self.test_share)
        return ImageSplits(names, **parts)

    def read_tables(self, may_be_empty: Collection[str] = ()) -> dict[str, Listed]:
        """The rows of each part: train, and test and val where there are any.

        Args:
            may_be_empty: Columns whose cells may be empty.
        """
        listed: dict[str, Listed] = {}
        columns = [self.path_column, *self.label_columns]
        with_split = [*columns, self.split_column] if self.split_column else columns
        for part, file in self.files.items():
            if file is None:
                continue
            if part in listed:
                raise SettingError(
                    f"data.split_column is {self.split_column}, which has {part} images, and data.{part}_path={file} "
                    "lists others: leave one of them out"
                )
            wanted = with_split if part == "train" else columns
            for row in read_columns(Path(file).expanduser(), wanted, may_be_empty):
                own = row[-1] if len(wanted) > len(columns) else part
                listed.setdefault(own, []).append(row[: len(columns)])
        if unknown := sorted(listed.keys() - self.files.keys()):
            raise SettingError(
                f"data.split_column is {self.split_column}, which has {first_few(unknown)}: write train, val or test"
            )
        if "train" not in listed:
            raise SettingError(
                f"{self.files['train']} has no training images: write train in column {self.split_column}"
            )
        return listed


def _class_names(labels: set[str], source: str) -> list[str]:
    """The classes in the order of their indices."""
    if not all(label.isdecimal() and str(int(label)) == label for label in labels):  # 007 is a name
        return sorted(labels)
    numbers = {int(label) for label in labels}
    if gaps := sorted(set(range(max(numbers) + 1)) - numbers):
        raise SettingError(
            f"{source} has labels up to {max(numbers)}, but no training image of {first_few(gaps)}: number the "
            "classes from 0 without gaps, or write names"
        )
    return [str(number) for number in sorted(numbers)]


def _indexed(source: str, listed: Listed, names: list[str]) -> ListedImages:
    index = {name: i for i, name in enumerate(names)}
    if unknown := sorted({label for _, label in listed} - index.keys()):
        raise SettingError(
            f"{source} has classes without a training image: {first_few(unknown)}: add some, or leave the classes out"
        )
    return ListedImages.from_paths(source, [path for path, _ in listed], [index[label] for _, label in listed], names)
