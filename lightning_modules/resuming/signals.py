"""SIGINT (Ctrl-C), SIGTERM and SIGUSR1: recorded during a training, otherwise they exit at once, with one line."""

import _thread
import contextlib
import math
import os
import select
import signal
import subprocess
import threading
import time
from types import FrameType
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

AT_ONCE = 3.0
"""Seconds to exit at once: callbacks close files, Lightning tears down."""

PATIENCE = 120.0
"""Seconds for a training to react to a signal; rank 0 may have to wait for a disk, and the others for rank 0."""

LAST_COLLECTIVE = 60.0
"""Seconds for the other processes to exit after a run."""

SAME_KEYPRESS = 0.2
"""Seconds: `timeout -s INT` and some launchers signal the process and then its group, so the signal comes twice."""


class Interrupted(BaseException):
    """A signal stopped the program. Not an Exception, which a library might take for a failure of its own.

    Args:
        message: one line for the user.
        exit_code: the program's exit code.
        at_once: whether other processes of the run may not know of the signal.
    """

    def __init__(self, message: str, exit_code: int, at_once: bool = False) -> None:
        super().__init__(message)
        self.exit_code, self.at_once = exit_code, at_once


class StopSignals:
    """Handlers of the stop signals, which replace all others between :meth:`install` and :meth:`remove`.

    At once: a signal raises :class:`Interrupted` in the main thread. Deferred: it is recorded in :attr:`received`, to
    be acted on later, and a second SIGINT raises.

    Python runs handlers only in the main thread, which may wait in C code for a process that has died. So a thread
    reads the signals too, and exits the program if it does not exit by itself.

    Args:
        deferred: record a signal instead of raising.
    """

    def __init__(self, deferred: bool) -> None:
        self.deferred = deferred
        self.received = 0
        """The number of the last signal, or 0."""
        self.launcher: Any = None
        """Lightning's launcher, which knows the other processes of the run that it launched on this machine."""
        self._raise = not deferred
        self._before: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] | None = None

    def install(self) -> None:
        """Install the handlers. Python allows that only in the main thread; in another one nothing happens."""
        if self._pipe is not None or threading.current_thread() is not threading.main_thread():
            return
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        _installed.append(self)
        threading.Thread(target=self._watch, args=(self._pipe[0],), name="stop-signals", daemon=True).start()

    def remove(self) -> None:
        """Restore the previous handlers."""
        if self._pipe is None:
            return
        self._give_back(self._wakeup_before)
        os.close(self._pipe[1])  # which ends the thread
        self._pipe = None
        _installed.remove(self)

    def end_launched(self) -> None:
        """Kill the processes that this one launched for the run: they would wait for it.

        And remove them from the list of Lightning's observer, which kills this one when another exits with a code.
        """
        processes: list[Any] = getattr(self.launcher, "procs", [])
        while processes:
            processes.pop().kill()

    def await_launched(self) -> None:
        """After a run, wait for the other processes to exit: their last collective fails if this one exits first."""
        for process in getattr(self.launcher, "procs", []):
            if isinstance(process, subprocess.Popen):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LAST_COLLECTIVE)

    def _give_back(self, wakeup: int) -> None:
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, once it runs Python code again."""
        self.received = number
        if self._raise:
            how = " again: nothing was saved" if self.deferred else ""
            raise Interrupted(f"interrupted by {signal.Signals(number).name}{how}", 128 + number, at_once=True)

    def _watch(self, pipe: int) -> None:
        """In a thread of its own: count SIGINT, and exit the program if it hangs."""
        deadline, pressed, stop = math.inf, -math.inf, 0
        while True:
            wait = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
            if not select.select([pipe], [], [], wait)[0]:
                if self._raise or (not self.received and _rank() == 0):
                    self._end(stop)
                deadline = math.inf
                continue
            signals = os.read(pipe, 64)
            if not signals:
                os.close(pipe)
                return
            now = time.monotonic()
            for number in STOP_SIGNALS:
                if number not in signals:
                    continue
                if number == signal.SIGINT and not self._raise and now - pressed > SAME_KEYPRESS:
                    if pressed > -math.inf:
                        self._raise = True
                        _thread.interrupt_main(number)
                    else:
                        _write("stopping after this batch, to save; Ctrl-C again stops at once")
                    pressed = now
                stop, deadline = number, min(deadline, now + (AT_ONCE if self._raise else PATIENCE))
            if self._raise:
                self.end_launched()

    def _end(self, number: int) -> None:
        _write(f"ended by {signal.Signals(number).name}, without saving: it was waiting for another process")
        self.end_launched()
        os._exit(128 + number)


_installed: list[StopSignals] = []


def _in_forked_child() -> None:
    """Restore the previous handlers in a loader's worker: it shares its parent's pipe, but has no thread to read it."""
    for signals in reversed(_installed):
        signals._give_back(-1)
    _installed.clear()


os.register_at_fork(after_in_child=_in_forked_child)


def _rank() -> int:
    return int(getattr(rank_zero_only, "rank", None) or 0)


def _write(line: str) -> None:
    """To stderr, bypassing Python's buffers, whose lock the main thread may hold."""
    if _rank() == 0:
        with contextlib.suppress(OSError):  # stderr may be closed
            os.write(2, f"imbsam: {line}\n".encode())
