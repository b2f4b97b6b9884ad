"""What a test found, as small CSV files beside the log: accuracy per class, confusion, calibration."""

import csv
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import CatMetric

from lightning_modules.callbacks.class_table import tail_classes
from lightning_modules.epoch_log import log_epoch

CALIBRATION_BINS = 15  # of equal width, as torchmetrics' calibration errors have by default


class EvaluationFiles(Callback):
    r"""Write ``per_class.csv``, ``confusion.csv`` and ``calibration.csv`` after a test, and so after every fit.

    And log the expected calibration errors ``test/ece_many``, ``ece_medium``, ``ece_few`` and ``ece_all``, in [0, 1].

    * ``per_class.csv``: class, class_name, training_samples, group (many, medium or few), tail (1 or 0), test_samples,
      accuracy in [0, 1] (empty for a class without test samples).
    * ``confusion.csv``: target, predicted, count; only the pairs that occurred.
    * ``calibration.csv``: group, bin, samples, mean confidence and accuracy of those samples, for 15 bins of equal
      width of the confidence, the probability of the predicted class. The expected calibration error (Guo et al.,
      ICML 2017) is the mean of :math:`|\text{accuracy} - \text{confidence}|` over the bins, weighted by their samples.

    They lie in the run's folder. A test is remembered as three numbers a row, so one of 25,000 rows takes 300 kB,
    however many classes there are; under DDP the rows of all ranks are gathered. Needs a ``test_step`` that returns
    logits (B, C), as :class:`~lightning_modules.LongTailedClassifier`'s does; after another one nothing is written.
    """

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last test."""
        self._rows = CatMetric(nan_strategy="disable").to(pl_module.device)  # a look for nan would wait for the GPU

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Remember target, prediction and confidence of each row, as float32: exact for indices below 2^24."""
        if isinstance(outputs, Tensor) and outputs.ndim == 2:
            confidence, predicted = outputs.detach().float().softmax(dim=1).max(dim=1)
            self._rows.update(torch.stack([batch[1].float(), predicted.float(), confidence], dim=1))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the rows of all ranks and log the calibration errors."""
        if self._rows.update_called:
            rows = torch.as_tensor(self._rows.compute()).cpu()
            target, correct = rows[:, 0].long(), rows[:, 0] == rows[:, 1]
            errors = {
                f"test/ece_{name}": calibration_error(calibration_bins(rows[mask[target], 2], correct[mask[target]]))
                for name, mask in _groups(pl_module).items()
            }
            log_epoch(pl_module, errors)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files."""
        if self._rows.update_called:
            rows = torch.as_tensor(self._rows.compute()).cpu()
            folder = _folder(trainer)
            if folder is not None and trainer.is_global_zero:
                folder.mkdir(parents=True, exist_ok=True)
                write_evaluation(folder, pl_module, rows[:, 0].long(), rows[:, 1].long(), rows[:, 2])


def write_evaluation(folder: Path, model: Any, target: Tensor, predicted: Tensor, confidence: Tensor) -> None:
    """Write the three files.

    Args:
        folder: where to; it exists.
        model: knows ``class_counts``, ``class_names``, ``tail_settings`` and ``test_accuracy`` (LongTailedClassifier).
        target: class indices (N,), int64.
        predicted: class indices (N,), int64.
        confidence: probability of the predicted class (N,), in [0, 1].
    """
    names, counts = model.class_names, model.class_counts
    groups = _groups(model)
    group_of = {int(c): name for name in groups if name != "all" for c in groups[name].nonzero()}
    tail = tail_classes(model).int().tolist()
    correct = predicted == target
    samples = target.bincount(minlength=len(names)).tolist()
    hits = target[correct].bincount(minlength=len(names)).tolist()
    accuracy = [hit / of if of else None for hit, of in zip(hits, samples, strict=True)]
    _write(
        folder / "per_class.csv",
        ["class", "class_name", "training_samples", "group", "tail", "test_samples", "accuracy"],
        zip(
            range(len(names)),
            names,
            counts.tolist(),
            [group_of[c] for c in range(len(names))],
            tail,
            samples,
            accuracy,
            strict=True,
        ),
    )
    pairs = Counter(zip(target.tolist(), predicted.tolist(), strict=True))
    cells = ([*pair, n] for pair, n in sorted(pairs.items()))
    _write(folder / "confusion.csv", ["target", "predicted", "count"], cells)
    bins = [
        [name, *row]
        for name, mask in groups.items()
        for row in calibration_bins(confidence[mask[target]], correct[mask[target]])
    ]
    _write(folder / "calibration.csv", ["group", "bin", "samples", "confidence", "accuracy"], bins)


def calibration_bins(confidence: Tensor, correct: Tensor) -> list[tuple[int, int, float, float]]:
    """Samples, mean confidence and accuracy of the rows in each of 15 bins of the confidence; empty bins are left out.

    Args:
        confidence: probability of the predicted class (N,), in [0, 1]; rows where it is nan are left out.
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


def calibration_error(bins: Sequence[tuple[int, int, float, float]]) -> float:
    """The expected calibration error: mean of abs(accuracy - confidence), weighted by samples (Guo et al., ICML 2017).

    Args:
        bins: see :func:`calibration_bins`.

    Returns:
        a number in [0, 1], nan where there is no sample.
    """
    samples = sum(n for _, n, _, _ in bins)
    return sum(n * abs(accuracy - mean) for _, n, mean, accuracy in bins) / samples if samples else math.nan


def _groups(model: Any) -> dict[str, Tensor]:
    """Which classes are in "many", "medium", "few" and "all": bool masks (C,)."""
    return dict(zip(model.test_accuracy.group_names, model.test_accuracy.groups.cpu(), strict=True))


def _folder(trainer: Trainer) -> Path | None:
    """The run's folder, or None where nothing is logged; every rank takes part."""
    log_dir = trainer.log_dir
    return Path(log_dir) if trainer.loggers and log_dir is not None else None


def _write(path: Path, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
