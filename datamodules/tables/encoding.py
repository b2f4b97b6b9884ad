"""A table's columns as scaled features: fitted on the training part, kept as plain data."""

import re
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from datamodules.tables.reading import DATES_TO_NUMBERS, Table, shown_value
from imbsam.errors import SettingError
from imbsam.messages import first_few

Scaling = Literal["standard", "robust", "quantile", "min_max", "none"]

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
    """Numbers scaled by one of scikit-learn's transformers, text to one feature per value.

    Numbers are scaled column by column, by what the training rows say:

    * ``standard``: to mean 0 and deviation 1 (StandardScaler).
    * ``robust``: to median 0 and interquartile range 1 (RobustScaler); a column whose quartiles are equal is centred.
    * ``quantile``: to a normal distribution, by rank (QuantileTransformer). A value outside the training range is no
      further out than its end.
    * ``min_max``: to [0, 1] (MinMaxScaler), not clipped: values outside the training range stay outside.
    * ``none``: left as they are.

    A missing number is the training median, and where training had gaps a further 0/1 feature says where it was
    missing. Of a column of text, one 0/1 feature per value seen in training, missing being a value; a value that was
    not seen is 0 in all of them. Columns with a single value are left out.

    What a transformer has fitted is kept as tensors: a checkpoint needs plain data, and transformers travel as pickles.

    Args:
        table: The training rows.
        scaling: How numbers are scaled.

    Attributes:
        feature_names: Names of the d features.
        notices: One line each on what was left out or filled in.

    Raises:
        SettingError: Columns cannot be used, all of them in one message, or no column varies.
    """

    def __init__(self, table: Table, scaling: Scaling = "standard") -> None:
        self.scaling: Scaling = scaling
        self.notices: list[str] = []
        refused = dict(table.refused)
        constant, filled = [], []
        self.names: list[str] = []  # columns of numbers
        self.indicators: list[str] = []  # those that say where they were missing
        medians = []
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
            if known.min() == known.max():
                constant.append(name)
                continue
            self.names.append(name)
            medians.append(float(np.median(known)))  # for later gaps too
        self.medians = torch.tensor(medians, dtype=torch.float64)
        self.fitted: dict[str, Tensor] = {}
        if self.names:
            numbers = np.stack([table.numbers[name] for name in self.names], axis=1)
            scaler = _transformer(scaling, len(numbers)).fit(numbers)
            arrays = {name: value for name, value in vars(scaler).items() if isinstance(value, np.ndarray)}
            self.fitted = {name: torch.from_numpy(value) for name, value in arrays.items()}
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
            self.notices.append(f"left out, a single value in training: {first_few(constant)}")
        if filled:
            self.notices.append(
                f"missing numbers are filled with the training median, in training in: {first_few(filled)}"
            )
        if self.categories:
            counts = (f"{name} ({len(found)})" for name, found in self.categories.items())
            self.notices.append(f"text becomes one feature per value: {first_few(counts)}")
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
            raise SettingError(f"{table.source} lacks columns that the model was trained on: {first_few(lacking)}")
        if text := [name for name in self._numeric() if name in table.texts]:
            examples = first_few([f"{name} ({next(v for v in table.texts[name] if v is not None)!r})" for name in text])
            raise SettingError(f"{table.source} holds text where the training part held numbers: {examples}")
        parts = []
        if self.names:
            numbers = np.stack([columns[name] for name in self.names], axis=1)
            missing = np.isnan(numbers)
            if missing.any():
                numbers = np.where(missing, self.medians.numpy(), numbers)
            scaler = _transformer(self.scaling, len(numbers))
            vars(scaler).update({name: value.numpy() for name, value in self.fitted.items()})
            parts.append(scaler.transform(numbers).astype(np.float32))
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


def _transformer(scaling: Scaling, rows: int) -> Any:
    """The unfitted transformer, for a training part of so many rows."""
    from sklearn.preprocessing import (
        FunctionTransformer,
        MinMaxScaler,
        QuantileTransformer,
        RobustScaler,
        StandardScaler,
    )

    if scaling == "quantile":
        return QuantileTransformer(n_quantiles=min(1000, rows), output_distribution="normal", random_state=0)
    kinds = {"standard": StandardScaler, "robust": RobustScaler, "min_max": MinMaxScaler, "none": FunctionTransformer}
    return kinds[scaling]()


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
            f"is text with {len(found)} values in the training part ({first_few(found, 3)}), more than "
            f"{MAX_CATEGORIES}: group them"
        )
    return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
