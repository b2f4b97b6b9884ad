"""Tables of npz, CSV and Parquet files as columns of numbers and columns of text."""

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.tables.separators import text_format
from imbsam.errors import SettingError
from imbsam.messages import first_few

SUFFIXES = (".npz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")

DATES_TO_NUMBERS = "make numbers of them, such as days since an event, the weekday or the hour"


@dataclass(frozen=True)
class Table:
    """Columns of one length N.

    Attributes:
        source: The file's name, for messages.
        numbers: Columns of numbers, float64 (N,) each, nan for a missing value.
        texts: Columns of text, object (N,) each, None for a missing value.
        labels: The label column, float64 or object (N,), or None if there is none.
        refused: Columns that are neither numbers nor text, and why.
        dropped: Columns that ``drop_columns`` left out.
    """

    source: str
    numbers: dict[str, Any]
    texts: dict[str, Any]
    labels: Any = None
    refused: dict[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of rows N."""
        return len(next(iter({**self.numbers, **self.texts}.values()), ()))

    def take(self, rows: Any) -> "Table":
        """The rows of an index array, without labels."""
        numbers, texts = ({name: v[rows] for name, v in part.items()} for part in (self.numbers, self.texts))
        return replace(self, numbers=numbers, texts=texts, labels=None)

    def refuse(self, reasons: dict[str, str]) -> None:
        """Raise one :class:`SettingError` on all columns that cannot be used, if any, with the setting to drop them."""
        if reasons:
            columns = "; ".join(f"column {name} {reason}" for name, reason in reasons.items())
            names = json.dumps([*self.dropped, *reasons], ensure_ascii=False)
            them = "it" if len(reasons) == 1 else "them"
            raise SettingError(
                f"{self.source}: {columns}; fix {them}, or leave {them} out: --data.drop_columns '{names}'"
            )


def read_table(
    path: Path, label: str | None, drop_columns: Sequence[str] = (), only: Collection[str] | None = None
) -> Table:
    """Read a table.

    Args:
        path: An npz file with the array ``X`` (N, d) and the labels (N,), a CSV file with a header line (gzipped or
            not; separated by commas, semicolons or tabs), or a Parquet file; the latter two need pandas (and pyarrow):
            ``pip install pandas pyarrow``.
        label: Name of the label column; None is ``y`` in an npz file.
        drop_columns: Columns to leave out.
        only: Read these columns alone, if they are there, and no label.

    Raises:
        SettingError: The file cannot be read or is no table.
    """
    check_table_file(path, SUFFIXES)
    numpy_file = path.suffix.lower() == ".npz"
    if label is None and only is None and not numpy_file:
        raise SettingError(f"label is null: name the column of {path.name} that says which rows are anomalies")
    label = label or "y"
    columns = _read_npz(path, label) if numpy_file else _read_frame(path)
    rows = len(next(iter(columns.values()), ()))
    if only is not None:
        columns = {name: values for name, values in columns.items() if name in only}
    elif label not in columns:
        raise SettingError(f"label is {label}, which {path.name} does not have: it has {first_few(columns)}")
    elif unknown := [name for name in drop_columns if name not in columns]:
        others = first_few(name for name in columns if name != label)
        raise SettingError(f"drop_columns has {first_few(unknown)}, which {path.name} does not have: it has {others}")
    else:
        columns = {name: values for name, values in columns.items() if name == label or name not in drop_columns}
    plain: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for name, values in columns.items():
        try:
            plain[name] = _plain(values)
        except _UnusableColumn as error:
            refused[name] = str(error)
    labels = None
    if only is None:
        if label in refused:
            raise SettingError(f"{path.name}: label {label} {refused[label]}")
        labels = plain.pop(label)
    if not rows or not (plain or refused or only):
        raise SettingError(
            f"{path.name} has {rows} rows and {len(plain)} columns beside the label: add what is missing"
        )
    texts = {name: values for name, values in plain.items() if values.dtype == object}
    numbers = {name: values for name, values in plain.items() if name not in texts}
    return Table(path.name, numbers, texts, labels, refused, tuple(drop_columns))


def check_table_file(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raise a :class:`SettingError` unless the file is there and its name ends in one of these."""
    if not path.name.lower().endswith(suffixes):
        raise SettingError(f"path is {path}: give a file that ends in {', '.join(suffixes)}")
    if not path.is_file():
        raise SettingError(f"path is {path}: there is no such file")


def read_parquet(path: Path) -> Any:
    """A Parquet file as a pandas DataFrame, or a one-line :class:`SettingError`."""
    with _one_line_errors(path):
        import pandas

        return pandas.read_parquet(path)


def cell_text(value: Any) -> str:
    """A cell as text: 1 for 1.0 and True, nothing if it is missing."""
    if value is None or value != value:
        return ""
    if isinstance(value, (bool, int, float)):
        return str(int(value)) if float(value).is_integer() else repr(value)
    return str(value)


def _read_npz(path: Path, label: str) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("X", label) if name in file}
            names = first_few(file.files)
    except (ValueError, OSError, EOFError) as error:
        raise SettingError(
            f"path is {path}, which is no npz file ({error}): give one of plain arrays X and y"
        ) from error
    if "X" not in arrays:
        raise SettingError(f"{path.name} has no array X: it has {names}")
    features = arrays.pop("X")
    if features.ndim != 2 or any(labels.shape != features.shape[:1] for labels in arrays.values()):
        shapes = ", ".join(f"{name} {array.shape}" for name, array in {"X": features, **arrays}.items())
        raise SettingError(f"{path.name} has {shapes}: give X of shape (rows, columns) and one label a row")
    return {f"x{i}": column for i, column in enumerate(np.ascontiguousarray(features.T))} | arrays


