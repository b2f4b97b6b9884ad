"""Anomaly detection with a few labelled anomalies, trained by a sharpness-aware method."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.functional.classification import binary_f1_score, binary_precision, binary_recall

from imbsam import Plain, SettingError
from imbsam.anomaly_metrics import AnomalyMetrics
from lightning_modules.base import SharpnessAwareModule
from lightning_modules.detectors import Detector, DevNet
from lightning_modules.factories import called, describe, plain_settings, restore
from lightning_modules.resuming.checkpoint_contents import check_model, check_weights, describe_classes
from lightning_modules.validation_part import see_validation_part

DetectorCallable = Callable[[Sequence[int]], Detector]
"""A detector's class, or a partial of one, which takes the shape of a sample: (d,) or (channels, H, W)."""


class _ChooseThreshold(Callback):
    """A callback, because a module's own ``on_train_end`` comes after the last checkpoint."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the threshold with the final weights."""
        assert isinstance(pl_module, AnomalyDetector)
        pl_module.choose_threshold()


class AnomalyDetector(SharpnessAwareModule):
    """A detector trained on many unlabelled samples and a few labelled anomalies, which are the tail.

    The DataModule has the class counts (``class_counts``: unlabelled samples, labelled anomalies), and the detector is
    prepared (for example pretrained) on its ``train_features`` and ``train_labels``. Training batches are
    ``(x, labels)`` with 1 for labelled anomalies, or pairs ``(x (B, 2, d), labels (B, 2))`` for PReNet, where a pair
    with an anomaly belongs to the tail; evaluation batches are ``(x, true labels)``. The batches of an optional second
    validation loader are drawn and labelled as in training: ``val/loss`` is the training objective on them.

    Logs ``train/loss`` once an epoch; for validation and test ``auroc``, ``average_precision``, ``budget_precision``
    and ``budget_recall``. If there are validation samples, the threshold with the best F1 on them is chosen when the
    training ends, with the final weights; ``test/precision``, ``test/recall`` and ``test/f1`` are those of this
    threshold on the test samples.

    Args:
        detector: builds the detector from the shape of a sample: a class or a partial of one, such as ``DevNet`` (the
            default), ``DeepSAD``, ``PReNet``, ``FEAWAD``, ``WeightedClassifier``, ``Boosting``, or your own subclass of
            ``Detector``.
        optimizer: any torch optimizer that steps without a closure; default: Adam. Null for a detector without a
            gradient, which also has ``Plain`` as ``sam``, no ``lr_scheduler`` and no ``gradient_clip_val``.
        budget: alarms that can be investigated, a number or a share of the samples; null: as many as there are
            anomalies.
        **training: ``sam`` (the labelled anomalies are its tail), ``lr_scheduler``, ``lr_interval``,
            ``gradient_clip_val`` and ``capture``, see :class:`~lightning_modules.base.SharpnessAwareModule`.
    """

    threshold: Tensor

    def __init__(
        self,
        detector: DetectorCallable | None = None,
        optimizer: OptimizerCallable | None = None,
        budget: float | None = None,
        **training: Any,
    ) -> None:
        super().__init__(optimizer=optimizer or torch.optim.Adam, **training)
        self._of_gradients: dict[str, Any] = {"optimizer": optimizer, "lr_scheduler": self.lr_scheduler}
        self._of_gradients["gradient_clip_val"] = self.gradient_clip_val
        self.detector_factory: DetectorCallable = restore(detector) or DevNet
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", "detector", "sam"])
        self.save_hyperparameters({"detector": describe(self.detector_factory), "sam": describe(self.sam_factory)})
        self._weight_of_anomalies = float(plain_settings(self.sam_factory).get("tail_weight", 1.0))
        self.input_shape: tuple[int, ...] | None = None
        self.class_counts: Tensor | None = None
        self.detector: Detector
        self.val_metrics = AnomalyMetrics(budget)
        self.test_metrics = AnomalyMetrics(budget)
        self.register_buffer("threshold", torch.tensor(math.nan))
        self._prepared = False
        self._loss, self._batches = torch.zeros(()), 0  # no metric: updating one costs a tenth of a step
        self.val_loss = MeanMetric()

    @property
    def detector_name(self) -> str:
        """The name of the detector's class."""
        return getattr(called(self.detector_factory), "__name__", "")

    @property
    def ends_by_itself(self) -> bool:
        """Whether the detector ends the training, not the validation loss."""
        return not self.detector.uses_gradient

    def learn_from_data(self, stage: str) -> None:
        """Learn class counts and shape of the data; for prediction a checkpoint knows them."""
        if self.trainer.world_size > 1:
            raise SettingError(
                f"trainer.devices makes {self.trainer.world_size} processes: tables are small, set it to 1"
            )
        counts, features = getattr(self.data, "class_counts", None), getattr(self.data, "train_features", None)
        if counts is not None and features is not None:
            shape = tuple(features.shape[1:])
            if self.input_shape not in (None, shape):
                raise SettingError(
                    f"the model takes samples of shape {self.input_shape} and the data has {shape}: use data with the "
                    "features that it was trained on"
                )
            self.class_counts, self.input_shape = torch.as_tensor(counts), shape
        elif stage != "predict":
            raise SettingError(
                f"the data ({type(self.data).__name__}) has no class_counts and train_features: use AnomalyDataModule, "
                "or a LightningDataModule with both"
            )
        if stage == "fit":
            self._check_sampling()
            self._loss, self._batches = torch.zeros(()), 0

    def configure_model(self) -> None:
        """Build the detector, once the shape of a sample is known."""
        if hasattr(self, "detector") or self.input_shape is None:
            return
        try:
            self.detector = self.detector_factory(self.input_shape)
        except TypeError as error:
            raise SettingError(f"detector is {self.detector_name}: {error}") from error

    def make_sam(self) -> None:
        """The detector is what is perturbed, the labelled anomalies are its tail."""
        if self.fitting:
            assert self.class_counts is not None
            self.sam = self.sam_factory(self.detector, self.class_counts, tail_classes=[1])  # type: ignore[call-arg]
            if not self.detector.uses_gradient:
                self._check_without_gradient()

    def configure_callbacks(self) -> list[Callback]:
        """A callback chooses the threshold; it comes before the checkpoint callbacks."""
        present = any(isinstance(callback, _ChooseThreshold) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [*super().configure_callbacks(), *([] if present else [_ChooseThreshold()])]

    def on_fit_start(self) -> None:
        """Prepare the detector, unless it comes from a checkpoint."""
        assert self.class_counts is not None
        if self.class_counts[1] == 0:
            raise SettingError("the training part has no labelled anomaly: raise data.labelled_share")
        if not self._prepared:
            features, labels = self.data.train_features, self.data.train_labels
            self.detector.prepare(features.to(self.device), labels.to(self.device))
            self._prepared = True
        super().on_fit_start()

    def forward(self, x: Tensor) -> Tensor:
        """Anomaly scores (B,)."""
        return self.detector.scores(x)

    def on_train_epoch_start(self) -> None:
        """Discard the threshold: it belongs to the weights that it was chosen for."""
        super().on_train_epoch_start()
        self._loss = self._loss.to(self.device)
        self.threshold.fill_(math.nan)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """One backward pass, one optimizer step."""
        x, labels = batch
        if self.detector.uses_gradient:
            tail = _in_tail(self.targets_on_host(labels))
            loss = self.backward_passes(self, self.detector.losses, [(x, labels)], [tail])
        else:
            self.detector.advance()
            loss = self.detector.losses(x, labels).mean()
        self._loss += loss
        self._batches += 1
        self.step_optimizer()
        return loss

    def on_train_epoch_end(self) -> None:
        """Log once an epoch: logging every step would cost as much as the step. Stop where nothing is left to train."""
        self.log("train/loss", self._loss / self._batches, prog_bar=True)
        self.check_loss(self._loss)
        self._loss, self._batches = torch.zeros((), device=self.device), 0
        self.trainer.should_stop = self.trainer.should_stop or self.detector.finished
        super().on_train_epoch_end()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect scores, or (second loader) losses."""
        x, labels = batch
        if dataloader_idx == 0:
            self.val_metrics.update(self(x), labels)
        else:
            self.val_loss.update(self.detector.losses(x, labels) * self._tail_weight(labels))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        self.log_dict({f"val/{name}": value for name, value in self.val_metrics.compute().items()})
        self.val_metrics.reset()
        if self.val_loss.update_called:
            self.log("val/loss", self.val_loss.compute())
            self.val_loss.reset()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Collect scores."""
        x, labels = batch
        self.test_metrics.update(self(x), labels)

    def on_test_epoch_end(self) -> None:
        """Log the metrics, and those of the threshold."""
        metrics = self.test_metrics.compute()
        if not self.threshold.isnan():
            scores, labels = torch.cat(self.test_metrics.scores), torch.cat(self.test_metrics.labels)
            alarms = (scores >= self.threshold).long()
            metrics["precision"] = binary_precision(alarms, labels)
            metrics["recall"] = binary_recall(alarms, labels)
            metrics["f1"] = binary_f1_score(alarms, labels)
        self.log_dict({f"test/{name}": value for name, value in metrics.items()})
        self.test_metrics.reset()

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Anomaly scores (B,)."""
        scores: Tensor = self(batch[0] if isinstance(batch, (tuple, list)) else batch)
        return scores

    def prediction_table(self, predictions: Sequence[Tensor]) -> tuple[list[str], Iterable[Sequence[Any]]]:
        """Header and rows of the predictions file: the score, and the alarm (0 or 1) if there is a threshold."""
        scores, threshold = torch.cat(list(predictions)).tolist(), float(self.threshold)
        if math.isnan(threshold):
            return ["score"], ([f"{score:.6g}"] for score in scores)
        return ["score", "alarm"], ([f"{score:.6g}", int(score >= threshold)] for score in scores)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what the model learned of its data."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["class_counts"], checkpoint["input_shape"] = self.class_counts, self.input_shape
        checkpoint["train_loss"] = self._loss.cpu(), self._batches  # a checkpoint may be mid-epoch
        checkpoint.update(describe_classes(self))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the shape of a sample, and so the detector.

        Raises:
            SettingError: the checkpoint is of another model, or the data has samples of another shape.
        """
        super().on_load_checkpoint(checkpoint)
        check_model(self, checkpoint)
        shape = tuple(checkpoint["input_shape"])
        if self.input_shape not in (None, shape):
            # a DataModule that has its state in the checkpoint selects the trained features by their names
            if type(self.data).__qualname__ not in checkpoint:
                raise SettingError(
                    f"the checkpoint takes samples of shape {shape} and the data has {self.input_shape}: use data with "
                    "the features that it was trained on"
                )
            del self.detector
        self.class_counts, self.input_shape = checkpoint["class_counts"], shape
        self._loss, self._batches = checkpoint["train_loss"]
        self._prepared = True
        self.configure_model()
        self.make_sam()
        check_weights(self, checkpoint)

    def choose_threshold(self) -> None:
        """Score the validation part with the present weights, whatever ``check_val_every_n_epoch`` is."""

        def see(batch: Any, index: int) -> None:
            self.val_metrics.update(self(batch[0]), batch[1])

        see_validation_part(self.trainer, self, see)
        if self.val_metrics.scores:
            self.threshold.fill_(self.val_metrics.best_threshold())
            self.val_metrics.reset()

    def _tail_weight(self, labels: Tensor) -> Tensor:
        """The factor of the loss of each sample or pair."""
        return torch.where(_in_tail(labels) == 1, self._weight_of_anomalies, 1.0)

    def _check_sampling(self) -> None:
        """Pairs for detectors of pairs, samples for the others."""
        uses_pairs = getattr(called(self.detector_factory), "uses_pairs", None)
        sampling = getattr(self.data, "sampling", None)
        if uses_pairs is None or sampling is None or uses_pairs == sampling.endswith("pairs"):
            return
        fix = "pairs or natural_pairs" if uses_pairs else "natural or balanced"
        raise SettingError(f"data.sampling is {sampling}, which {self.detector_name} cannot use: set it to {fix}")

    def _check_without_gradient(self) -> None:
        """Refuse what would have no effect, or none of the effect that it promises."""
        name = self.detector_name
        if not isinstance(self.sam, Plain):
            raise SettingError(
                f"model.sam is {self.method}: {name} has no gradient to sharpen: choose a network such as DevNet, or "
                "set model.sam to Plain (configs/method/sgd.yaml)"
            )
        if self.sam.class_weight is not None:
            raise SettingError(
                f"model.sam has a tail_weight or class_weight, which {name} does not use: remove it, or set "
                "model.detector.weighted to true"
            )
        for setting, value in self._of_gradients.items():
            if value is not None:
                raise SettingError(f"model.{setting} is set: {name} has no gradient: set it to null")
        if self._scaler is not None:
            raise SettingError(
                f"trainer.precision is {self.trainer.precision}: {name} has no gradient to scale: set it to 32-true"
            )


def _in_tail(labels: Tensor) -> Tensor:
    """1 for labelled anomalies (B,), and for pairs (B, 2) with one in them."""
    return labels.amax(dim=1) if labels.dim() == 2 else labels
