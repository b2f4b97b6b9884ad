"""Which rows are trained on, validated and tested on, and which anomalies are labelled: ADBench's protocol."""

from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from imbsam.errors import SettingError


@dataclass(frozen=True)
class Split:
    """Row indices into the table, int64; ``labelled`` and ``val_labelled``, bool, mark known ones of train and val."""

    train: Any
    labelled: Any
    val: Any
    val_labelled: Any
    test: Any


def split_rows(
    anomalous: Any,
    source: str,
    *,
    labelled_share: float,
    test_share: float,
    val_share: float,
    min_rows: int,
    max_rows: int | None,
    seed: int,
) -> Split:
    """Draw the parts, stratified on the true labels.

    With ``val_share`` 0, ``min_rows`` 1000, ``max_rows`` 10000 these are the very rows that ADBench (Han et al.,
    NeurIPS 2022) draws for the same seed: a table below ``min_rows`` is resampled with replacement, one above
    ``max_rows`` is subsampled, then the test part is split off, then ceil(labelled_share * training anomalies) are
    labelled. The same share of the validation anomalies is labelled last.

    Args:
        anomalous: The true labels, bool (N,).
        source: The file's name, for messages.
        labelled_share: Share of the training anomalies whose label is known, in (0, 1].
        test_share: Share of the rows to test on, in (0, 1).
        val_share: Share of the rest to validate on, in [0, 1).
        min_rows: Resample smaller tables to this many rows; 0 for never.
        max_rows: Subsample larger tables to this many rows; None for never.
        seed: Seed of all draws.

    Raises:
        SettingError: A part would have no anomaly, or nothing else.
    """
    from sklearn.model_selection import train_test_split

    # the legacy generator, in the order of ADBench's calls, to draw the same rows
    random = np.random.RandomState(seed)
    rows = np.arange(len(anomalous))
    if 0 < len(rows) < min_rows:
        rows = random.choice(rows, min_rows, replace=True)
    elif max_rows is not None and len(rows) > max_rows:
        rows = random.choice(rows, max_rows, replace=False)
    anomalies = int(anomalous[rows].sum())
    if min(anomalies, len(rows) - anomalies) < (3 if val_share else 2):
        parts = "training, validation" if val_share else "training"
        raise SettingError(
            f"{source} has {len(rows)} rows, {anomalies} of them anomalies: {parts} and test need at least one anomaly "
            "and one other row each"
        )
    try:
        train, test = train_test_split(rows, test_size=test_share, stratify=anomalous[rows], random_state=random)
        val = rows[:0]
        if val_share:
            train, val = train_test_split(train, test_size=val_share, stratify=anomalous[train], random_state=random)
    except ValueError as error:  # a share so small that a part has fewer rows than there are classes
        raise SettingError(
            f"test_share is {test_share:g} and val_share {val_share:g}, which leave a part of the {len(rows)} rows of "
            f"{source} too small: set them higher or lower"
        ) from error
    for name, part in (("training", train), ("validation", val), ("test", test)):
        if len(part) and anomalous[part].all() | ~anomalous[part].any():
            raise SettingError(
                f"{source} has {anomalies} anomalies in {len(rows)} rows: the {name} part gets "
                f"{int(anomalous[part].sum())} of them in {len(part)} rows; set its share higher or lower, or add rows"
            )
    labelled, val_labelled = (_labelled(anomalous[part], labelled_share, random) for part in (train, val))
    return Split(train, labelled, val, val_labelled, test)


def _labelled(anomalous: Any, share: float, random: np.random.RandomState) -> Any:
    """Which rows have a known label: a share of the anomalies, rounded up."""
    anomalies = np.flatnonzero(anomalous)
    labelled = np.zeros(len(anomalous), dtype=bool)
    labelled[random.choice(anomalies, ceil(share * len(anomalies)), replace=False)] = True
    return labelled
