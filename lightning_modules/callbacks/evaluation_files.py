"""A test's results as small CSV files beside the log: accuracy per class, confusion, calibration."""

import csv
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import CatMetric
from torchmetrics.functional.classification import binary_calibration_error

from imbsam.class_measures import class_f1
from imbsam.label_shift import shifted_accuracies
from lightning_modules.callbacks.class_table import class_rows
from lightning_modules.epoch_log import log_epoch

CALIBRATION_BINS = 15  # of equal width, as torchmetrics' calibration errors have by default


class EvaluationFiles(Callback):
    """Write ``per_class.csv``, ``confusion.csv`` and ``calibration.csv`` after a test, and so after every fit.

    And log the expected calibration errors (Guo et al., ICML 2017) ``test/ece_many``, ``ece_medium``, ``ece_few`` and
    ``ece_all``, in [0, 1], by torchmetrics, nan for a group without test samples; and the accuracies on long-tailed
    test sets (:mod:`imbsam.label_shift`), ``test/forward_50`` to ``test/backward_50``.

    * ``per_class.csv``: class, class_name, training_samples, group (many, medium or few), tail (1 or 0), test_samples,
      accuracy (the recall) in [0, 1], empty for a class without test samples, precision, empty for a class that was
      never predicted, and F1, empty for a class without either.
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
        if isinstance(outputs, Tensor) and outputs.ndim == 2 and batch[1].ndim == 1:  # one class a sample
            confidence, predicted = outputs.detach().float().softmax(dim=1).max(dim=1)
            self._samples.update(torch.stack([batch[1].float(), predicted.float(), confidence], dim=1))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the calibration errors, and the accuracies on long-tailed test sets."""
        if self._samples.update_called:
            log_epoch(pl_module, evaluation_metrics(pl_module, *self._gathered()))

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


def evaluation_metrics(model: Any, target: Tensor, predicted: Tensor, confidence: Tensor) -> dict[str, Tensor]:
    """What is logged: ``test/ece_*``, ``test/forward_*`` and ``test/backward_*``.

    Args:
        model: knows ``class_counts`` and ``test_accuracy`` (LongTailedClassifier).
        target: class indices (N,), int64.
        predicted: class indices (N,), int64.
        confidence: probability of the predicted class (N,), in [0, 1].
    """
    total, correct, _ = _counts(target, predicted, len(model.class_counts))
    metrics = {f"ece_{group}": error for group, error in _errors(model, target, predicted, confidence)}
    metrics |= shifted_accuracies(model.class_counts, correct / total)
    return {f"test/{name}": value.float() for name, value in metrics.items()}


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
    total, hits, positives = _counts(target, predicted, len(rows))
    columns = (total, hits / total, hits / positives, class_f1(hits, total, positives))
    _write(
        folder / "per_class.csv",
        "class class_name training_samples group tail test_samples accuracy precision f1",
        (
            [row.index, row.name, row.samples, row.group, int(row.tail), *numbers]
            for row, *numbers in zip(rows, *(column.tolist() for column in columns), strict=True)
        ),
    )
    pairs = Counter(zip(target.tolist(), predicted.tolist(), strict=True))
    _write(folder / "confusion.csv", "target predicted count", ([*pair, n] for pair, n in sorted(pairs.items())))
    write_calibration(folder / "calibration.csv", confidence, correct, target, model.test_accuracy.masks)


def write_calibration(
    path: Path, confidence: Tensor, correct: Tensor, target: Tensor, masks: Mapping[str, Tensor]
) -> None:
    """Write the bins of :func:`calibration_bins` for each group of classes: group, bin, samples, confidence, accuracy.

    Args:
        path: the file.
        confidence: probability of the predicted class (N,), in [0, 1].
        correct: whether the prediction was right (N,), bool.
        target: class indices (N,), int64.
        masks: the groups' classes, bool (C,) by name.
    """
    bins = (
        [name, *row]
        for name, mask in masks.items()
        for row in calibration_bins(confidence[mask[target]], correct[mask[target]])
    )
    _write(path, "group bin samples confidence accuracy", bins)


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


def _counts(target: Tensor, predicted: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of each class, how many of them were predicted as it, and samples predicted as it: (C,)."""
    total, correct, positives = (
        labels.bincount(minlength=classes) for labels in (target, target[target == predicted], predicted)
    )
    return total, correct, positives


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
        writer.writerows([_cell(cell) for cell in row] for row in rows)


def _cell(value: Any) -> Any:
    """Six digits; nothing where there is no number."""
    return value if not isinstance(value, float) else f"{value:.6g}" if math.isfinite(value) else None
