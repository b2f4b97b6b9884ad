"""A table's columns as features in [0, 1]: fitted on the training part, kept as plain data."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.tables import Table, listed, shown_value
from imbsam.errors import SettingError

MAX_CATEGORIES = 100
"""A column of text with more values than this in the training part is no category."""


class TableEncoder:
    """Numbers to [0, 1] by the training part's minimum and maximum, text to one feature per value.

    Of a column of numbers, x -> (x - minimum) / (maximum - minimum) over the training rows, not clipped: a value
    outside the training range is a sign of an anomaly, and stays outside [0, 1]. A missing number is the training
    median, and a further 0/1 feature says where it was missing. Of a column of text, one 0/1 feature per value seen in
    training, missing being a value; a value that was not seen is 0 in all of them. Columns with a single value are left
    out.

    scikit-learn's transformers do the same, but travel as pickles only; a checkpoint needs plain data.

    Args:
        table: The training rows.

    Attributes:
        feature_names: Names of the d features.
        notices: One line each on what was left out or filled in.

    Raises:
        SettingError: A column of text has too many values, or no column varies.
    """

    def __init__(self, table: Table) -> None:
        self.notices: list[str] = []
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
            medians.append(float(np.median(known)) if count else np.nan)
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
            if len(found) > MAX_CATEGORIES:
                raise SettingError(_no_category(table.source, name, found))
            self.categories[name] = found
        if constant:
            self.notices.append(f"left out, a single value in training: {listed(constant)}")
        if filled:
            self.notices.append(
                f"missing numbers are filled with the training median, in training in: {listed(filled)}"
            )
        if not self.feature_names:
            raise SettingError(f"{table.source}: no column varies in the training part: there is nothing to learn from")

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
            SettingError: A column is not there, or holds text in place of numbers.
        """
        columns = {**table.numbers, **table.texts}
        if lacking := [name for name in {**self._numeric(), **self.categories} if name not in columns]:
            raise SettingError(f"{table.source} lacks columns that the model was trained on: {listed(lacking)}")
        if text := [name for name in self._numeric() if name in table.texts]:
            examples = listed([f"{name} ({next(v for v in table.texts[name] if v is not None)!r})" for name in text])
            raise SettingError(f"{table.source} holds text where the training part held numbers: {examples}")
        parts = []
        if self.names:
            numbers = np.stack([columns[name] for name in self.names], axis=1)
            missing = np.isnan(numbers)
            if missing.any():
                # a column that was never missing in training has no median: the middle of its range
                middle = np.where(self.medians.isnan(), self.lows + self.widths / 2, self.medians)
                numbers = np.where(missing, middle, numbers)
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


def _no_category(source: str, name: str, found: list[str]) -> str:
    """Why a column of text is refused: codes without end, or numbers with something else among them."""
    strays = [value for value in found if value and not _is_number(value)]
    if len(strays) < len(found) / 2:
        return (
            f"{source}: column {name} is no number in some rows ({listed(strays, 3)}): leave them empty where missing"
        )
    return (
        f"{source}: column {name} is text with {len(found)} values in the training part ({listed(found, 3)}), more "
        f"than {MAX_CATEGORIES}: group them, or leave the column out with drop_columns"
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
