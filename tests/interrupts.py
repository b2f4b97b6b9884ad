"""Ctrl-C at any line of the engine."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import imbsam


class InterruptAtLine:
    """A trace function that raises KeyboardInterrupt at the n-th line that runs inside imbsam/."""

    folder = os.path.dirname(imbsam.__file__)

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, frame: Any, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self.folder):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


@contextlib.contextmanager
def tracing(tracer: Any) -> Iterator[None]:
    """Trace the lines of a block."""
    old = sys.gettrace()
    sys.settrace(tracer)
    try:
        yield
    finally:
        sys.settrace(old)
