"""The predictions of `imbsam predict` as a CSV file."""

import csv
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console

from imbsam import SettingError
from lightning_modules.callbacks.calibration import calibration_of
from lightning_modules.callbacks.decisions import decisions_of


class PredictionsCSV(BasePredictionWriter):
    """Write the predictions to ``predictions.csv``, with the columns of the model's ``prediction_table``.

    The first column identifies the sample: ``path``, where the batches are ``(inputs, labels, paths)``, as those of
    image files are; otherwise ``row``, its number in the data, from 1. A class named path has the column "class path".
    Probabilities are calibrated, and decisions written beside them, where the checkpoint has a fit of
    :class:`~lightning_modules.callbacks.calibration.Calibration` or
    :class:`~lightning_modules.callbacks.decisions.Decisions`.

    Args:
        path: the file; default ``predictions.csv`` in the prediction's folder.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__(write_interval="epoch")
        self.path = path
        self._names: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse several processes, each of which would have only a part of the samples."""
        super().setup(trainer, pl_module, stage)
        if stage == "predict" and trainer.world_size > 1:
            raise SettingError(f"predict runs on {trainer.world_size} devices: set trainer.devices to 1")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the paths of the samples, where the data have them."""
        if isinstance(batch, (tuple, list)) and len(batch) > 2:
            self._names += batch[2]

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write the file and print its path."""
        model: Any = pl_module
        calibration, decisions = calibration_of(trainer), decisions_of(trainer)
        found, scores = torch.cat(list(predictions)), predictions[0].ndim == 1
        calibrated = found if calibration is None else calibration.apply(found)
        header, rows = model.prediction_table([found if scores else calibrated])
        more: dict[str, Sequence[Any]] = {} if decisions is None else decisions.columns(found, calibrated)
        if scores and calibration is not None:
            more = {"probability": [f"{p:.6g}" for p in calibrated[:, 1].tolist()], **more}
        names, self._names = self._names, []
        own = "path" if names else "row"
        taken = {own, *header[:1], *more}
        header = [*header[:1], *(f"class {name}" if name in taken else name for name in header[1:])]
        at = len(header) if scores else 1  # beside the score, or the predicted class
        header = [own, *header[:at], *more, *header[at:]]
        beside = zip(*more.values(), strict=True) if more else itertools.repeat(())
        rows = ([*row[:at], *extra, *row[at:]] for row, extra in zip(rows, beside))  # noqa: B905  one may be endless
        rows = ([name, *row] for name, row in (zip(names, rows, strict=True) if names else enumerate(rows, start=1)))
        path = Path(self.path or Path(trainer.log_dir or trainer.default_root_dir) / "predictions.csv")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows)
        Console().print(f"predictions: {path}", soft_wrap=True, highlight=False)
