"""Some columns of a CSV or Parquet file, as text."""

import csv
import os
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from datamodules.tables.reading import shown_value
from datamodules.tables.separators import open_text, text_format
from imbsam.errors import SettingError
from imbsam.messages import first_few


def read_columns(path: Path, columns: list[str]) -> list[tuple[str, ...]]:
    """The cells of these columns as text, row by row.

    Args:
        path: A CSV or Parquet file.
        columns: Names of the columns.

    Raises:
        SettingError: There is no such file or column, a cell is empty, or there is no row.
    """
    if not path.is_file():
        raise SettingError(f"path={os.fspath(path)!r}: there is no such file.")
    if path.suffix.lower() == ".parquet":
        names, cells = _read_parquet(path, columns)
    elif path.suffix.lower() in (".csv", ".tsv"):
        names, cells = _read_csv(path, columns)
    else:
        raise SettingError(f"path={os.fspath(path)!r}: give a file that ends in .csv, .tsv or .parquet.")
    if missing := [name for name in columns if name not in names]:
        raise SettingError(
            f"{path} has no column {first_few(missing)}: it has {first_few(names, 10)}; set data.path_column, "
            "data.label_column or data.split_column."
        )
    rows = list(zip(*(cells[name] for name in columns), strict=True))
    for number, row in enumerate(rows, start=1):
        if not all(row):
            raise SettingError(f"{path}: {columns[row.index('')]} is missing in data row {number}.")
    if not rows:
        raise SettingError(f"{path} lists no image.")
    return rows


def _read_csv(path: Path, columns: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    try:
        written = text_format(path)
        with open_text(path) as file:
            reader = csv.DictReader(file, delimiter=written.separator, skipinitialspace=True)
            names = list(reader.fieldnames or [])
            rows = [[(row[name] or "").strip() for name in columns if name in names] for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise SettingError(f"{path} is no CSV file in UTF-8: {error}.") from error
    if written.notice:
        rank_zero_info(f"{path}: {written.notice}")
    known = [name for name in columns if name in names]
    return names, {name: [row[i] for row in rows] for i, name in enumerate(known)}


def _read_parquet(path: Path, columns: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise SettingError(f"path={os.fspath(path)!r}: reading it needs pyarrow: pip install pyarrow.") from error
    try:
        names = list(parquet.read_schema(path).names)
        known = [name for name in columns if name in names]
        table = parquet.read_table(path, columns=known)
    except (pyarrow.ArrowException, OSError) as error:
        raise SettingError(f"{path} is no Parquet file: {' '.join(str(error).split())}.") from error
    return names, {name: [shown_value(value) for value in table[name].to_pylist()] for name in known}
