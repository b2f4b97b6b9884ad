"""Checks of settings: whole numbers, numbers in an interval, names from a list."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, get_args

from imbsam.errors import SettingError


def check_whole_numbers(least: int = 1, **settings: int | Sequence[int]) -> None:
    """Refuse a setting that is not a whole number, or one of whose numbers is too small.

    Args:
        least: The smallest number that can work.
        settings: The settings by name, such as ``width=16`` or ``hidden=[64, 32]``.

    Raises:
        SettingError: It names the first setting that cannot work.

    Example:
        >>> check_whole_numbers(width=0)
        Traceback (most recent call last):
        imbsam.errors.SettingError: width is 0: give a whole number from 1
    """
    for name, value in settings.items():
        several = isinstance(value, Sequence) and not isinstance(value, str)
        for number in value if several else [value]:  # type: ignore[union-attr]
            if isinstance(number, bool) or not isinstance(number, Integral) or number < least:
                what = "whole numbers" if several else "a whole number"
                raise SettingError(f"{name} is {value!r}: give {what} from {least}")


def check_interval(interval: str, **settings: float) -> None:
    """Refuse a setting that is outside an interval, or not a number.

    Args:
        interval: Such as ``[0, 1)`` or ``(0, inf)``; a round bracket leaves the end out.
        settings: The settings by name.

    Raises:
        SettingError: It names the first setting that is outside.

    Example:
        >>> check_interval("[0, 1)", val_share=1.5)
        Traceback (most recent call last):
        imbsam.errors.SettingError: val_share is 1.5: give a number in [0, 1)
    """
    low, high = map(float, interval[1:-1].split(","))
    for name, value in settings.items():
        above = value > low or (value == low and interval[0] == "[")
        below = value < high or (value == high and interval[-1] == "]")
        if not (above and below):
            raise SettingError(f"{name} is {value}: give a number in {interval}")


def check_choice(choices: Any, **settings: str) -> None:
    """Refuse a setting that is none of the values of a ``Literal``.

    Args:
        choices: The ``Literal`` type.
        settings: The settings by name.

    Raises:
        SettingError: It names the first setting that is none of them.

    Example:
        >>> from typing import Literal
        >>> check_choice(Literal["min", "max"], mode="mean")
        Traceback (most recent call last):
        imbsam.errors.SettingError: mode is 'mean': choose one of min, max
    """
    for name, value in settings.items():
        if value not in get_args(choices):
            raise SettingError(f"{name} is {value!r}: choose one of {', '.join(get_args(choices))}")
