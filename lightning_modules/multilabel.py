"""A classifier of samples that have any number of classes, trained by a sharpness-aware method."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from imbsam import PartitionedSAM, SettingError
from imbsam.class_groups import tail_mask
from imbsam.losses import LDAM, CrossEntropy, Focal, LogitAdjusted, VectorScaling
from imbsam.multilabel_losses import BinaryCrossEntropy
from imbsam.multilabel_metrics import ClassGroupAveragePrecision
from lightning_modules.classifier import LongTailedClassifier
from lightning_modules.factories import called

MultiLabelLossCallable = Callable[[], nn.Module] | Callable[[Tensor], nn.Module]
"""A multi-label loss's class, or a partial of one; it gets ``class_counts`` (C, 2) if it takes them."""


class MultiLabelClassifier(LongTailedClassifier):
    """Classification where a sample has any number of classes: one logit a class, one binary problem each.

    The DataModule has ``label_counts`` (of every class the training samples without it, and those with it, (C, 2)),
    ``class_counts`` (its second column) and ``class_names``; batches are ``(images, targets)`` with targets of 0 and 1,
    int64 (B, C). The method gets ``label_counts``, so that ImbSAM perturbs for the pairs of a sample and a rare class
    that it has (docs/multilabel.md). Logs what :class:`~lightning_modules.LongTailedClassifier` does, with the mean
    average precisions of :class:`~imbsam.multilabel_metrics.ClassGroupAveragePrecision` in place of the accuracies;
    ``train/tail_rows`` are the samples of the batch that have a tail class.

    Args:
        loss: the loss of each pair of a sample and a class, a class or a partial of one, which gets ``class_counts``
            (C, 2) if it takes them: BinaryCrossEntropy (the default), Asymmetric, DistributionBalanced, or your own.
        **settings: the settings of :class:`~lightning_modules.LongTailedClassifier`.
    """

    multi_label = True

    selection_metric = "val/map_all"
    """The metric that best.ckpt maximizes if there is a validation set."""

    test_accuracy: ClassGroupAveragePrecision  # type: ignore[assignment]

    def __init__(self, loss: MultiLabelLossCallable | None = None, **settings: Any) -> None:
        super().__init__(loss=loss or BinaryCrossEntropy, **settings)
        self.label_counts: Tensor | None = None

    def learn_from_data(self, stage: str) -> None:
        """Learn the classes from the DataModule; for prediction a checkpoint knows them."""
        if self.class_counts is None or stage == "fit":
            self.label_counts = getattr(self.data, "label_counts", None)
        super().learn_from_data(stage)

    def make_sam(self) -> None:
        """The backbone is what is perturbed; the method gets the label counts."""
        if self.fitting and hasattr(self, "backbone"):
            method = called(self.sam_factory)
            if isinstance(method, type) and issubclass(method, PartitionedSAM):
                raise SettingError(
                    f"sam is {self.method}, which has a perturbation for each group of classes, and a sample may have "
                    "classes of several: choose Plain, SAM, GSAM, ImbSAM or FocalSAM"
                )
            assert self.label_counts is not None
            self.sam = self.sam_factory(self.backbone, self.label_counts)

    def probabilities(self, logits: Tensor) -> Tensor:
        """The probability of each class by itself (B, C), float32."""
        return logits.float().sigmoid()

    def prediction_table(self, predictions: Sequence[Tensor]) -> tuple[list[str], Iterable[Sequence[Any]]]:
        """Header and rows of the predictions file: the probability of every class."""
        return list(self.class_names), ([f"{p:.6g}" for p in row.tolist()] for row in torch.cat(list(predictions)))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the classes."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["label_counts"] = self.label_counts

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the classes that the model was trained on, except in a training, which has those of the data."""
        if not self.fitting:
            self.label_counts = checkpoint.get("label_counts")
        super().on_load_checkpoint(checkpoint)

    def _learn_classes(self, class_counts: Tensor, class_names: list[str]) -> None:
        """Build what depends on the class counts."""
        hp = self.settings
        self.class_counts, self.class_names = class_counts, class_names
        self._tail = tail_mask(class_counts, *self.tail_settings)
        if (loss := called(self.loss_factory)) in (CrossEntropy, Focal, LDAM, LogitAdjusted, VectorScaling):
            raise SettingError(
                f"loss is {loss.__name__}, for samples of one class each: choose BinaryCrossEntropy, Asymmetric or "
                "DistributionBalanced (imbsam.multilabel_losses)"
            )
        assert self.label_counts is not None
        self.loss = self._loss(self.label_counts).to(self.device)
        self.val_accuracy, self.test_accuracy = (  # type: ignore[assignment]
            ClassGroupAveragePrecision(class_counts, hp.many, hp.few).to(self.device) for _ in range(2)
        )

    def _count_tail(self, targets: Tensor) -> Tensor:
        """The samples that have a tail class."""
        return (targets.bool() & self._tail.to(targets.device)).any(dim=1).sum()
