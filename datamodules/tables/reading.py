"""Tables of npz, CSV and Parquet files as columns of numbers and columns of text."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from datamodules.tables.separators import text_format
from imbsam.errors import SettingError
from imbsam.messages import first_few

SUFFIXES = (".npz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")

DATES_TO_NUMBERS = "make numbers of them, such as days since an event, the weekday or the hour"

YAML_WORDS = frozenset(("null", "true", "false", "yes", "no", "on", "off", "y", "n"))


@dataclass(frozen=True)
class Table:
    """Columns of one length N.

    Attributes:
        source: The file's name, for messages.
        numbers: Columns of numbers, float64 (N,) each, nan where a value is missing.
        texts: Columns of text, object (N,) each, None where a value is missing.
        labels: The label column, float64 or object (N,), or None where there is none.
        refused: Columns that are neither numbers nor text, and why.
        dropped: Columns that were left out on demand.
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
        return Table(
            self.source,
            {name: values[rows] for name, values in self.numbers.items()},
            {name: values[rows] for name, values in self.texts.items()},
            refused=self.refused,
            dropped=self.dropped,
        )

    def refuse(self, reasons: dict[str, str]) -> None:
        """Raise one error on all columns that cannot be used, if there are any.

        Args:
            reasons: The columns, and why.

        Raises:
            SettingError: It names every column and ends in the setting that leaves them out.
        """
        if reasons:
            told = "; ".join(f"column {name} {reason}" for name, reason in reasons.items())
            names = ",".join(map(_yaml, (*self.dropped, *reasons)))
            raise SettingError(
                f"{self.source}: {told}; fix {'it' if len(reasons) == 1 else 'them'}, or leave "
                f"{'it' if len(reasons) == 1 else 'them'} out: --data.drop_columns '[{names}]'"
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
        only: Read these columns alone, where they are there, and no label.

    Raises:
        SettingError: The file cannot be read or is no table.
    """
    if not path.name.lower().endswith(SUFFIXES):
        raise SettingError(f"path={path} ends in {path.suffix!r}: give a file that ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise SettingError(f"path={path}: there is no such file")
    numpy_file = path.suffix.lower() == ".npz"
    if label is None and only is None and not numpy_file:
        raise SettingError(f"label is null: name the column of {path.name} that says which rows are anomalies")
    columns = _read_npz(path, label or "y") if numpy_file else _read_frame(path)
    rows = len(next(iter(columns.values()), ()))
    labels = None
    if only is None:
        label = label or "y"
        labels = columns.pop(label, None)
        if labels is None:
            raise SettingError(f"label={label}: {path.name} has no such column; it has {first_few(columns)}")
        if unknown := [name for name in drop_columns if name not in columns and name != label]:
            raise SettingError(
                f"drop_columns: {path.name} has no column {first_few(unknown)}; it has {first_few(columns)}"
            )
        columns = {name: values for name, values in columns.items() if name not in drop_columns}
        try:
            labels = _plain(labels)
        except _UnusableColumn as error:
            raise SettingError(f"{path.name}: label {label} {error}") from None
    else:
        columns = {name: values for name, values in columns.items() if name in only}
    if not rows or not (columns or only):
        raise SettingError(f"{path.name} has {rows} rows and {len(columns)} columns beside the label: nothing to do")
    table = Table(path.name, {}, {}, labels, dropped=tuple(drop_columns))
    for name, values in columns.items():
        try:
            plain = _plain(values)
        except _UnusableColumn as error:
            table.refused[name] = str(error)
            continue
        (table.texts if plain.dtype == object else table.numbers)[name] = plain
    return table


def shown_value(value: Any) -> str:
    """A cell as text: 1 for 1.0 and True, nothing where it is missing."""
    if value is None or value != value:
        return ""
    if isinstance(value, (bool, int, float)):
        return str(int(value)) if float(value).is_integer() else repr(value)
    return str(value)


def _read_npz(path: Path, label: str) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if "X" not in file:
                raise SettingError(f"{path.name} has no array X; it has {first_few(file.files)}")
            features, labels = file["X"], file.get(label)
    except SettingError:
        raise
    except (ValueError, OSError, EOFError) as error:
        raise SettingError(f"path={path}: no npz file of plain arrays ({error})") from error
    if features.ndim != 2 or (labels is not None and labels.shape != features.shape[:1]):
        shapes = f"X {features.shape}" + ("" if labels is None else f", {label} {labels.shape}")
        raise SettingError(f"{path.name} has {shapes}: pass X of shape (rows, columns) and one label a row")
    columns: dict[str, Any] = {f"x{i}": column for i, column in enumerate(np.ascontiguousarray(features.T))}
    return columns if labels is None else {**columns, label: labels}


def _read_frame(path: Path) -> dict[str, Any]:
    try:
        import pandas
    except ImportError as error:
        raise SettingError(f"path={path}: reading it needs pandas: pip install pandas") from error
    unnamed = False
    try:
        if path.suffix.lower() != ".parquet":
            written = text_format(path)
            header = written.header
            frame = pandas.read_csv(
                path,
                sep=written.separator,
                decimal=written.decimal,
                low_memory=False,
                encoding="utf-8-sig",
                index_col=False,
            )
            if written.notice:
                rank_zero_info(f"{path.name}: {written.notice}")
            unnamed = header[:1] == [""]
        else:
            frame = pandas.read_parquet(path)
            header = [str(name) for name in frame.columns]
    except ImportError as error:
        raise SettingError(f"path={path}: reading it needs pyarrow: pip install pyarrow") from error
    except (ValueError, OSError) as error:  # pandas' and pyarrow's own errors among them
        raise SettingError(f"path={path}: no table ({' '.join(str(error).split())})") from error
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise SettingError(f"{path.name} has more than one column {first_few(twice)}: rename all but one")
    if unnamed:  # the row numbers that pandas writes beside a frame
        frame = frame.iloc[:, 1:]
    return {str(name): frame.iloc[:, i] for i, name in enumerate(frame.columns)}


class _UnusableColumn(Exception):
    """What is wrong with a column, after its name."""


def _plain(values: Any) -> Any:
    """A column as float64 with nan, or as objects: str and None."""
    if isinstance(values, np.ndarray):
        if values.dtype.kind in "US":
            return values.astype(str).astype(object)
        if values.dtype.kind not in "biuf":
            raise _UnusableColumn(f"holds {values.dtype}: numbers or text are needed")
        return _finite(values.astype(np.float64))
    from pandas.api import types

    if types.is_numeric_dtype(values.dtype) and not types.is_complex_dtype(values.dtype):
        return _finite(values.to_numpy(dtype=np.float64, na_value=np.nan))
    if not (types.is_object_dtype(values.dtype) or types.is_string_dtype(values.dtype) or _is_category(values)):
        if types.is_datetime64_any_dtype(values.dtype):
            raise _UnusableColumn(f"holds dates ({values.dropna().iloc[0]}): {DATES_TO_NUMBERS}")
        raise _UnusableColumn(f"holds {values.dtype}: make numbers of it")
    missing = values.isna().to_numpy()
    cells = values.astype(object).to_numpy()
    kinds = {type(cell) for cell in cells[~missing].tolist()}
    if kinds <= {str}:
        if not kinds:
            return np.full(len(cells), np.nan)
        return np.where(missing, None, cells)
    try:
        # mixed numbers, Decimals, booleans with gaps
        numbers = np.array([np.nan if gap else float(cell) for cell, gap in zip(cells, missing, strict=True)])
    except (TypeError, ValueError):
        kind = first_few(sorted(kind.__name__ for kind in kinds))
        raise _UnusableColumn(f"holds {kind}: make numbers or text of it") from None
    return _finite(numbers)


def _finite(values: Any) -> Any:
    """The numbers, unless one is infinite."""
    infinite = np.isinf(values)
    if infinite.any():
        raise _UnusableColumn(
            f"is infinite in {infinite.sum()} rows, first in data row {int(infinite.argmax()) + 1}: write a number "
            "there, or nothing where the value is missing"
        )
    return values


def _is_category(values: Any) -> bool:
    return str(values.dtype) == "category"


def _yaml(name: str) -> str:
    """A name as the command line's YAML reads it back."""
    return name if name.isidentifier() and name.lower() not in YAML_WORDS else json.dumps(name)
