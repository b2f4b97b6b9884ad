"""A long-tailed classifier whose backward pass is SGD's, SAM's, ImbSAM's or Focal-SAM's."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from imbsam import SAM, ClassAwareSAM, FocalSAM, ImbSAM, SettingError
from imbsam.class_groups import tail_mask
from imbsam.losses import CrossEntropy, LogitAdjusted
from imbsam.metrics import ClassGroupAccuracy
from lightning_modules.backbones import create_backbone


class LongTailedClassifier(LightningModule):
    """Classification with rare classes, by manual optimization: the engine takes the place of ``loss.backward()``.

    The number of classes and the class counts come from the DataModule (``class_counts``, ``class_names``); batches
    are ``(images, targets)``. Logs ``train/loss``, ``train/tail_rows`` (rows of tail classes in the batch), ``lr``, and
    for validation and test the loss and the accuracies ``many``, ``medium``, ``few`` and ``all``.

    Args:
        backbone: cifar_resnet20, cifar_resnet32, cifar_resnet34, small_cnn, or a torchvision classifier's name.
        backbone_args: further arguments of the backbone, for example ``{width: 8, norm: group}``.
        method: sgd (plain training), sam, imbsam or focal_sam.
        rho: length of the perturbation.
        eta: classes with fewer than eta training samples are tail classes.
        tail_classes: the tail classes by index, in place of eta.
        tail_weight: multiplies the loss of the tail classes, for every method (the published ImbSAM code uses 2).
        adaptive: scale the perturbation by the weights (ASAM).
        focal_lambda: focal_sam's weight of the sharpness term.
        focal_gamma: how much less common classes count in focal_sam.
        context_rows: rows of the batch that the extra passes see beside the sharp ones: a number, batch, or auto.
        start_epoch: first epoch, from 0, with a perturbation; before it training is plain.
        loss: cross_entropy, or logit_adjusted (Menon et al. 2021; balanced softmax at tau 1).
        loss_args: further arguments of the loss, for example ``{label_smoothing: 0.1}`` or ``{tau: 1.0}``.
        optimizer: any torch optimizer.
        lr_scheduler: any torch scheduler. ReduceLROnPlateau watches the validation loss, or else the training loss.
        lr_interval: step the scheduler after every epoch or after every optimizer step.
        accumulate_grad_batches: batches that count as one, for the perturbation too.
        gradient_clip_val: clip the (unscaled) gradient at this value.
        gradient_clip_algorithm: clip by norm or by value.
        many: classes with more training samples than this are many-shot.
        few: classes with fewer training samples than this are few-shot.
    """

    def __init__(
        self,
        backbone: str = "cifar_resnet32",
        backbone_args: dict[str, Any] | None = None,
        method: Literal["sgd", "sam", "imbsam", "focal_sam"] = "imbsam",
        rho: float = 0.05,
        eta: float = 20,
        tail_classes: list[int] | None = None,
        tail_weight: float = 1.0,
        adaptive: bool = False,
        focal_lambda: float = 0.8,
        focal_gamma: float = 3.0,
        context_rows: int | Literal["auto", "batch"] = "auto",
        start_epoch: int = 0,
        loss: Literal["cross_entropy", "logit_adjusted"] = "cross_entropy",
        loss_args: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = torch.optim.SGD,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        many: int = 100,
        few: int = 20,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        if accumulate_grad_batches < 1:
            raise SettingError(f"accumulate_grad_batches is {accumulate_grad_batches}: give a number from 1")
        if start_epoch < 0:
            raise SettingError(f"start_epoch is {start_epoch}: give a number from 0")
        self.settings: Any = self.hparams
        self.automatic_optimization = False
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.class_counts: Tensor | None = None
        self.class_names: list[str] = []
        self.backbone: nn.Module
        self._micro_batches: list[tuple[Callable[[Tensor], Tensor], Tensor]] = []

    def setup(self, stage: str) -> None:
        """Learn the class counts from the DataModule."""
        data: Any = getattr(self.trainer, "datamodule", None)
        counts = getattr(data, "class_counts", None)
        if counts is None:
            raise SettingError(
                f"the data ({type(data).__name__}) has no class_counts: use a LightningDataModule with class_counts "
                "(training samples per class) and class_names"
            )
        if self.class_counts is not None and len(self.class_counts) != len(counts):
            raise SettingError(
                f"the model has {len(self.class_counts)} classes and data {len(counts)}: use the data it was trained on"
            )
        # a model from a checkpoint keeps the counts, and so the groups, that it was trained with
        if self.class_counts is None or stage == "fit":
            self.class_counts, self.class_names = torch.as_tensor(counts), list(data.class_names)

    def configure_model(self) -> None:
        """Build what needs the number of classes."""
        if hasattr(self, "backbone") or self.class_counts is None:  # load_from_checkpoint asks before it has them
            return
        hp = self.settings
        self.backbone = create_backbone(hp.backbone, num_classes=len(self.class_counts), **(hp.backbone_args or {}))
        self.loss = self._loss(self.class_counts)
        self.val_accuracy = ClassGroupAccuracy(self.class_counts, hp.many, hp.few, class_names=self.class_names)
        self.test_accuracy = ClassGroupAccuracy(self.class_counts, hp.many, hp.few, class_names=self.class_names)

    def configure_optimizers(self) -> Any:
        """One optimizer, and a scheduler where there is one."""
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        self._check_length(scheduler)
        # manual optimization: Lightning keeps the scheduler in checkpoints, and we step it
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.settings.lr_interval}}

    def on_fit_start(self) -> None:
        """Make the backward pass."""
        self.sam = self._engine()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of images (B, channels, H, W)."""
        logits: Tensor = self.backbone(images)
        return logits

    def on_train_epoch_start(self) -> None:
        """Perturb from `start_epoch` on."""
        self.sam.rho = self.settings.rho if self.current_epoch >= self.settings.start_epoch else 0.0

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Keep the targets on the host too: which rows are sharp is decided there, without waiting for the GPU."""
        if not self.trainer.training:
            return batch
        images, targets = batch
        return images, targets, targets.numpy()  # an array stays where it is

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Collect `accumulate_grad_batches` batches, then one backward pass over them and one optimizer step."""
        images, targets, on_host = batch
        self._micro_batches.append(
            (lambda rows: self.loss(self(images[rows]), targets[rows]), torch.from_numpy(on_host))
        )
        if len(self._micro_batches) < self.settings.accumulate_grad_batches and not self.trainer.is_last_batch:
            return
        optimizer: Any = self.optimizers()
        loss = self.sam.backward(self._micro_batches, backward=self.manual_backward)
        rows = sum(len(targets) for _, targets in self._micro_batches)
        tail_rows = sum(self._tail_rows(targets) for _, targets in self._micro_batches)
        self._micro_batches = []
        self.log("train/loss", loss, prog_bar=True, on_step=True, on_epoch=True, batch_size=rows)
        self.log_dict({"train/tail_rows": tail_rows, "lr": optimizer.param_groups[0]["lr"]}, batch_size=rows)
        optimizer.step()
        optimizer.zero_grad()
        if self.settings.lr_interval == "step":
            self._step_scheduler()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip here: gradients are unscaled by now."""
        if self.settings.gradient_clip_val is not None:
            self.clip_gradients(
                optimizer,
                gradient_clip_val=self.settings.gradient_clip_val,
                gradient_clip_algorithm=self.settings.gradient_clip_algorithm,
            )

    def on_train_epoch_end(self) -> None:
        """Step the scheduler."""
        if self.settings.lr_interval == "epoch":
            self._step_scheduler()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and group accuracies."""
        self._evaluate(batch, "val", self.val_accuracy)

    def on_validation_epoch_end(self) -> None:
        """Log the group accuracies."""
        self._log_accuracy("val", self.val_accuracy)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and group accuracies."""
        self._evaluate(batch, "test", self.test_accuracy)

    def on_test_epoch_end(self) -> None:
        """Log the group accuracies."""
        self._log_accuracy("test", self.test_accuracy)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class probabilities (B, C)."""
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        probabilities: Tensor = self(images).float().softmax(dim=1)
        return probabilities

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the model learned of its classes."""
        checkpoint["class_counts"], checkpoint["class_names"] = self.class_counts, self.class_names

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the model of the checkpoint's classes, where there is no DataModule to ask."""
        if self.class_counts is None:
            self.class_counts, self.class_names = checkpoint["class_counts"], checkpoint["class_names"]
        self.configure_model()

    def _engine(self) -> ClassAwareSAM:
        hp = self.settings
        assert self.class_counts is not None
        tail = tail_mask(self.class_counts, hp.eta, hp.tail_classes)
        weight = torch.where(tail, hp.tail_weight, 1.0) if hp.tail_weight != 1 else None
        settings: dict[str, Any] = {"class_weight": weight, "adaptive": hp.adaptive, "context_rows": hp.context_rows}
        strategy: Any = self.trainer.strategy
        if self.trainer.world_size > 1:
            settings["no_sync"] = strategy.block_backward_sync
            settings["process_group"] = torch.distributed.group.WORLD
        if hp.method == "imbsam":
            return ImbSAM(self.backbone, self.class_counts, hp.eta, hp.tail_classes, hp.rho, **settings)
        if hp.method == "focal_sam":
            return FocalSAM(self.backbone, self.class_counts, hp.rho, hp.focal_lambda, hp.focal_gamma, **settings)
        if hp.method == "sam":
            return SAM(self.backbone, hp.rho, **settings)
        return ClassAwareSAM(self.backbone, torch.zeros(len(self.class_counts)), hp.rho, **settings)

    def _loss(self, class_counts: Tensor) -> nn.Module:
        args = self.settings.loss_args or {}
        try:
            return (
                CrossEntropy(**args) if self.settings.loss == "cross_entropy" else LogitAdjusted(class_counts, **args)
            )
        except TypeError as error:
            raise SettingError(f"loss_args is {args}: {error}") from error

    def _tail_rows(self, targets: Tensor) -> float:
        assert self.class_counts is not None
        tail = tail_mask(self.class_counts, self.settings.eta, self.settings.tail_classes)
        return float((tail[targets] if targets.dim() == 1 else targets @ tail.to(targets)).sum())

    def _step_scheduler(self) -> None:
        scheduler: Any = self.lr_schedulers()
        if isinstance(scheduler, ReduceLROnPlateau):
            metrics = self.trainer.callback_metrics
            scheduler.step(metrics.get("val/loss", metrics["train/loss"]))
        elif scheduler is not None:
            scheduler.step()

    def _check_length(self, scheduler: Any) -> None:
        """A cosine that ends before or after the run is a common slip after changing max_epochs."""
        end = getattr(scheduler, "T_max", None)
        steps = (
            self.trainer.max_epochs if self.settings.lr_interval == "epoch" else self.trainer.estimated_stepping_batches
        )
        if end is not None and steps is not None and steps > 0 and end != steps:
            rank_zero_warn(
                f"the scheduler's T_max is {end} and the run has {steps} {self.settings.lr_interval}s: "
                f"set lr_scheduler.init_args.T_max to {steps} for a cosine that ends with the run"
            )

    def _evaluate(self, batch: Any, stage: str, accuracy: ClassGroupAccuracy) -> None:
        images, targets = batch
        logits = self(images)
        self.log(f"{stage}/loss", self.loss(logits, targets).mean(), batch_size=len(images), sync_dist=True)
        accuracy.update(logits, targets)

    def _log_accuracy(self, stage: str, accuracy: ClassGroupAccuracy) -> None:
        self.log_dict({f"{stage}/{group}": value for group, value in accuracy.compute().items()}, batch_size=1)
        accuracy.reset()
