"""Some columns of a CSV or Parquet file, as text."""

import csv
from collections.abc import Collection, Iterable
from pathlib import Path

from datamodules.tables.reading import cell_text, check_table_file, read_parquet
from datamodules.tables.separators import open_text, text_format
from imbsam.errors import SettingError
from imbsam.messages import first_few


def read_columns(path: Path, columns: list[str], may_be_empty: Collection[str] = ()) -> list[tuple[str, ...]]:
    """The cells of these columns as text, row by row.

    Args:
        path: A CSV file, or a Parquet file, which needs pandas and pyarrow.
        columns: Names of the columns.
        may_be_empty: Those of them whose cells may be empty.

    Raises:
        SettingError: There is no such file or column, a cell of another column is empty, or there is no row.
    """
    check_table_file(path, (".csv", ".tsv", ".parquet"))
    rows = _parquet_rows(path, columns) if path.suffix.lower() == ".parquet" else _csv_rows(path, columns)
    for number, row in enumerate(rows, start=1):
        missing = [name for name, cell in zip(columns, row, strict=True) if cell == "" and name not in may_be_empty]
        if missing:
            raise SettingError(f"{path}: {missing[0]} is missing in data row {number}: fill it in")
    if not rows:
        raise SettingError(f"{path} lists no images: add a row for each")
    return rows


def _csv_rows(path: Path, columns: list[str]) -> list[tuple[str, ...]]:
    try:
        separator = text_format(path).separator
        with open_text(path) as file:
            reader = csv.DictReader(file, delimiter=separator, skipinitialspace=True)
            _check_columns(path, columns, reader.fieldnames or [])
            return [tuple((row[name] or "").strip() for name in columns) for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise SettingError(f"{path} is no CSV file in UTF-8 ({error}): save it as one") from error


def _parquet_rows(path: Path, columns: list[str]) -> list[tuple[str, ...]]:
    frame = read_parquet(path)
    _check_columns(path, columns, frame.columns)
    wanted = frame[columns].astype(object)
    cells = wanted.where(wanted.notna(), None)
    return [tuple(map(cell_text, row)) for row in cells.itertuples(index=False)]


def _check_columns(path: Path, columns: list[str], names: Iterable[str]) -> None:
    if missing := [name for name in columns if name not in names]:
        raise SettingError(
            f"{path} has no column {first_few(missing)}: it has {first_few(names, 10)}; set data.path_column, "
            "data.label_column or data.split_column"
        )
