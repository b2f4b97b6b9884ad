"""A table's columns as scaled features: fitted on the training part, kept as plain data."""

import re
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from datamodules.tables.reading import DATES_TO_NUMBERS, Table, cell_text
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
    """Numbers scaled by one of scikit-learn's transformers, text one-hot.

    Numbers are scaled column by column, fitted on the training rows:

    * ``standard``: to mean 0 and deviation 1 (StandardScaler).
    * ``robust``: to median 0 and interquartile range 1 (RobustScaler); a column whose quartiles are equal is centred.
    * ``quantile``: to a normal distribution, by rank (QuantileTransformer). Values outside the training range are
      clipped to it.
    * ``min_max``: to [0, 1] (MinMaxScaler), not clipped: values outside the training range stay outside.
    * ``none``: left as they are.

    A missing number is the training median; a column that had gaps in training gets a further 0/1 feature that marks
    them. A column of text becomes one 0/1 feature for each value seen in training, missing being a value; a value that
    was not seen is 0 in all of them. Columns with a single value are left out.

    What a transformer has fitted is kept as tensors: a checkpoint needs plain data, and transformers would be pickles.

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
        gaps = {name: int(np.isnan(values).sum()) for name, values in table.numbers.items()}
        self.indicators = [name for name, count in gaps.items() if 0 < count < len(table)]
        self.names = [name for name, values in table.numbers.items() if gaps[name] < len(table) and _varies(values)]
        self.medians = torch.empty(0)
        self.fitted: dict[str, Tensor] = {}
        if self.names:
            numbers = np.stack([table.numbers[name] for name in self.names], axis=1)
            self.medians = torch.from_numpy(np.nanmedian(numbers, axis=0))
            scaler = _transformer(scaling, len(numbers)).fit(numbers)
            arrays = {name: value for name, value in vars(scaler).items() if isinstance(value, np.ndarray)}
            self.fitted = {name: torch.from_numpy(value) for name, value in arrays.items()}
        values_of = {name: sorted(set(map(cell_text, values.tolist()))) for name, values in table.texts.items()}
        self.categories = {name: values for name, values in values_of.items() if len(values) > 1}
        reasons = {name: _no_category(table.texts[name].tolist(), values) for name, values in self.categories.items()}
        table.refuse({**table.refused, **{name: reason for name, reason in reasons.items() if reason}})
        constant = [n for n in (*table.numbers, *table.texts) if n not in self.names and n not in self.categories]
        notes = {
            "left out, a single value in training": constant,
            "missing numbers are filled with the training median, in training in": [
                f"{name} ({gaps[name]} rows)" for name in self.indicators
            ],
            "text becomes one feature per value": [f"{name} ({len(v)})" for name, v in self.categories.items()],
        }
        self.notices = [f"{what}: {first_few(names)}" for what, names in notes.items() if names]
        if not self.feature_names:
            raise SettingError(f"{table.source} has no column that varies in the training part: add one to learn from")

    @property
    def columns(self) -> list[str]:
        """Names of the columns that features are made of."""
        return list(dict.fromkeys([*self.names, *self.indicators, *self.categories]))

    @property
    def feature_names(self) -> list[str]:
        """Names of the d features, in their order."""
        values = [f"{name}={value or '(missing)'}" for name, values in self.categories.items() for value in values]
        return [*self.names, *(f"{name} missing" for name in self.indicators), *values]

    def transform(self, table: Table) -> Tensor:
        """The features of a table's rows.

        Args:
            table: A table with the columns of the training rows, in any order, and maybe others.

        Returns:
            float32 (N, d).

        Raises:
            SettingError: A column is missing, cannot be read, or holds text instead of numbers.
        """
        if unusable := [f"{name} {table.refused[name]}" for name in self.columns if name in table.refused]:
            raise SettingError(f"{table.source}: columns that the model was trained on: {'; '.join(unusable)}")
        columns = {**table.numbers, **table.texts}
        if lacking := [name for name in self.columns if name not in columns]:
            raise SettingError(f"{table.source} lacks columns that the model was trained on: {first_few(lacking)}")
        if text := [name for name in self.columns if name in table.texts and name not in self.categories]:
            examples = first_few([f"{name} ({next(v for v in table.texts[name] if v is not None)!r})" for name in text])
            raise SettingError(f"{table.source} holds text where the training part held numbers: {examples}")
        parts = []
        if self.names:
            numbers = np.stack([columns[name] for name in self.names], axis=1)
            numbers = np.where(np.isnan(numbers), self.medians.numpy(), numbers)
            scaler = _transformer(self.scaling, len(numbers))
            vars(scaler).update({name: value.numpy() for name, value in self.fitted.items()})
            parts.append(scaler.transform(numbers).astype(np.float32))
        parts += [np.isnan(columns[name])[:, None].astype(np.float32) for name in self.indicators]
        for name, values in self.categories.items():
            cells = np.array([cell_text(value) for value in columns[name].tolist()], dtype=str)
            parts.append((cells[:, None] == np.array(values)).astype(np.float32))
        return torch.from_numpy(np.concatenate(parts, axis=1))

    def unseen(self, features: Tensor) -> list[str]:
        """Columns of text with values that training did not see, and in how many rows of ``transform``'s result."""
        sizes = [len(values) for values in self.categories.values()]
        one_hot = torch.split(features[:, features.shape[1] - sum(sizes) :], sizes, dim=1)
        rows = {name: int((part == 0).all(dim=1).sum()) for name, part in zip(self.categories, one_hot, strict=True)}
        return [f"{name} ({count} rows)" for name, count in rows.items() if count]

    def state_dict(self) -> dict[str, Any]:
        """Everything that was fitted, as lists, strings and tensors."""
        return dict(vars(self))

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "TableEncoder":
        """The encoder that :meth:`state_dict` describes."""
        encoder = cls.__new__(cls)
        vars(encoder).update(state)
        return encoder


def _varies(values: Any) -> bool:
    return bool(np.nanmin(values) != np.nanmax(values))


def _transformer(scaling: Scaling, rows: int) -> Any:
    """The unfitted transformer, for a training part of so many rows."""
    from sklearn import preprocessing as sk

    if scaling == "quantile":
        return sk.QuantileTransformer(n_quantiles=min(1000, rows), output_distribution="normal", random_state=0)
    kinds = {"standard": sk.StandardScaler, "robust": sk.RobustScaler, "min_max": sk.MinMaxScaler}
    return kinds.get(scaling, sk.FunctionTransformer)()


def _no_category(values: list[Any], distinct: list[str]) -> str | None:
    """Why a column of text is refused, or None: numbers with something else among them, dates, too many values."""
    known = [value for value in map(cell_text, values) if value]
    strays = [value for value in known if not _is_number(value)]
    if len(strays) < len(known) / 2:
        if not strays:  # the stray is in another part
            return None
        return f"is numbers but for {len(strays)} training rows, first {strays[0]!r}: leave them empty where missing"
    dates = [value for value in known if DATE.fullmatch(value)]
    if len(dates) > len(known) / 2:
        return f"holds dates ({dates[0]}): {DATES_TO_NUMBERS}"
    if len(distinct) > MAX_CATEGORIES:
        return (
            f"is text with {len(distinct)} values in the training part ({first_few(distinct, 3)}), more than "
            f"{MAX_CATEGORIES}: group them"
        )
    return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
