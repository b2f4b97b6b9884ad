"""A CSV log that a resumed run continues."""

import csv
import os
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter


class ResumableCSVLogger(CSVLogger):
    """Lightning's CSVLogger, whose ``metrics.csv`` can be cut back to the row of a checkpoint and continued.

    Args:
        save_dir: Folder of all logs.
        name: Folder of the experiment's runs inside it.
        resume: Continue an existing ``metrics.csv`` instead of deleting it.
        **settings: The other settings of CSVLogger: ``version``, ``prefix``, ``flush_logs_every_n_steps``.
    """

    def __init__(self, save_dir: str = "logs", name: str | None = "", resume: bool = False, **settings: Any) -> None:
        super().__init__(save_dir, name, **settings)
        self.resume = resume

    @property
    @rank_zero_experiment
    def experiment(self) -> "MetricsFile":
        """The writer of the file."""
        if self._experiment is None:
            os.makedirs(self.root_dir, exist_ok=True)
            self._experiment = MetricsFile(self.log_dir, self.resume)
        assert isinstance(self._experiment, MetricsFile)
        return self._experiment


class MetricsFile(ExperimentWriter):
    """``metrics.csv``, which a kill leaves with all older rows even while its header changes.

    Args:
        log_dir: The run's folder.
        resume: Continue an existing file.
    """

    def __init__(self, log_dir: str, resume: bool) -> None:
        self._resume = resume  # the parent's constructor reads it
        super().__init__(log_dir)
        self.path = Path(self.metrics_file_path)
        self.rows = 0
        if self.path.exists():
            self._write(self._read())

    def save(self) -> None:
        """Append what was logged since the last time."""
        self.rows += len(self.metrics)
        super().save()

    def sync(self) -> int:
        """Flush the file to the disk; returns its number of rows."""
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
            lines.pop()  # cut off by a kill
        return list(csv.DictReader(lines))

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """Keep only the columns in which these rows have values, as if nothing had followed them."""
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
