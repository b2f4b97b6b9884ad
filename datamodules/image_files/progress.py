"""A progress bar on a terminal."""

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def with_progress(items: Iterable[T], description: str, total: float | None = None) -> Iterable[T]:
    """The items, with a bar on stderr while they are worked on, if that is a terminal."""
    console = Console(stderr=True)
    return track(items, description, total, console=console, transient=True, disable=not console.is_terminal)
