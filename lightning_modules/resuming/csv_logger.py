"""A CSV log that a resumed run continues."""

import csv
import os
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter


class ResumableCSVLogger(CSVLogger):
    """Lightning's CSVLogger, whose ``metrics.csv`` can be cut back to a checkpoint's row and continued.

    Args:
        save_dir: Folder of all logs.
        name: Folder of the experiment's runs inside it.
        version: Number or name of the run; the next free number by default.
        prefix: A string to put before the names of the metrics.
        flush_logs_every_n_steps: How often to write to the disk.
        resume: Go on with the ``metrics.csv`` that is there, instead of deleting it.
    """

    def __init__(
        self,
        save_dir: str = "logs",
        name: str | None = "",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
        resume: bool = False,
    ) -> None:
        super().__init__(save_dir, name, version, prefix, flush_logs_every_n_steps)
        self.resume = resume

    @property
    @rank_zero_experiment
    def experiment(self) -> "MetricsFile":
        """The file's writer."""
        if self._experiment is None:
            os.makedirs(self.root_dir, exist_ok=True)
            self._experiment = MetricsFile(self.log_dir, self.resume)
        assert isinstance(self._experiment, MetricsFile)
        return self._experiment


class MetricsFile(ExperimentWriter):
    """``metrics.csv``, which is never without its older rows, not even while its header changes.

    Args:
        log_dir: The run's folder.
        resume: Go on with the file that is there.
    """

    def __init__(self, log_dir: str, resume: bool) -> None:
        self._resume = resume  # the parent's constructor asks for it
        super().__init__(log_dir)
        self.path = Path(self.metrics_file_path)
        self.rows = 0
        if self.path.exists():
            self._write(self._read())

    def save(self) -> None:
        """Append what was logged since."""
        self.rows += len(self.metrics)
        super().save()

    def sync(self) -> int:
        """Bring the file to the disk; returns the number of its rows."""
        self.save()
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
        return self.rows

    def cut(self, rows: int) -> None:
        """Drop what was logged after the first ``rows`` rows."""
        self._write(self._read()[:rows])

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = self.path.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # a kill cut it off
        return list(csv.DictReader(lines))

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """The columns are those that these rows have values in, as if nothing had followed them."""
        self.rows = len(rows)
        self.metrics_keys = sorted({key for row in rows for key, value in row.items() if value != ""})
        if rows:
            self._rewrite(self.metrics_keys, rows)
        else:
            self.path.unlink(missing_ok=True)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._rewrite(fieldnames, self._read())

    def _rewrite(self, fieldnames: list[str], rows: list[dict[str, Any]]) -> None:
        unfinished = self.path.with_name(self.path.name + ".tmp")
        with unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=fieldnames, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self.path)

    def _check_log_dir_exists(self) -> None:
        if not self._resume:
            super()._check_log_dir_exists()
