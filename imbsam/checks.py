"""Checks of settings that are numbers."""

import math
from collections.abc import Sequence
from numbers import Integral

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
