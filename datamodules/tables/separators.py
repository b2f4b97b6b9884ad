"""CSV files in the wild: separated by commas, semicolons or tabs, with decimal points or commas."""

import csv
import gzip
import re
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple

from lightning.pytorch.utilities import rank_zero_info

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}

_SAMPLE = 1000
"""How many lines to look at."""

_DECIMAL = re.compile(r"[+-]?\d+([.,])\d+")


class TextFormat(NamedTuple):
    """The separator of a file's columns, its decimal point or comma, and the names of its columns."""

    separator: str
    decimal: str
    header: list[str]


def open_text(path: Path) -> IO[str]:
    """Open a file, gzipped or not, as UTF-8 text for the ``csv`` module, skipping a byte order mark."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    return opened(path, "rt", newline="", encoding="utf-8-sig")  # type: ignore[return-value]


def text_format(path: Path) -> TextFormat:
    """Detect how a CSV file with a header is written: the separator makes the most columns, as many in every line.

    A message says so if it is not a comma.

    Raises:
        UnicodeDecodeError, OSError: It is no such file.
    """
    read = {separator: _first_rows(path, separator) for separator in SEPARATORS}
    columns = {separator: len(rows[0]) if rows else 0 for separator, rows in read.items()}
    even = [s for s, rows in read.items() if columns[s] > 1 and len({len(row) for row in rows}) == 1]
    separator = max(even or SEPARATORS, key=columns.__getitem__)  # of equals the first, the comma
    rows = read[separator]
    decimals = [match[1] for row in rows[1:] for cell in row if (match := _DECIMAL.fullmatch(cell.strip()))]
    comma = separator != "," and 2 * decimals.count(",") > len(decimals)
    if separator != ",":
        decimal = " and has decimal commas" if comma else ""
        rank_zero_info(f"{path.name}: the file is separated by {SEPARATORS[separator]}{decimal}")
    return TextFormat(separator, "," if comma else ".", rows[0] if rows else [])


def _first_rows(path: Path, separator: str) -> list[list[str]]:
    rows = []
    with open_text(path) as file:
        try:
            for row in islice(csv.reader(file, delimiter=separator), _SAMPLE):
                rows += [row] if row else []
        except csv.Error:  # an endless cell, as the wrong separator may make one
            return rows
    return rows
