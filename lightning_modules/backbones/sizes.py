"""The check of a network's sizes that all backbones share."""

from imbsam.errors import SettingError

__all__ = ["check_sizes"]


def check_sizes(**sizes: int) -> None:
    """Refuse a size that is not a positive integer.

    Args:
        sizes: the settings by name, such as ``width=16``.

    Raises:
        SettingError: naming the first setting that is not an integer >= 1.
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise SettingError(f"{name}={size!r} cannot work; give a positive integer")
