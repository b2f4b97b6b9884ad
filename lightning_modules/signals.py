"""SIGTERM and SIGUSR1, noted and left for a convenient moment."""

import signal
import threading
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Handlers that only note which signal came; SIGINT stays what it was."""

    def __init__(self) -> None:
        self.received = 0

    def install(self) -> None:
        """Take over from whatever handlers there are, Lightning's among them, which save or talk to other ranks."""
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in that one only
            for number in STOP_SIGNALS:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
