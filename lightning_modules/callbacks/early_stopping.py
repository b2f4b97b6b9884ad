"""Early stopping that ends with the best weights."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from imbsam.checks import check_numbers, check_whole_numbers


class RestoringEarlyStopping(EarlyStopping):
    """Lightning's EarlyStopping; at the end of ``fit`` the model has the weights of the best epoch.

    So the best weights are tested, a threshold is chosen for them, and the last checkpoint holds them. The latest
    weights are kept beside them: a finished run that is resumed with more patience or more epochs continues from where
    it stopped, bit-identically.

    Where ``monitor`` is never logged (no validation samples, or no labelled anomaly among them) the training lasts
    ``passes_without_validation`` passes over the training samples and ends with the latest weights. One line at the end
    of ``fit`` says which weights were kept. A model that ends by itself (its ``ends_by_itself`` is true, as with
    :class:`~lightning_modules.detectors.Boosting`) is left alone: it has no weights that come and go.

    Args:
        monitor: the metric to watch.
        patience: epochs without improvement after which the training stops.
        passes_without_validation: passes over the training samples (batches times batch size, over the sum of the
            model's ``class_counts``) where ``monitor`` is never logged; null for all of ``trainer.max_epochs``.
        **kwargs: the other settings of EarlyStopping.
    """

    def __init__(
        self,
        monitor: str = "val/loss",
        patience: int = 10,
        passes_without_validation: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(monitor, patience=patience, strict=False, **kwargs)
        check_whole_numbers(patience=patience)
        if passes_without_validation is not None:
            check_numbers(above=True, passes_without_validation=passes_without_validation)
        self.passes_without_validation = passes_without_validation
        self.best_epoch: int | None = None  # from 1
        self._other: dict[str, Tensor] | None = None  # the best weights; once restored, the latest
        self._restored = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop a resumed run that was out of patience; it has the best weights already."""
        trainer.should_stop = trainer.should_stop or self._out_of_patience

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue from the latest weights, where a finished run is resumed with more patience or epochs."""
        if self._restored:
            self._swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights of the best validation."""
        if getattr(pl_module, "ends_by_itself", False):
            return
        before = self.best_score
        super().on_validation_end(trainer, pl_module)
        self._keep_if_best(before, trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Keep the weights of the best epoch; without validation, stop after enough passes."""
        if getattr(pl_module, "ends_by_itself", False):
            return
        before = self.best_score
        super().on_train_epoch_end(trainer, pl_module)
        self._keep_if_best(before, trainer, pl_module)
        if self.best_epoch is None and self.passes_without_validation is not None:
            loader: Any = trainer.train_dataloader
            samples = (trainer.current_epoch + 1) * trainer.num_training_batches * loader.joint_batch_size
            passes = samples / int(pl_module.class_counts.sum())
            trainer.should_stop = trainer.should_stop or passes >= self.passes_without_validation

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the best weights, before a threshold is chosen and the last checkpoint written."""
        if getattr(trainer, "fast_dev_run", False) or getattr(pl_module, "ends_by_itself", False):
            return
        if self._other is not None:
            self._swap(pl_module)
        rank_zero_info(self._summary(trainer))

    def state_dict(self) -> dict[str, Any]:
        """EarlyStopping's state, and the weights that the model does not have now."""
        return {
            **super().state_dict(),
            "best_epoch": self.best_epoch,
            "other": self._other,
            "restored": self._restored,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore all but the patience, which a resumed run may change."""
        patience = self.patience
        super().load_state_dict(state_dict)
        self.patience = patience
        self.best_epoch = state_dict["best_epoch"]
        self._other = state_dict["other"]
        self._restored = state_dict["restored"]

    @property
    def _out_of_patience(self) -> bool:
        return self.best_epoch is not None and self.wait_count >= self.patience

    def _keep_if_best(self, before: Tensor, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.best_score is not before:
            self._other = _copy(pl_module)
            self.best_epoch = trainer.current_epoch + 1

    def _swap(self, pl_module: LightningModule) -> None:
        assert self._other is not None
        current = _copy(pl_module)
        pl_module.load_state_dict(self._other)
        self._other, self._restored = current, not self._restored

    def _summary(self, trainer: Trainer) -> str:
        epochs = trainer.current_epoch
        if self.best_epoch is None:
            return f"{self.monitor} was never logged, so nothing to stop by: trained {epochs} epochs"
        best = f"{self.monitor} was best after epoch {self.best_epoch} of {epochs} ({self.best_score:.4g})"
        kept = f"{best}, whose weights are kept"
        return kept if self._out_of_patience else f"{kept}; it was still improving: raise trainer.max_epochs"


def _copy(pl_module: LightningModule) -> dict[str, Tensor]:
    """The weights and buffers, on the CPU."""
    return {name: value.detach().to("cpu", copy=True) for name, value in pl_module.state_dict().items()}