def _read_frame(path: Path) -> dict[str, Any]:
    if path.suffix.lower() == ".parquet":
        frame = read_parquet(path)
        header = [str(name) for name in frame.columns]
    else:
        with _one_line_errors(path):
            import pandas

            separator, decimal, header = text_format(path)
            options = {"low_memory": False, "encoding": "utf-8-sig", "index_col": False}
            frame = pandas.read_csv(path, sep=separator, decimal=decimal, **options)
        if header[:1] == [""]:  # the row numbers that pandas writes beside a frame
            frame = frame.iloc[:, 1:]
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise SettingError(f"{path.name} has more than one column {first_few(twice)}: rename all but one")
    return {str(name): frame.iloc[:, i] for i, name in enumerate(frame.columns)}


@contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise SettingError(f"path is {path}: to read it, pip install pandas pyarrow") from error
    except (ValueError, OSError) as error:  # pandas' and pyarrow's own errors among them
        reason = " ".join(str(error).split())
        raise SettingError(f"path is {path}, which is no table ({reason}): fix it, or save it again") from error


class _UnusableColumn(Exception):
    """What is wrong with a column, after its name."""


def _plain(values: Any) -> Any:
    """A column as float64 with nan, or as objects: str and None."""
    if isinstance(values, np.ndarray):
        if values.dtype.kind in "US":
            return values.astype(str).astype(object)
        if values.dtype.kind not in "biuf":
            raise _UnusableColumn(f"holds {values.dtype}: make numbers or text of it")
        return _finite(values.astype(np.float64))
    from pandas.api import types

    dtype = values.dtype
    if types.is_numeric_dtype(dtype) and not types.is_complex_dtype(dtype):
        return _finite(values.to_numpy(dtype=np.float64, na_value=np.nan))
    if types.is_datetime64_any_dtype(dtype):
        raise _UnusableColumn(f"holds dates ({values.dropna().iloc[0]}): {DATES_TO_NUMBERS}")
    if not (types.is_object_dtype(dtype) or types.is_string_dtype(dtype) or str(dtype) == "category"):
        raise _UnusableColumn(f"holds {dtype}: make numbers of it")
    missing = values.isna().to_numpy()
    cells = values.astype(object).to_numpy()
    kinds = {type(cell) for cell in cells[~missing].tolist()}
    if kinds == {str}:
        return np.where(missing, None, cells)
    try:
        # mixed numbers, Decimals, booleans with gaps, or nothing at all
        return _finite(np.array([np.nan if gap else float(cell) for cell, gap in zip(cells, missing, strict=True)]))
    except (TypeError, ValueError):
        names = first_few(sorted(kind.__name__ for kind in kinds))
        raise _UnusableColumn(f"holds {names}: make numbers or text of it") from None


def _finite(values: Any) -> Any:
    """The numbers, unless one is infinite."""
    infinite = np.isinf(values)
    if infinite.any():
        raise _UnusableColumn(
            f"is infinite in {infinite.sum()} rows, first in data row {int(infinite.argmax()) + 1}: write a number "
            "there, or nothing where the value is missing"
        )
    return values
