"""A table's columns as features in [0, 1]: fitted on the training part, kept as plain data."""

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.tables import DATES_TO_NUMBERS, Table, listed, shown_value
from imbsam.errors import SettingError

MAX_CATEGORIES = 100
"""A column of text with more values than this in the training part is no category."""

DATE = re.compile(
    r"""(\d{4}-\d\d? | \d{4}([-/.])\d\d?\2\d\d? | \d\d?([-/.])\d\d?\3\d{4} | \d\d([-/.])\d\d\4\d\d  # 2026-11-24
    | \d{1,4}[-. ]+[a-z]{3,9}[-.,\ ]+\d{1,4} | [a-z]{3,9}[.\ ]+\d\d?,?\ +\d{4})  # 24 Nov 2026, Nov 24, 2026
    ([T\ ]+\d\d?:\d\d.*)?  # with a time
    | \d\d?:\d\d(:\d\d(\.\d+)?)?""",
    re.VERBOSE | re.IGNORECASE,
)
"""A date, a date with a time, or a time of the day."""


class TableEncoder:
    """Numbers to [0, 1] by the training part's minimum and maximum, text to one feature per value.

    Of a column of numbers, x -> (x - minimum) / (maximum - minimum) over the training rows, not clipped: a value
    outside the training range is a sign of an anomaly, and stays outside [0, 1]. A missing number is the training
    median, and where training had gaps a further 0/1 feature says where it was missing. Of a column of text, one 0/1
    feature per value seen in training, missing being a value; a value that was not seen is 0 in all of them. Columns
    with a single value are left out.

    scikit-learn's transformers do the same, but travel as pickles only; a checkpoint needs plain data.

    Args:
        table: The training rows.

    Attributes:
        feature_names: Names of the d features.
        notices: One line each on what was left out or filled in.

    Raises:
        SettingError: Columns cannot be used, all of them in one message, or no column varies.
    """

    def __init__(self, table: Table) -> None:
        self.notices: list[str] = []
        refused = dict(table.refused)
        constant, filled = [], []
        self.names: list[str] = []  # columns of numbers
        self.indicators: list[str] = []  # those that say where they were missing
        medians, lows, widths = [], [], []
        for name, values in table.numbers.items():
            missing = np.isnan(values)
            count = int(missing.sum())
            known = values[~missing] if count else values
            if not len(known):
                constant.append(name)
                continue
            if count:
                filled.append(f"{name} ({count} rows)")
                self.indicators.append(name)
            low, high = float(known.min()), float(known.max())
            if low == high:
                constant.append(name)
                continue
            self.names.append(name)
            medians.append(float(np.median(known)))  # for later gaps too
            lows.append(low)
            widths.append(high - low)
        self.medians, self.lows, self.widths = (
            torch.tensor(column, dtype=torch.float64) for column in (medians, lows, widths)
        )
        self.categories: dict[str, list[str]] = {}
        for name, values in table.texts.items():
            found = sorted({shown_value(value) for value in values.tolist()})
            if len(found) == 1:
                constant.append(name)
                continue
            if reason := _no_category(values.tolist(), found):
                refused[name] = reason
            self.categories[name] = found
        table.refuse(refused)
        if constant:
            self.notices.append(f"left out, a single value in training: {listed(constant)}")
        if filled:
            self.notices.append(
                f"missing numbers are filled with the training median, in training in: {listed(filled)}"
            )
        if self.categories:
            counts = (f"{name} ({len(found)})" for name, found in self.categories.items())
            self.notices.append(f"text becomes one feature per value: {listed(counts)}")
        if not self.feature_names:
            raise SettingError(f"{table.source}: no column varies in the training part: there is nothing to learn from")

    @property
    def columns(self) -> list[str]:
        """Names of the columns that features are made of."""
        return [*self._numeric(), *self.categories]

    @property
    def feature_names(self) -> list[str]:
        """Names of the d features, in their order."""
        values = [f"{name}={value or '(missing)'}" for name, found in self.categories.items() for value in found]
        return [*self.names, *(f"{name} missing" for name in self.indicators), *values]

    def transform(self, table: Table) -> Tensor:
        """The features of a table's rows.

        Args:
            table: A table with the columns of the training rows, in any order, and maybe others.

        Returns:
            float32 (N, d).

        Raises:
            SettingError: A column is not there, cannot be read, or holds text in place of numbers.
        """
        if unusable := [f"{name} {table.refused[name]}" for name in self.columns if name in table.refused]:
            raise SettingError(f"{table.source}: columns that the model was trained on: {'; '.join(unusable)}")
        columns = {**table.numbers, **table.texts}
        if lacking := [name for name in self.columns if name not in columns]:
            raise SettingError(f"{table.source} lacks columns that the model was trained on: {listed(lacking)}")
        if text := [name for name in self._numeric() if name in table.texts]:
            examples = listed([f"{name} ({next(v for v in table.texts[name] if v is not None)!r})" for name in text])
            raise SettingError(f"{table.source} holds text where the training part held numbers: {examples}")
        parts = []
        if self.names:
            numbers = np.stack([columns[name] for name in self.names], axis=1)
            missing = np.isnan(numbers)
            if missing.any():
                numbers = np.where(missing, self.medians.numpy(), numbers)
            numbers = (numbers - self.lows.numpy()) / self.widths.numpy()
            parts.append(numbers.astype(np.float32))
        if self.indicators:
            parts.append(np.stack([np.isnan(columns[name]) for name in self.indicators], axis=1).astype(np.float32))
        for name, found in self.categories.items():
            cells = np.array([shown_value(value) for value in columns[name].tolist()], dtype=str)
            parts.append((cells[:, None] == np.array(found)).astype(np.float32))
        return torch.from_numpy(np.concatenate(parts, axis=1))

    def unseen(self, features: Tensor) -> list[str]:
        """Columns of text with values that training did not see, and in how many rows of ``transform``'s result."""
        found = []
        start = len(self.feature_names) - sum(map(len, self.categories.values()))
        for name, values in self.categories.items():
            rows = int((features[:, start : start + len(values)] == 0).all(dim=1).sum())
            start += len(values)
            if rows:
                found.append(f"{name} ({rows} rows)")
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything that was fitted, as lists, strings and tensors."""
        return dict(vars(self))

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "TableEncoder":
        """The encoder that :meth:`state_dict` describes."""
        encoder = cls.__new__(cls)
        vars(encoder).update(state)
        return encoder

    def _numeric(self) -> dict[str, None]:
        return dict.fromkeys([*self.names, *self.indicators])


def _no_category(values: list[Any], found: list[str]) -> str | None:
    """Why a column of text is refused, or None: numbers with something else among them, dates, codes without end."""
    known = [value for value in map(shown_value, values) if value]
    strays = [value for value in known if not _is_number(value)]
    if len(strays) < len(known) / 2:
        if not strays:  # of all rows there is one; not in the training part
            return None
        return f"is numbers but for {len(strays)} training rows, first {strays[0]!r}: leave them empty where missing"
    if sum(DATE.fullmatch(value) is not None for value in known) > len(known) / 2:
        return f"holds dates ({next(value for value in known if DATE.fullmatch(value))}): {DATES_TO_NUMBERS}"
    if len(found) > MAX_CATEGORIES:
        return (
            f"is text with {len(found)} values in the training part ({listed(found, 3)}), more than {MAX_CATEGORIES}: "
            "group them"
        )
    return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
