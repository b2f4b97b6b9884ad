"""The predictions of `imbsam predict` as a CSV file."""

import csv
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console
from torch import Tensor

from imbsam import SettingError
from lightning_modules.callbacks.calibration import calibration_of
from lightning_modules.callbacks.decisions import decisions_of
from lightning_modules.callbacks.drift import drift_of


class PredictionsCSV(BasePredictionWriter):
    """Write the predictions to ``predictions.csv``, with the columns of the model's ``prediction_table``.

    The first column identifies the sample: ``path``, where the batches are ``(inputs, labels, paths)``, as those of
    image files are; otherwise ``row``, its number in the data, from 1. A class named path has the column "class path".
    Probabilities are calibrated, and decisions written beside them, where the checkpoint has a fit of
    :class:`~lightning_modules.callbacks.calibration.Calibration` or
    :class:`~lightning_modules.callbacks.decisions.Decisions`; where it has a reference of
    :class:`~lightning_modules.callbacks.drift.Drift`, the predictions are compared with it.

    Args:
        path: the file; default ``predictions.csv`` in the prediction's folder.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__(write_interval="epoch")
        self.path = path
        self._names: list[str] = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the paths of the samples, where the data have them.

        Raises:
            SettingError: of several processes each has a part of the samples, and nothing says which.
        """
        if trainer.world_size > 1 and not any(trainer.predict_loop.epoch_batch_indices):
            raise SettingError(
                f"predict runs on {trainer.world_size} devices, and {type(trainer.predict_dataloaders).__name__} has "
                "no batch sampler that says which samples each has: set trainer.devices to 1"
            )
        if isinstance(batch, (tuple, list)) and len(batch) > 2:
            self._names += batch[2]

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write the file and print its path, on rank 0, with the samples of all."""
        model: Any = pl_module
        calibration, decisions = calibration_of(trainer), decisions_of(trainer)
        found, names = torch.cat(list(predictions)), self._names
        self._names = []
        if trainer.world_size > 1:
            found, names = _in_order(found, names, [i for batch in batch_indices[0] for i in batch])
        if not trainer.is_global_zero:
            return
        scores = found.ndim == 1
        calibrated = found if calibration is None else calibration.apply(found)
        header, rows = model.prediction_table([found if scores else calibrated])
        more: dict[str, Sequence[Any]] = {} if decisions is None else decisions.columns(found, calibrated)
        if scores and calibration is not None:
            more = {"probability": [f"{p:.6g}" for p in calibrated[:, 1].tolist()], **more}
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
        if (drift := drift_of(trainer)) is not None:
            drift.report(found, path)


def _in_order(predictions: Tensor, names: list[str], indices: list[int]) -> tuple[Tensor, list[str]]:
    """Predictions and names of the samples of all processes, each once, in the order of the data."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (predictions.cpu(), names, indices))
    samples: dict[int, tuple[Tensor, list[str]]] = {}
    for found, own, places in parts:
        samples |= {index: (found[at], own[at : at + 1]) for at, index in enumerate(places)}
    ordered = [samples[index] for index in sorted(samples)]
    return torch.stack([found for found, _ in ordered]), [name for _, own in ordered for name in own]
