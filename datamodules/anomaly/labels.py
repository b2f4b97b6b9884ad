"""Which rows of a table are anomalies, by its label column."""

from typing import Any

import numpy as np

from datamodules.tables.reading import shown_value
from imbsam.errors import SettingError
from imbsam.messages import first_few


def anomaly_labels(values: Any, column: str, source: str, anomaly_value: Any = None) -> tuple[Any, str]:
    """Which rows are anomalies.

    Args:
        values: The label column, float64 or object (N,).
        column: Its name, for messages.
        source: The file's name, for messages.
        anomaly_value: The anomalies' value; None is 1 in a column of 0 and 1 (or booleans), else the rarer of two.

    Returns:
        True for anomalies, bool (N,), and the value that marks them.

    Raises:
        SettingError: A value is missing, there is one value only, or nothing says which value is the anomalies'.
    """
    shown = np.array([shown_value(value) for value in values.tolist()], dtype=object)
    found, counts = np.unique(shown.astype(str), return_counts=True)
    sizes = dict(zip(found.tolist(), counts.tolist(), strict=True))
    if missing := sizes.pop("", 0):
        raise SettingError(
            f"{source}: label {column} is missing in {missing} rows: write 0 there where nothing is known"
        )
    if len(sizes) == 1:
        raise SettingError(f"{source}: label {column} is {found[-1]} in every row: there is nothing to tell apart")
    if anomaly_value is not None:
        chosen = shown_value(anomaly_value)
        if chosen not in sizes:
            raise SettingError(
                f"anomaly_value={anomaly_value}: label {column} of {source} is one of {first_few(sizes)}"
            )
    elif set(sizes) == {"0", "1"}:
        chosen = "1"
    elif len(sizes) > 2:
        raise SettingError(
            f"{source}: label {column} has {len(sizes)} values ({first_few(sizes)}): set anomaly_value to the "
            "anomalies'"
        )
    else:
        chosen, other = sorted(sizes, key=lambda value: sizes[value])
        if sizes[chosen] == sizes[other]:
            raise SettingError(
                f"{source}: label {column} is {chosen} as often as {other}: set anomaly_value to the anomalies'"
            )
    return shown == chosen, chosen
