"""Processes side by side, which a deadline, Ctrl-C or SIGTERM ends with a checkpoint."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.1


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

    def start(self) -> "subprocess.Popen[bytes]":
        """Start it, and say so."""
        print(self.title + (f": {self.output}" if self.output else ""), flush=True)
        if self.output is None:
            return subprocess.Popen(self.arguments)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with self.output.open("ab") as file:
            return subprocess.Popen(self.arguments, stdout=file, stderr=subprocess.STDOUT)


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
        self._stopped = False

    def run(self, jobs: Sequence[Job]) -> None:
        """Run the jobs in their order; those that failed are in :attr:`failed`.

        Raises:
            SystemExit: on Ctrl-C or SIGTERM, once the jobs have ended. A second one kills them.
        """
        running: dict[Job, subprocess.Popen[bytes]] = {}
        waiting = list(jobs)
        try:
            while running or (waiting and not self._stopped):
                if not self._stopped and self.deadline is not None and time.monotonic() >= self.deadline:
                    self._stop(running)
                while waiting and len(running) < self.at_once and not self._stopped:
                    job = waiting.pop(0)
                    running[job] = job.start()
                self._end_finished(running)
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:  # Ctrl-C reaches the jobs too, SIGTERM does not
            self._stop(running)
            try:
                for process in running.values():
                    process.wait()
            except KeyboardInterrupt:
                for process in running.values():
                    process.kill()
            raise SystemExit("interrupted: run the same command again to resume") from None

    def _stop(self, running: dict[Job, Any]) -> None:
        self._stopped = True
        for process in running.values():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()

    def _end_finished(self, running: dict[Job, Any]) -> None:
        for job, process in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[job]
            # stopped before training began: it says so itself, or was still importing
            if code == 0 or (self._stopped and code in (128 + signal.SIGTERM, -signal.SIGTERM)):
                continue
            self.failed.append(job)
            where = f": see {job.output}" if job.output else ""
            print(f"{job.title} failed with code {code}{where}", file=sys.stderr, flush=True)
