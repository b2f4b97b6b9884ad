"""A multi-label test's average precision per class, as a table and a CSV file."""

import csv
import math
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_modules.callbacks.class_table import ENDS, class_rows

COLUMNS = ["class", "class_name", "training_samples", "group", "tail", "test_samples", "average_precision"]


class ClassAveragePrecision(Callback):
    """Print the average precision of each class after a test, and write ``average_precision.csv``.

    For models with ``multi_label``; after another one nothing happens. Of many classes the first and the last ten are
    printed, by training samples. The file has class, class_name, training_samples, group, tail, test_samples (those
    that have the class) and average_precision, empty for a class that no test sample has.
    """

    def __init__(self) -> None:
        self._found: list[list[Any]] = []

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the numbers, before the model resets its metric; all ranks take part."""
        model: Any = pl_module
        if getattr(model, "multi_label", False):
            columns = model.test_accuracy.positives().tolist(), model.test_accuracy.per_class().tolist()
            self._found = [
                [row.index, row.name, row.samples, row.group, int(row.tail), positives, precision]
                for row, positives, precision in zip(class_rows(model), *columns, strict=True)
            ]

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table and write the file."""
        found, self._found = self._found, []
        log_dir = trainer.log_dir  # every rank takes part
        if not found or not trainer.is_global_zero:
            return
        _print(found)
        if trainer.loggers and log_dir is not None:
            Path(log_dir).mkdir(parents=True, exist_ok=True)
            with (Path(log_dir) / "average_precision.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(COLUMNS)
                writer.writerows([*row, "" if math.isnan(p) else f"{p:.6g}"] for *row, p in found)


def _print(found: list[list[Any]]) -> None:
    rows = sorted(found, key=lambda row: -row[2])
    table = Table(title="test samples: average precision of each class in %")
    table.add_column("class", overflow="fold")
    for column in ("training samples", "group", "tail", "test samples", "average precision"):
        table.add_column(column, justify="left" if column in ("group", "tail") else "right")
    hidden = len(rows) - 2 * ENDS
    for i, (_, name, samples, group, tail, positives, precision) in enumerate(rows):
        if hidden > 0 and i == ENDS:
            table.add_row(f"… {hidden:,} classes", style="dim")
        if hidden <= 0 or not ENDS <= i < len(rows) - ENDS:
            shown = "–" if math.isnan(precision) else f"{100 * precision:.1f}"
            table.add_row(Text(name), f"{samples:,}", group, "tail" if tail else "", f"{positives:,}", shown)
    Console().print(table)
