"""The settings, the labels and the loaders that all anomaly detection data shares."""

from abc import ABC
from typing import get_args

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from datamodules.anomaly.batches import (
    BatchLoader,
    EpochRows,
    Sampling,
    TrainBatchLoader,
    ordered_batches,
    validation_rows,
)
from datamodules.sampling.stratified import check_val_share
from imbsam.checks import check_whole_numbers
from imbsam.errors import SettingError


class SemiSupervisedDataModule(LightningDataModule, ABC):
    """Unlabelled rows with some labelled anomalies among them; the tail class is the labelled anomalies.

    Training batches are ``(x, labels)``: x float32 (B, ...), labels int64 (B,), 0 for unlabelled rows (hidden anomalies
    among them), 1 for labelled anomalies; for pairs x is (B, 2, ...) and labels (B, 2). Validation and test batches are
    ``(x, labels)`` with the true labels, prediction batches x alone. A second validation loader has the validation rows
    drawn and labelled as in training, for the validation loss: the same share of the anomalies is labelled there.

    Attributes:
        train_features: The training rows, float32 (N, ...); known after ``setup``, like all that follows.
        train_labels: 0 for unlabelled rows, 1 for labelled anomalies, int64 (N,).
        class_counts: Unlabelled rows and labelled anomalies of the training part, int64 (2,).
        class_names: "unlabelled" and "anomaly".

    Args:
        sampling: How training rows are drawn: natural, balanced, pairs or natural_pairs, see
            :class:`~datamodules.anomaly.batches.EpochRows`.
        batch_size: Rows, or pairs, of a training batch.
        batches_per_epoch: Training batches of an epoch, or null for as many as the training rows fill.
        eval_batch_size: Rows of a validation, test or prediction batch.
        val_share: Share of the training part to hold out for validation, in [0, 1).
        seed: Seed of every draw.

    Raises:
        SettingError: A setting is outside its range.
    """

    train_features: Tensor
    train_labels: Tensor
    class_counts: Tensor
    class_names: list[str]

    def __init__(
        self,
        sampling: Sampling = "natural",
        batch_size: int = 512,
        batches_per_epoch: int | None = None,
        eval_batch_size: int = 8192,
        val_share: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if sampling not in get_args(Sampling):
            raise SettingError(f"sampling={sampling!r} is unknown: choose one of {', '.join(get_args(Sampling))}")
        check_whole_numbers({"pairs": 4, "balanced": 2}.get(sampling, 1), batch_size=batch_size)
        check_whole_numbers(eval_batch_size=eval_batch_size)
        check_whole_numbers(0, seed=seed)
        if batches_per_epoch is not None:
            check_whole_numbers(batches_per_epoch=batches_per_epoch)
        check_val_share(val_share)
        self.sampling: Sampling = sampling
        self.batch_size = batch_size
        self.batches_per_epoch = batches_per_epoch
        self.eval_batch_size = eval_batch_size
        self.val_share = val_share
        self.seed = seed
        self.class_names = ["unlabelled", "anomaly"]
        self._val: tuple[Tensor, Tensor, Tensor] | None = None  # features, true labels, labels that are known
        self._test: tuple[Tensor, Tensor] | None = None

    def train_dataloader(self) -> TrainBatchLoader:
        """The training batches, drawn anew every epoch, the same ones for the same seed and epoch."""
        self._check_set_up()
        rows = EpochRows(self.train_labels, self.sampling, self.batch_size, self.batches_per_epoch, self.seed)
        return TrainBatchLoader(self.train_features, self.train_labels, rows)

    def val_dataloader(self) -> list[BatchLoader]:
        """The validation rows in order with their true labels; and drawn as in training, with the labels known there.

        The second loader has the same draws every time, and is left out where no validation anomaly is labelled: its
        loss would say nothing. An empty list where ``val_share`` is 0.
        """
        self._check_set_up()
        if self._val is None:
            return []
        features, labels, known = self._val
        loaders = [ordered_batches(features, labels, self.eval_batch_size)]
        if known.any():
            rows = validation_rows(known, self.sampling, self.eval_batch_size, self.seed)
            loaders.append(BatchLoader(features, known, rows))
        return loaders

    def test_dataloader(self) -> BatchLoader:
        """The test batches, in order."""
        self._check_set_up()
        assert self._test is not None
        return ordered_batches(*self._test, self.eval_batch_size)

    def _check_set_up(self) -> None:
        if self._test is None:
            raise RuntimeError(f"{type(self).__name__} has no data yet: call prepare_data() and setup() first.")

    def _learn_labels(self, labelled: Tensor) -> None:
        """Set what depends on the training labels, bool (N,)."""
        self.train_labels = labelled.long()
        self.class_counts = torch.bincount(self.train_labels, minlength=2)
        rows, anomalies = len(labelled), int(labelled.sum())
        if self.sampling == "natural" and 0 < anomalies * self.batch_size < rows:
            expected = anomalies * self.batch_size / rows
            rank_zero_warn(
                f"sampling is natural: a batch of {self.batch_size} rows holds {expected:.2g} labelled anomalies on "
                f"average ({anomalies:,} of {rows:,} rows) and often none; raise batch_size to {-(-rows // anomalies)}"
            )


def check_share(name: str, value: float, zero_allowed: bool = False) -> None:
    """Refuse a share outside (0, 1], or outside [0, 1) where 0 is allowed and 1 is not.

    Args:
        name: The setting.
        value: Its value.
        zero_allowed: Whether 0, and not 1, is allowed.

    Raises:
        SettingError: The value is outside.
    """
    if not (0 <= value < 1 if zero_allowed else 0 < value <= 1):
        raise SettingError(f"{name}={value} is outside {'[0, 1)' if zero_allowed else '(0, 1]'}")
