"""Processes side by side, which a deadline, Ctrl-C or SIGTERM ends with a checkpoint."""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

POLL_SECONDS = 0.1
STOPS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Job:
    """A program to run.

    Attributes:
        title: its name on the screen.
        arguments: the program and its arguments.
        output: the file that its output is appended to; None for the terminal.
    """

    title: str
    arguments: Sequence[str]
    output: Path | None = None

    def start(self) -> "Running":
        """Start it, and say so."""
        print(self.title + (f": {self.output}" if self.output else ""), flush=True)
        if self.output is None:
            return Running(self, subprocess.Popen(self.arguments))
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with self.output.open("ab") as file:
            return Running(self, subprocess.Popen(self.arguments, stdout=file, stderr=subprocess.STDOUT))


@dataclass(frozen=True)
class Running:
    """A job and its process."""

    job: Job
    process: "subprocess.Popen[bytes]"


class Processes:
    """Runs jobs, some of them at a time; one that fails does not stop the others.

    Args:
        at_once: how many jobs run at a time, from 1.
        minutes: no job starts after this time, and those that run are sent SIGTERM, which a training answers with a
            checkpoint; None for no limit.
    """

    def __init__(self, at_once: int, minutes: float | None = None) -> None:
        self.at_once = at_once
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.failed: list[Job] = []
        self._interrupted = self._stopped = False

    def run(self, jobs: Sequence[Job]) -> None:
        """Run the jobs in their order; those that failed are in :attr:`failed`.

        Raises:
            SystemExit: on Ctrl-C or SIGTERM, once the jobs have ended.
        """
        handlers = {number: signal.signal(number, self._interrupt) for number in STOPS}
        try:
            self._run(list(jobs))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self._interrupted:
            raise SystemExit("interrupted: run the same command again to resume")

    def _run(self, waiting: list[Job]) -> None:
        running: list[Running] = []
        try:
            while running or (waiting and not self._stopped):
                if not self._stopped and (self._interrupted or self._late):
                    self._stop(running)
                while waiting and len(running) < self.at_once and not self._stopped:
                    running.append(waiting.pop(0).start())
                running = [one for one in running if not self._has_ended(one)]
                time.sleep(POLL_SECONDS)
        except BaseException:  # such as an output file that cannot be written: no job outlives this one
            self._stop(running)
            raise

    def _stop(self, running: list[Running]) -> None:
        self._stopped = True
        for one in running:
            one.process.terminate()

    @property
    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-C reaches the jobs too, which a second one ends without a checkpoint; SIGTERM does not."""
        self._interrupted = True

    def _has_ended(self, one: Running) -> bool:
        code = one.process.poll()
        if code is None:
            return False
        # stopped before training began: it says so itself, or was still importing
        codes = {code for number in STOPS for code in (128 + number, -number)}
        if code != 0 and not ((self._stopped or self._interrupted) and code in codes):
            self.failed.append(one.job)
            where = f": see {one.job.output}" if one.job.output else ""
            print(f"{one.job.title} failed with code {code}{where}", file=sys.stderr, flush=True)
        return True
