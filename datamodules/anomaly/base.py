"""The settings, the labels and the loaders that all anomaly detection data shares."""

from abc import ABC

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from datamodules.anomaly.batches import BatchLoader, EpochBatches, Sampling, TrainBatchLoader, in_order
from datamodules.base.data_module import RecordedDataModule
from imbsam.checks import check_choice, check_interval, check_whole_numbers


class SemiSupervisedDataModule(RecordedDataModule, ABC):
    """Unlabelled samples with some labelled anomalies among them; the tail class is the labelled anomalies.

    Training batches are ``(x, labels)``: x float32 (B, ...), labels int64 (B,), 0 for unlabelled samples (hidden
    anomalies among them), 1 for labelled anomalies; for pairs x is (B, 2, ...) and labels (B, 2). Validation and test
    batches are ``(x, labels)`` with the true labels, prediction batches x alone. A second validation loader draws and
    labels the validation samples as in training, for the validation loss: the same share of the anomalies is labelled.

    Attributes:
        train_features: The training samples, float32 (N, ...); known after ``setup``, like all that follows.
        train_labels: 0 for unlabelled samples, 1 for labelled anomalies, int64 (N,).
        class_counts: Unlabelled samples and labelled anomalies of the training part, int64 (2,).
        class_names: "unlabelled" and "anomaly".

    Args:
        sampling: How training samples are drawn: natural, balanced, pairs or natural_pairs, see
            :class:`~datamodules.anomaly.batches.EpochBatches`.
        batch_size: Samples, or pairs, in a training batch.
        batches_per_epoch: Training batches in an epoch, or null for as many as the training samples fill.
        eval_batch_size: Samples in a validation, test or prediction batch.
        val_share: Share of the training part to hold out for validation, in [0, 1).
        seed: Seed of every draw.

    Raises:
        SettingError: A setting is out of range.
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
        self.save_hyperparameters()  # the subclasses' arguments too
        check_choice(Sampling, sampling=sampling)
        check_whole_numbers({"pairs": 4, "balanced": 2}.get(sampling, 1), batch_size=batch_size)
        check_whole_numbers(eval_batch_size=eval_batch_size)
        check_whole_numbers(0, seed=seed)
        if batches_per_epoch is not None:
            check_whole_numbers(batches_per_epoch=batches_per_epoch)
        check_interval("[0, 1)", val_share=val_share)
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
        self._loaded(self._test)
        draws = EpochBatches(self.train_labels, self.sampling, self.batch_size, self.batches_per_epoch, self.seed)
        return TrainBatchLoader(self.train_features, self.train_labels, draws)

    def val_dataloader(self) -> list[BatchLoader]:
        """The validation samples in order with their true labels; and drawn as in training, with the known labels.

        The second loader has the same draws every time, and is left out if no validation anomaly is labelled: its
        loss would say nothing. An empty list if ``val_share`` is 0.
        """
        self._loaded(self._test)
        if self._val is None:
            return []
        features, labels, known = self._val
        loaders = [in_order(features, labels, self.eval_batch_size)]
        if known.any():
            natural = self.sampling == "natural"  # every sample once; the others draw 2 N samples, or pairs
            draws = len(known) if natural else max(4, 2 * len(known))
            size = min(self.eval_batch_size, draws)
            batches = EpochBatches(known, self.sampling, size, None if natural else -(-draws // size), self.seed)
            loaders.append(BatchLoader(features, known, tuple(batches)))
        return loaders

    def test_dataloader(self) -> BatchLoader:
        """The test batches, in order."""
        features, labels = self._loaded(self._test)
        return in_order(features, labels, self.eval_batch_size)

    def _set_labels(self, labelled: Tensor) -> None:
        """Set what depends on the training labels, bool (N,)."""
        self.train_labels = labelled.long()
        self.class_counts = torch.bincount(self.train_labels, minlength=2)
        size, anomalies = len(labelled), int(labelled.sum())
        if self.sampling == "natural" and 0 < anomalies * self.batch_size < size:
            expected = anomalies * self.batch_size / size
            rank_zero_warn(
                f"sampling is natural: a batch of {self.batch_size} samples holds {expected:.2g} labelled anomalies on "
                f"average ({anomalies:,} of {size:,} samples), often none: raise batch_size to {-(-size // anomalies)}"
            )
