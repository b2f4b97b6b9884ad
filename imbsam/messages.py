"""What messages have in them: lists of names, and other libraries' messages, shortened."""

import re
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


def first_sentence(error: Exception, most: int = 300) -> str:
    """The first sentence of another library's message, in one line and without its full stop.

    Example:
        >>> first_sentence(OSError("No config.json in a/b. Did you mean c?"))
        'No config.json in a/b'
    """
    text = re.split(r"(?<=[.!?])\s", " ".join(str(error).split()))[0].rstrip(".") or type(error).__name__
    return text if len(text) <= most else f"{text[:most].rpartition(' ')[0]} ..."
