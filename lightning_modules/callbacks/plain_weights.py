"""The weights of the last step, kept and tested beside their average."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.func import functional_call

from lightning_modules.epoch_log import log_epoch


class PlainWeights(Callback):
    """Keep the plain weights where Lightning's WeightAveraging or EMAWeightAveraging puts their average in place.

    At the end of the training Lightning copies the average over the weights, and a checkpoint written then would have
    the average as the weights to resume from too: it gets the plain ones. After a test they are tested as well: every
    measure of :class:`~imbsam.class_measures.ClassMeasures` is logged as ``test/plain_all`` and so on, at the cost of a
    second forward pass, where the model is a :class:`~lightning_modules.LongTailedClassifier`. Without an average this
    does nothing.
    """

    def __init__(self) -> None:
        self._plain: dict[str, Tensor] = {}
        self._training_ended = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier training."""
        self._plain, self._training_ended = {}, False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights and buffers of the epoch."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, WeightAveraging) for callback in callbacks):
            state = [*pl_module.named_parameters(), *pl_module.named_buffers()]
            self._plain = {name: value.detach().clone() for name, value in state}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The average is, or will be now, in the place of the weights."""
        self._training_ended = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """After the training, let the checkpoint resume from the plain weights."""
        if self._plain and self._training_ended:
            # Lightning's callback moves the latter to the former; it may be called before this one or after
            key = "current_model_state" if "current_model_state" in checkpoint else "state_dict"
            saved = checkpoint[key]
            checkpoint[key] = {**saved, **{name: value for name, value in self._plain.items() if name in saved}}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the plain weights of a checkpoint that is tested."""
        self._plain = checkpoint.get("current_model_state") or {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting."""
        self._tested: dict[str, Tensor] = {}
        if hasattr(pl_module, "test_accuracy"):
            network = {name: value for name, value in self._plain.items() if name.startswith("backbone.")}
            self._tested = {name: value.to(pl_module.device) for name, value in network.items()}
            accuracy: Any = pl_module.test_accuracy
            self._measures = accuracy.clone()
            self._measures.reset()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Predict with the plain weights."""
        if self._tested:
            model: Any = pl_module
            with trainer.precision_plugin.forward_context():
                logits = [self._plain_logits(pl_module, view) for view in model.test_views(batch[0])]
            self._measures.update(torch.stack(logits).mean(dim=0), batch[1])

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the measures."""
        if self._tested:
            log_epoch(pl_module, {f"test/plain_{name}": value for name, value in self._measures.compute().items()})

    def _plain_logits(self, module: LightningModule, images: Tensor) -> Tensor:
        logits: Tensor = functional_call(module, self._tested, (images,))
        return logits
