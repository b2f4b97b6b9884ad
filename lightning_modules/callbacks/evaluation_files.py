"""A test's results as small CSV files beside the log: accuracy per class, confusion, calibration."""

import csv
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import CatMetric
from torchmetrics.functional.classification import binary_calibration_error

from lightning_modules.callbacks.class_table import class_rows
from lightning_modules.epoch_log import log_epoch

CALIBRATION_BINS = 15  # of equal width, as torchmetrics' calibration errors have by default


class EvaluationFiles(Callback):
    """Write ``per_class.csv``, ``confusion.csv`` and ``calibration.csv`` after a test, and so after every fit.

    And log the expected calibration errors (Guo et al., ICML 2017) ``test/ece_many``, ``ece_medium``, ``ece_few`` and
    ``ece_all``, in [0, 1], by torchmetrics; nan for a group without test samples.

    * ``per_class.csv``: class, class_name, training_samples, group (many, medium or few), tail (1 or 0), test_samples,
      accuracy in [0, 1] (empty for a class without test samples).
    * ``confusion.csv``: target, predicted, count; only the pairs that occurred.
    * ``calibration.csv``: group, bin, samples, mean confidence and accuracy of those samples, for 15 bins of equal
      width of the confidence, the probability of the predicted class.

    They are in the run's folder. A test sample is kept as three numbers, so 25,000 take 300 kB, however many classes
    there are; under DDP those of all ranks are gathered. Needs a ``test_step`` that returns logits (B, C), as
    :class:`~lightning_modules.LongTailedClassifier`'s does; after another one nothing is written.
    """

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last test."""
        self._samples = CatMetric(nan_strategy="disable").to(pl_module.device)  # looking for nan would wait for the GPU

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep target, prediction and confidence of each sample, as float32: exact for indices below 2^24."""
        if isinstance(outputs, Tensor) and outputs.ndim == 2:
            confidence, predicted = outputs.detach().float().softmax(dim=1).max(dim=1)
            self._samples.update(torch.stack([batch[1].float(), predicted.float(), confidence], dim=1))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the calibration errors."""
        if self._samples.update_called:
            target, predicted, confidence = self._gathered()
            log_epoch(pl_module, {f"test/ece_{g}": e for g, e in _errors(pl_module, target, predicted, confidence)})

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files."""
        if self._samples.update_called:
            samples, log_dir = self._gathered(), trainer.log_dir  # every rank takes part in both
            if trainer.is_global_zero and trainer.loggers and log_dir is not None:
                Path(log_dir).mkdir(parents=True, exist_ok=True)
                write_evaluation(Path(log_dir), pl_module, *samples)

    def _gathered(self) -> tuple[Tensor, Tensor, Tensor]:
        """Target, prediction and confidence of all ranks' samples."""
        target, predicted, confidence = torch.as_tensor(self._samples.compute()).cpu().unbind(dim=1)
        return target.long(), predicted.long(), confidence


def write_evaluation(folder: Path, model: Any, target: Tensor, predicted: Tensor, confidence: Tensor) -> None:
    """Write the three files.

    Args:
        folder: where to; it exists.
        model: knows ``class_counts``, ``class_names``, ``tail_settings`` and ``test_accuracy`` (LongTailedClassifier).
        target: class indices (N,), int64.
        predicted: class indices (N,), int64.
        confidence: probability of the predicted class (N,), in [0, 1].
    """
    rows, correct = class_rows(model), predicted == target
    samples = target.bincount(minlength=len(rows)).tolist()
    hits = target[correct].bincount(minlength=len(rows)).tolist()
    _write(
        folder / "per_class.csv",
        "class class_name training_samples group tail test_samples accuracy",
        (
            [row.index, row.name, row.samples, row.group, int(row.tail), n, hit / n if n else None]
            for row, n, hit in zip(rows, samples, hits, strict=True)
        ),
    )
    pairs = Counter(zip(target.tolist(), predicted.tolist(), strict=True))
    _write(folder / "confusion.csv", "target predicted count", ([*pair, n] for pair, n in sorted(pairs.items())))
    bins = (
        [name, *row]
        for name, mask in model.test_accuracy.masks.items()
        for row in calibration_bins(confidence[mask[target]], correct[mask[target]])
    )
    _write(folder / "calibration.csv", "group bin samples confidence accuracy", bins)


def calibration_bins(confidence: Tensor, correct: Tensor) -> list[tuple[int, int, float, float]]:
    """Samples, mean confidence and accuracy in each of 15 bins of the confidence; empty bins are left out.

    Args:
        confidence: probability of the predicted class (N,), in [0, 1]; samples where it is nan are left out.
        correct: whether the prediction was right (N,), bool.

    Returns:
        (bin from 0, samples, mean confidence, accuracy) for each bin with a sample.
    """
    known = ~confidence.isnan()
    confidence, correct = confidence[known].double(), correct[known].double()
    index = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    samples, sums, hits = (
        torch.bincount(index, weights, minlength=CALIBRATION_BINS) for weights in (None, confidence, correct)
    )
    return [
        (b, int(samples[b]), float(sums[b] / samples[b]), float(hits[b] / samples[b]))
        for b in samples.nonzero().flatten().tolist()
    ]


def _errors(model: Any, target: Tensor, predicted: Tensor, confidence: Tensor) -> Iterable[tuple[str, Tensor]]:
    """The expected calibration error of each group."""
    for name, mask in model.test_accuracy.masks.items():
        chosen = mask[target] & ~confidence.isnan()
        correct = (predicted == target)[chosen].long()
        error = binary_calibration_error(confidence[chosen], correct, n_bins=CALIBRATION_BINS) if len(correct) else None
        yield name, torch.tensor(math.nan) if error is None else error


def _write(path: Path, header: str, rows: Iterable[Iterable[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header.split())
        writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
