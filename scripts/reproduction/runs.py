"""The runs of a table's rows: their folders, how they are trained, what they found."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from imbsam.report.runs import Run, UnreadableRunError, find_folders, read_csv, read_run
from reproduction.tables import CONFIGS, Row

LOGS = Path("logs")
EXPERIMENT = "reproduce"
TESTED_EPOCH = "epochs_on_test_set/"
"""What lightning_modules.EpochsOnTestSet logs."""


@dataclass(frozen=True)
class SeededRow:
    """A row of a table with one seed: one training.

    Attributes:
        row: the row.
        seed: of the run and of the data.
    """

    row: Row
    seed: int

    @property
    def title(self) -> str:
        """Its name on the screen."""
        return f"{self.row.title}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """Its folder below LOGS, in which a run has a folder version_N."""
        return f"{EXPERIMENT}/{self.row.table}/{self.row.name}/seed_{self.seed}"

    @property
    def output(self) -> Path:
        """Where what it prints goes if it has no terminal."""
        return LOGS / self.folder / "output.txt"

    def command(self, root: str | None, settings: Sequence[str]) -> list[str]:
        """The ``imbsam fit`` that starts or resumes the run."""
        return [
            *(sys.executable, "-m", "lightning_modules.cli", "fit"),
            *(f"--config={CONFIGS / piece}.yaml" for piece in self.row.pieces),
            *self.row.settings,
            *((f"--data.root={root}",) if root else ()),
            *settings,
            f"--seed_everything={self.seed}",
            f"--data.seed={self.seed}",
            f"--trainer.logger.init_args.save_dir={LOGS}",
            f"--trainer.logger.init_args.name={self.folder}",
            "--ckpt_path=last",
        ]

    def tested(self) -> Run | None:
        """The finished run, or None."""
        for folder in reversed(find_folders(LOGS / self.folder)):
            try:
                return read_run(folder)
            except UnreadableRunError:
                continue
        return None


def tested_epochs(run: Run) -> list[dict[str, float]]:
    """What was logged of the test set after every epoch, name to value without TESTED_EPOCH; epochs count from 1."""
    rows = []
    for row in read_csv(run.folder / "metrics.csv", "epoch"):
        if row.get(f"{TESTED_EPOCH}all") is not None:
            values = {name.removeprefix(TESTED_EPOCH): row[name] for name in row if name.startswith(TESTED_EPOCH)}
            rows.append({**values, "epoch": int(row["epoch"]) + 1})
    return rows


def best_on_test_set(epochs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The epoch that the ImbSAM authors' code reports: the first of the highest accuracy without the mirrored image."""
    return max(epochs, key=lambda epoch: epoch["all"])
