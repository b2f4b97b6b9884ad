"""Checks of settings: whole numbers, numbers from 0 or in an interval, one of several names."""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, get_args

from imbsam.errors import SettingError


def check_whole_numbers(least: int = 1, **settings: int | Sequence[int]) -> None:
    """Refuse a setting that is not a whole number (or a list of them), or is too small.

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


def check_numbers(*, above: bool = False, finite: bool = True, hint: str = "", **settings: float) -> None:
    """Refuse a setting that is not a number from 0.

    Args:
        above: Refuse 0 too.
        finite: Refuse infinity too.
        hint: A usual value, for the message.
        settings: The settings by name.

    Raises:
        SettingError: It names the first setting that cannot work.

    Example:
        >>> check_numbers(rho=-1, hint="0.05 is usual")
        Traceback (most recent call last):
        imbsam.errors.SettingError: rho is -1: give a finite number from 0 (0.05 is usual)
    """
    for name, value in settings.items():
        try:
            number = math.nan if isinstance(value, (str, bool)) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not (number > 0 if above else number >= 0) or (finite and math.isinf(number)):
            what = f"a {'finite ' if finite else ''}number {'above' if above else 'from'} 0"
            raise SettingError(f"{name} is {value!r}: give {what}{f' ({hint})' if hint else ''}")


def check_interval(interval: str, **settings: float) -> None:
    """Refuse a setting that is outside an interval, or not a number.

    Args:
        interval: Such as ``[0, 1)`` or ``(0, inf)``; a round bracket excludes the end.
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
    """Refuse a setting that is not one of the values of a ``Literal``.

    Args:
        choices: The ``Literal`` type.
        settings: The settings by name.

    Raises:
        SettingError: It names the first setting that is not one of them.

    Example:
        >>> from typing import Literal
        >>> check_choice(Literal["min", "max"], mode="mean")
        Traceback (most recent call last):
        imbsam.errors.SettingError: mode is 'mean': choose one of min, max
    """
    for name, value in settings.items():
        if value not in get_args(choices):
            raise SettingError(f"{name} is {value!r}: choose one of {', '.join(get_args(choices))}")
