"""Which class counts decide what is many, medium and few."""

from typing import Any

from torch import Tensor

from imbsam.errors import SettingError


def counts_of_ratio(data: Any, ratio: float | None) -> Tensor | None:
    """The class counts of ``groups_of_ratio``.

    Args:
        data: the DataModule, set up.
        ratio: the setting; None means that the training data's own counts decide.

    Returns:
        int64 tensor of shape (C,), or None.

    Raises:
        SettingError: the data have no ratio, or none of this size.
    """
    if ratio is None:
        return None
    if not hasattr(data, "counts_of_ratio"):
        raise SettingError(f"groups_of_ratio is {ratio:g}: {type(data).__name__} has no ratio: leave it out")
    try:
        counts: Tensor = data.counts_of_ratio(ratio)
    except SettingError as error:
        raise SettingError(f"groups_of_ratio is {ratio:g}: {error}") from error
    return counts
