"""What every LightningModule that trains with the engine shares: the engine, the optimizer, clipping, the scheduler."""

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from imbsam import SAM, ClassAwareSAM, ImbSAM, SettingError


class SharpnessAwareModule(LightningModule):
    """Manual optimization with the engine in the place of ``loss.backward()``.

    A subclass calls ``self.sam.backward`` and then :meth:`step_optimizer` in its ``training_step``, and says what
    :meth:`engine` perturbs.

    Args:
        method: sgd (plain training), sam or imbsam.
        rho: length of the perturbation.
        start_epoch: first epoch, from 0, with a perturbation; before it training is plain.
        optimizer: any torch optimizer that steps without a closure.
        lr_scheduler: any torch scheduler. ReduceLROnPlateau watches the validation loss, or else the training loss.
        lr_interval: step the scheduler after every epoch or after every optimizer step.
        gradient_clip_val: clip the (unscaled) gradient at this value.
        gradient_clip_algorithm: clip by norm or by value.
    """

    def __init__(
        self,
        method: Literal["sgd", "sam", "imbsam"],
        rho: float,
        start_epoch: int,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        lr_interval: Literal["epoch", "step"],
        gradient_clip_val: float | None,
        gradient_clip_algorithm: Literal["norm", "value"],
    ) -> None:
        super().__init__()
        if start_epoch < 0:
            raise SettingError(f"start_epoch is {start_epoch}: give a number from 0")
        if gradient_clip_val is not None and not gradient_clip_val > 0:
            raise SettingError(
                f"gradient_clip_val is {gradient_clip_val}: give a number above 0, or null for no clipping"
            )
        if method not in ("sgd", "sam", "imbsam"):
            raise SettingError(f"method is {method!r}: choose sgd, sam or imbsam")
        self.automatic_optimization = False
        self.method = method
        self.rho = 0.0 if method == "sgd" else rho
        self.start_epoch = start_epoch
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.gradient_clip_val = gradient_clip_val
        self.gradient_clip_algorithm = gradient_clip_algorithm
        self.sam: ClassAwareSAM

    def engine(
        self, module: nn.Module, class_counts: Tensor, tail_classes: list[int], tail_weight: float, **settings: Any
    ) -> ClassAwareSAM:
        """The backward pass of ``method`` for the parameters of ``module``.

        Args:
            module: what is perturbed.
            class_counts: training samples per class (C,).
            tail_classes: the tail classes by index.
            tail_weight: multiplies the loss of the tail classes, for every method.
            settings: further settings of :class:`ClassAwareSAM`.
        """
        strategy: Any = self.trainer.strategy
        if self.trainer.world_size > 1:
            settings["no_sync"] = strategy.block_backward_sync
            settings["process_group"] = torch.distributed.group.WORLD
        if tail_weight != 1:
            weight = torch.ones(len(class_counts))
            weight[tail_classes] = tail_weight
            settings["class_weight"] = weight
        if self.method == "imbsam":
            return ImbSAM(module, class_counts, tail_classes=tail_classes, rho=self.rho, **settings)
        if self.method == "sam":
            return SAM(module, self.rho, **settings)
        return ClassAwareSAM(module, 0.0, self.rho, **settings)

    def configure_optimizers(self) -> Any:
        """One optimizer, and a scheduler where there is one."""
        try:
            optimizer = self.optimizer(self.parameters())
            scheduler = self.lr_scheduler(optimizer) if self.lr_scheduler else None
        except (TypeError, ValueError) as error:
            raise SettingError(f"optimizer or lr_scheduler: {error}") from error
        if scheduler is None:
            return optimizer
        # manual optimization: Lightning keeps the scheduler in checkpoints, and we step it
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.lr_interval}}

    def on_train_epoch_start(self) -> None:
        """Perturb from `start_epoch` on."""
        self.sam.rho = self.rho if self.current_epoch >= self.start_epoch else 0.0

    def step_optimizer(self) -> None:
        """After the backward pass: one optimizer step, and the scheduler's where it counts steps."""
        optimizer: Any = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()
        if self.lr_interval == "step":
            self._step_scheduler()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip here: gradients are unscaled by now."""
        if self.gradient_clip_val is not None:
            self.clip_gradients(
                optimizer,
                gradient_clip_val=self.gradient_clip_val,
                gradient_clip_algorithm=self.gradient_clip_algorithm,
            )

    def on_train_epoch_end(self) -> None:
        """Step the scheduler."""
        if self.lr_interval == "epoch":
            self._step_scheduler()

    def _step_scheduler(self) -> None:
        scheduler: Any = self.lr_schedulers()
        if isinstance(scheduler, ReduceLROnPlateau):
            metrics = self.trainer.callback_metrics
            scheduler.step(metrics.get("val/loss", metrics["train/loss"]))
        elif scheduler is not None:
            scheduler.step()
