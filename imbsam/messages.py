"""Lists of names in messages, shortened if there are many."""

from collections.abc import Iterable


def first_few(names: Iterable[object], most: int = 5) -> str:
    """The first names, and how many more there are.

    Example:
        >>> first_few(["cat", "dog", "frog"], most=2)
        'cat, dog and 1 more'
    """
    texts = [str(name) for name in names]
    more = len(texts) - most
    return ", ".join(texts[:most]) + (f" and {more:,} more" if more > 0 else "")
