"""What is fitted on the validation part when a training has ended, and measured on the test samples."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import CatMetric

from imbsam.errors import SettingError
from lightning_modules.validation_part import validation_loader, validation_predictions


class FittedCallback(Callback, ABC):
    """Fit something to predictions of the validation part, and keep it in the checkpoint.

    A subclass has ``settings`` and :meth:`fit`. The fit is plain data, which ``torch.load(weights_only=True)`` reads.
    """

    name: str
    """In messages and on the command line."""
    title: str = ""
    """In messages, where the name alone would mislead."""

    def __init__(self) -> None:
        self.fitted: dict[str, Any] | None = None
        self._trained_with: dict[str, Any] = {}

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What is to be fitted; empty for nothing."""

    @abstractmethod
    def fit(self, trainer: Trainer, module: Any, predictions: Tensor, labels: Tensor) -> dict[str, Any]:
        """Fit, and say what was found.

        Args:
            trainer: the Trainer.
            module: the model.
            predictions: of the validation samples, on the CPU: probabilities, float64 (N, C), or scores (N,).
            labels: int64 (N,).

        Raises:
            SettingError: it cannot be fitted.
        """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse before the training what cannot work after it."""
        if not self.settings:
            return
        self.check_model(pl_module)
        if validation_loader(trainer) is None:
            raise SettingError(
                f"data.val_share is 0, and {self.name} is fitted on the validation part: set it, say to 0.2"
            )
        self.check(trainer, pl_module)

    def check_model(self, module: Any) -> None:
        """Refuse a model of several labels a sample, before anything is predicted."""
        if getattr(module, "multi_label", False):
            raise SettingError(
                f"{self.name} is set, and it is for samples of one class each, not for {type(module).__name__}: "
                "leave it out"
            )

    @abstractmethod
    def check(self, trainer: Trainer, module: Any) -> None:
        """Compare the settings with the model and its classes, before anything is fitted.

        Raises:
            SettingError: they do not suit each other.
        """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the fit of other weights, in a run that is resumed."""
        self.fitted = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit, before the last checkpoint is written: the first of these callbacks all of them, on one prediction."""
        callbacks = fitted_callbacks(trainer)
        if callbacks[:1] != [self] or getattr(trainer, "fast_dev_run", False):
            return
        predictions, labels = validation_predictions(trainer, pl_module)
        for callback in callbacks:
            try:
                callback.fit_to(trainer, pl_module, predictions, labels)
            except SettingError as error:  # not raised: the training's checkpoint is still to be written
                rank_zero_warn(f"no {callback.title or callback.name}: {error}")

    def fit_to(self, trainer: Trainer, module: Any, predictions: Tensor, labels: Tensor) -> None:
        """:meth:`fit`, and keep what was found."""
        self.fitted = self.fit(trainer, module, predictions, labels)
        self.fitted["settings"] = self.settings
        self.fitted["validation_counts"] = labels.bincount(minlength=len(module.class_counts)).tolist()

    def state_dict(self) -> dict[str, Any]:
        """The fit, with the validation samples of each class, and what is to be fitted."""
        return {"fitted": self.fitted, "settings": self.settings} if self.settings or self.fitted else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the fit of a checkpoint."""
        self.fitted, self._trained_with = state_dict["fitted"], state_dict["settings"]

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the checkpoint has no fit, or another one than the settings."""
        self._check(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last test."""
        self._check(trainer)
        self._found, self._labels = (CatMetric(nan_strategy="disable").to(pl_module.device) for _ in range(2))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what ``imbsam predict`` would write, by the logits of ``test_step`` where it returns them."""
        if self.fitted is None:
            return
        logits = isinstance(outputs, Tensor) and outputs.ndim == 2
        predicted = (
            outputs.detach().float().softmax(dim=1) if logits else _predict(trainer, pl_module, batch, batch_idx)
        )
        self._found.update(predicted)
        self._labels.update(batch[1])

    def tested(self) -> tuple[Tensor, Tensor] | None:
        """Predictions and labels of the test samples of all ranks, on the CPU; None without a fit."""
        if self.fitted is None or not self._found.update_called:
            return None
        return torch.as_tensor(self._found.compute()).cpu(), torch.as_tensor(self._labels.compute()).cpu().long()

    def _check(self, trainer: Trainer) -> None:
        if not trainer.ckpt_path:  # the training has just ended
            return
        if self.fitted is None and self._trained_with:
            rank_zero_warn(
                f"no {self.title or self.name}: this checkpoint was written before the training ended, when it is "
                "fitted; last.ckpt has it"
            )
        elif self.settings and (self.fitted is None or self.fitted["settings"] != self.settings):
            name, value = next(iter(self.settings.items()))
            theirs = self.fitted["settings"] if self.fitted else "none"
            raise SettingError(
                f"{self.name}.{name} is {value}, and the checkpoint has {theirs}: leave it out, or fit it to a new "
                "checkpoint with imbsam decide"
            )


@torch.no_grad()
def _predict(trainer: Trainer, module: LightningModule, batch: Any, index: int) -> Tensor:
    """What ``imbsam predict`` would write of a batch that is on the device: probabilities (B, C) or scores (B,)."""
    with trainer.precision_plugin.forward_context():
        predicted: Tensor = module.predict_step(batch, index)
    return predicted.float()


def fitted_callbacks(trainer: Trainer) -> list[FittedCallback]:
    """Those of the Trainer's callbacks that have something to fit, in their order."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, FittedCallback) and callback.settings]
