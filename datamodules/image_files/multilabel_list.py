"""Images of your own with several labels each, listed in a CSV or Parquet file."""

import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from datamodules.base.multi_label import MultiLabelDataModule, rarest_class
from datamodules.image_files.dataset import ImageFiles, ReadableImages
from datamodules.image_files.image_list import ImageListLTDataModule, Listed
from datamodules.image_files.lists import ImageSplits, ListedImages, hold_out_test, warn_of_names_alike
from imbsam.errors import SettingError
from imbsam.messages import first_few

BINARY = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "False": 0, "True": 1, "false": 0, "true": 1}
"""What a cell of a column of one class may hold; other programs write numbers with a point, or words."""


class MultiLabelImageListDataModule(MultiLabelDataModule, ImageListLTDataModule):
    """Your own images in a table of paths and labels, several labels an image.

    Either one column holds the names of all classes of an image (``effusion;nodule``), or every class has a column of
    its own with 0 or 1. Batches are images, float32 (B, 3, S, S), and labels, int64 (B, C).

    Without a file and a column of test images, ``test_share`` of the images is tested on: of those whose rarest class
    is j, for every j.

    Args:
        path: CSV or Parquet file of the training images, or of all, see :class:`~datamodules.ImageListLTDataModule`.
        label_column: Column of the labels of an image, as names; not used with ``label_columns``.
        separator: What stands between two labels in a cell. A file whose columns are separated by it too needs quotes
            around the cell.
        label_columns: The columns of the classes, one each, with 0 or 1; null for ``label_column``.
        class_names: The classes in their order, so that any other label is an error; null for those of the training
            images, sorted. With ``label_columns`` these are the classes.
        allow_empty: Whether an empty cell of ``label_column`` means that the image has none of the classes; if not, it
            is an error, as it may be a label that someone forgot.
        **settings: The settings of :class:`~datamodules.ImageListLTDataModule`.

    Raises:
        SettingError: A setting is out of range, or the names of the classes are repeated.
    """

    def __init__(
        self,
        path: str | Path,
        label_column: str = "labels",
        separator: str = ";",
        label_columns: list[str] | None = None,
        class_names: list[str] | None = None,
        allow_empty: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(path=path, label_column=label_column, **settings)
        if not separator:
            raise SettingError(f"separator is {separator!r}: give what stands between two labels, such as ;")
        for name, given in (("label_columns", label_columns), ("class_names", class_names)):
            if given is not None and (len(given) == 0 or len(set(given)) < len(given)):
                raise SettingError(f"{name} is {given!r}: name each class once, or leave it out")
        if label_columns is not None and class_names is not None:
            raise SettingError("class_names and label_columns are both set: the columns are the classes; leave one out")
        self.separator, self.allow_empty = separator, allow_empty
        self.own_columns, self.own_names = label_columns, class_names
        if label_columns is not None:
            self.label_columns = label_columns

    def read_splits(self) -> ImageSplits:
        """Read the tables.

        Raises:
            SettingError: A file, a column or a value is missing, a label is no class, or both a file and the column
                define a part.
        """
        listed = self.read_tables(may_be_empty=[] if self.own_columns else self.label_columns)
        source = {part: f"{self.files[part] or self.files['train']} ({part})" for part in listed}
        names = self.own_columns or self.own_names
        if names is None:
            names = sorted({name for _, cell in listed["train"] for name in self._split(cell)})
        if not names:
            raise SettingError(f"{source['train']} has no label: name classes in column {self.label_columns[0]}")
        parts = {part: self._labelled(source[part], rows, names) for part, rows in listed.items()}
        if "test" not in parts:
            strata = rarest_class(parts["train"].labels)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*classes with a single sample.*")  # here those are strata
                parts["train"], parts["test"] = hold_out_test(
                    parts["train"], [*names, "(no class)"], self.test_share, strata
                )
        return ImageSplits(names, **parts)

    def check_splits(self, splits: ImageSplits) -> None:
        """Warn of class names that are alike."""
        warn_of_names_alike(splits.train.source, splits.class_names)

    def load_datasets(self) -> tuple[ImageFiles, Tensor, ImageFiles]:
        """The images by their paths, and ``class_names``."""
        train, labels, test = super().load_datasets()
        self.eval_collate = ReadableImages(self.image_size, labels=len(self.class_names))
        return train, labels, test

    def _split(self, cell: str) -> list[str]:
        return [name for part in cell.split(self.separator) if (name := part.strip())]

    def _labelled(self, source: str, rows: Listed, names: list[str]) -> ListedImages:
        read = self._from_columns if self.own_columns else self._from_names
        labels = [read(source, number, cells, names) for number, (_, *cells) in enumerate(rows, start=1)]
        return ListedImages.from_paths(source, [path for path, *_ in rows], labels, names)

    def _from_columns(self, source: str, number: int, cells: list[str], names: list[str]) -> tuple[int, ...]:
        for name, cell in zip(names, cells, strict=True):
            if cell not in BINARY:
                raise SettingError(f"{source}, image {number}: {name} is {cell!r}: write 1 if the image has it, else 0")
        return tuple(BINARY[cell] for cell in cells)

    def _from_names(self, source: str, number: int, cells: list[str], names: list[str]) -> tuple[int, ...]:
        found = set(self._split(cells[0]))
        if not found and not self.allow_empty:
            raise SettingError(
                f"{source}, image {number} has no label: name its classes in column {self.label_columns[0]}, or set "
                "data.allow_empty to true if such images have none of them"
            )
        if unknown := sorted(found.difference(names)):
            known = "data.class_names" if self.own_names else "the training images' classes"
            raise SettingError(
                f"{source}, image {number} has the label {first_few(unknown)}, which is not among {known} "
                f"({first_few(names, 10)}): correct it, or check data.separator ({self.separator})"
            )
        return tuple(int(name in found) for name in names)
