"""Which rows of a table are anomalies, by its label column."""

from collections import Counter
from typing import Any

import numpy as np

from datamodules.tables.reading import cell_text
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
        SettingError: A value is missing, there is only one, or nothing says which one marks the anomalies.
    """
    cells = [cell_text(value) for value in values.tolist()]
    sizes = dict(sorted(Counter(cells).items()))
    label = f"{source}: label {column}"
    if "" in sizes:
        raise SettingError(f"{label} is missing in {sizes['']} rows: write 0 there if nothing is known")
    if len(sizes) == 1:
        raise SettingError(f"{label} is {cells[0]} in every row: add rows with another value, or set another label")
    if anomaly_value is not None:
        chosen = cell_text(anomaly_value)
        if chosen not in sizes:
            raise SettingError(
                f"anomaly_value is {anomaly_value}: give a value of {column} in {source}: {first_few(sizes)}"
            )
    elif sizes.keys() == {"0", "1"}:
        chosen = "1"
    elif len(sizes) > 2:
        raise SettingError(f"{label} has {len(sizes)} values ({first_few(sizes)}): set anomaly_value to the anomalies'")
    else:
        chosen, other = sorted(sizes, key=sizes.__getitem__)
        if sizes[chosen] == sizes[other]:
            raise SettingError(f"{label} is {chosen} as often as {other}: set anomaly_value to the anomalies'")
    return np.array([cell == chosen for cell in cells]), chosen
