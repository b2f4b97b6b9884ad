"""A long-tailed classifier whose backward pass is SGD's, SAM's, ImbSAM's or Focal-SAM's."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import ReduceLROnPlateau

from imbsam import SAM, ClassAwareSAM, FocalSAM, ImbSAM, SettingError
from imbsam.class_groups import tail_mask
from imbsam.losses import CrossEntropy, LogitAdjusted
from imbsam.metrics import ClassGroupAccuracy
from imbsam.rows import check_labels
from lightning_modules.backbones import create_backbone
from lightning_modules.moved_share import MovedShare


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
        perturbation: with several processes, along the mean of their tail gradients (global: as one process with the
            joint batch) or each along its own (per_rank: one all-reduce a step less).
        start_epoch: first epoch, from 0, with a perturbation; before it training is plain.
        loss: cross_entropy, or logit_adjusted (Menon et al. 2021; balanced softmax at tau 1).
        loss_args: further arguments of the loss, for example ``{label_smoothing: 0.1}`` or ``{tau: 1.0}``.
        optimizer: any torch optimizer that steps without a closure (LBFGS needs one).
        lr_scheduler: any torch scheduler. ReduceLROnPlateau watches the validation loss, or else the training loss.
        lr_interval: step the scheduler after every epoch or after every optimizer step.
        accumulate_grad_batches: batches that count as one, for the perturbation too.
        gradient_clip_val: clip the (unscaled) gradient at this value.
        gradient_clip_algorithm: clip by norm or by value.
        many: classes with more training samples than this are many-shot.
        few: classes with fewer training samples than this are few-shot.
        compile: compile the backbone with torch.compile.
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
        perturbation: Literal["global", "per_rank"] = "global",
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
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        if accumulate_grad_batches < 1:
            raise SettingError(f"accumulate_grad_batches is {accumulate_grad_batches}: give a number from 1")
        if gradient_clip_val is not None and not gradient_clip_val > 0:
            raise SettingError(
                f"gradient_clip_val is {gradient_clip_val}: give a number above 0, or null for no clipping"
            )
        if "num_classes" in (backbone_args or {}):
            raise SettingError("backbone_args sets num_classes: leave it out, the data says how many classes there are")
        if start_epoch < 0:
            raise SettingError(f"start_epoch is {start_epoch}: give a number from 0")
        self.settings: Any = self.hparams
        self.automatic_optimization = False
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.class_counts: Tensor | None = None
        self.class_names: list[str] = []
        self.backbone: nn.Module
        self._host_targets: Tensor | None = None
        self._tail: Tensor
        self._micro_batches: list[tuple[Callable[[Tensor], Tensor], Tensor]] = []
        self._watch_moved = False
        self._loss_scale = 0.0

    def setup(self, stage: str) -> None:
        """Learn the classes from the DataModule."""
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
        # a trained model keeps the counts, and so the groups, of its training
        if self.class_counts is None or stage == "fit":
            self._learn_classes(torch.as_tensor(counts), list(data.class_names))

    def configure_model(self) -> None:
        """Build the backbone, once the number of classes is known."""
        if not hasattr(self, "backbone") and self.class_counts is not None:
            args = self.settings.backbone_args or {}
            self.backbone = create_backbone(self.settings.backbone, num_classes=len(self.class_counts), **args)
            if self.settings.compile:
                self.backbone.compile()
            if self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy):
                assert self.device_mesh is not None
                mesh = self.device_mesh["data_parallel"]
                for child in self.backbone.children():
                    if next(child.parameters(), None) is not None:
                        fully_shard(child, mesh=mesh)
                fully_shard(self.backbone, mesh=mesh)

    def configure_optimizers(self) -> Any:
        """One optimizer, and a scheduler where there is one."""
        try:
            optimizer = self.optimizer(self.parameters())
            scheduler = self.lr_scheduler(optimizer) if self.lr_scheduler else None
        except (TypeError, ValueError) as error:
            raise SettingError(f"optimizer or lr_scheduler: {error}") from error
        if scheduler is None:
            return optimizer
        self._check_length(scheduler)
        # manual optimization: Lightning keeps the scheduler in checkpoints, and we step it
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.settings.lr_interval}}

    def on_fit_start(self) -> None:
        """Make the backward pass."""
        self.sam = self._engine()
        half = next((p.dtype for p in self.backbone.parameters() if p.dtype in (torch.bfloat16, torch.float16)), None)
        self._watch_moved = half is not None and self._rho > 0
        if self._watch_moved:
            rank_zero_warn(
                f"trainer.precision is {self.trainer.precision}: with weights in {half} a perturbation of length "
                f"rho={self._rho} is below the spacing of most weights and moves only some of them (train/moved_share "
                "logs how many); bf16-mixed keeps the weights in float32"
            )

    def on_train_start(self) -> None:
        """The loss scale to compare with, by now that of the checkpoint."""
        scaler = self._scaler
        self._loss_scale = scaler.get_scale() if scaler else 0.0

    def on_train_end(self) -> None:
        """What is tested next must not differ from rank to rank."""
        self.sam.broadcast_buffers()

    def on_validation_start(self) -> None:
        """What is validated must not differ from rank to rank."""
        if self.trainer.training or self.trainer.sanity_checking:
            self.sam.broadcast_buffers()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of images (B, channels, H, W)."""
        logits: Tensor = self.backbone(images)
        return logits

    def on_train_epoch_start(self) -> None:
        """Perturb from `start_epoch` on."""
        self._micro_batches = []  # of an epoch that was interrupted
        self.sam.rho = self._rho if self.current_epoch >= self.settings.start_epoch else 0.0

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check the targets, and keep them on the host: which rows are sharp is decided there, without a wait."""
        if self.trainer.predicting:
            return batch
        self._host_targets = targets = batch[1].cpu()
        if self.class_counts is not None and targets.dim() == 1:
            check_labels(targets.tolist(), len(self.class_counts))
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Collect `accumulate_grad_batches` batches, then one backward pass over them and one optimizer step."""
        images, targets = batch
        # a DataModule's own on_before_batch_transfer is called in place of ours; its other hooks may mix the targets
        on_host, self._host_targets = self._host_targets, None
        if on_host is None or on_host.shape != targets.shape:
            on_host = targets
        self._micro_batches.append((lambda rows: self.loss(self(images[rows]), targets[rows]), on_host))
        if len(self._micro_batches) < self.settings.accumulate_grad_batches and not self.trainer.is_last_batch:
            return
        micro_batches, self._micro_batches = self._micro_batches, []
        optimizer: Any = self.optimizers()
        moved = None
        if self._watch_moved:
            moved = MovedShare(self.backbone)
            micro_batches = [(moved.watch(losses), targets) for losses, targets in micro_batches]
        loss = self.sam.backward(micro_batches, backward=self.manual_backward)
        rows = sum(len(targets) for _, targets in micro_batches)
        tail_rows = sum(self._tail_rows(targets) for _, targets in micro_batches)
        self.log("train/loss", loss, prog_bar=True, on_step=True, on_epoch=True, batch_size=rows)
        self.log_dict({"train/tail_rows": tail_rows, "lr": optimizer.param_groups[0]["lr"]}, batch_size=rows)
        if moved is not None:
            self.log("train/moved_share", moved.share)
        optimizer.step()
        optimizer.zero_grad()
        if (scaler := self._scaler) is not None:
            scale = scaler.get_scale()  # no wait of its own: scaler.step has just waited
            self.log("train/loss_scale", scale)
            self.log("train/skipped_steps", float(scale < self._loss_scale), on_epoch=True, reduce_fx="sum")
            self._loss_scale = scale
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

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss and group accuracies; returns the logits (B, C), for callbacks."""
        return self._evaluate(batch, "test", self.test_accuracy)

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
        """Take over the classes that the model was trained with, except to train it further on other data."""
        if self._trainer is None or self.trainer.state.fn != "fit":
            if self.class_counts is not None and not torch.equal(self.class_counts, checkpoint["class_counts"]):
                rank_zero_warn(
                    "the data's class_counts are not those that the checkpoint was trained with (another seed, ratio "
                    "or val_share?): many, medium and few are the checkpoint's"
                )
            self._learn_classes(checkpoint["class_counts"], checkpoint["class_names"])
        self.configure_model()

    def _learn_classes(self, class_counts: Tensor, class_names: list[str]) -> None:
        """Build what depends on the class counts."""
        hp = self.settings
        self.class_counts, self.class_names = class_counts, class_names
        self._tail = tail_mask(class_counts, hp.eta, hp.tail_classes)
        self.loss = self._loss(class_counts).to(self.device)
        self.val_accuracy, self.test_accuracy = (
            ClassGroupAccuracy(class_counts, hp.many, hp.few, class_names=class_names).to(self.device) for _ in range(2)
        )

    @property
    def _rho(self) -> float:
        return 0.0 if self.settings.method == "sgd" else float(self.settings.rho)

    @property
    def _scaler(self) -> Any:
        """The GradScaler of 16-mixed, which skips steps that overflowed, or None."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _engine(self) -> ClassAwareSAM:
        hp = self.settings
        assert self.class_counts is not None
        weight = torch.where(self._tail, hp.tail_weight, 1.0) if hp.tail_weight != 1 else None
        settings: dict[str, Any] = {"class_weight": weight, "adaptive": hp.adaptive, "context_rows": hp.context_rows}
        settings["perturbation"] = hp.perturbation
        strategy: Any = self.trainer.strategy
        if getattr(strategy, "_ddp_comm_hook", None) is not None:
            raise SettingError(
                "the strategy has a ddp_comm_hook, which would see none of the passes: the gradients are averaged by "
                "the engine, in at most two all-reduces; leave the hook out"
            )
        if self.trainer.world_size > 1:
            settings["no_sync"] = strategy.block_backward_sync
            settings["process_group"] = torch.distributed.group.WORLD
        if hp.method == "imbsam":
            return ImbSAM(self.backbone, self.class_counts, hp.eta, hp.tail_classes, hp.rho, **settings)
        if hp.method == "focal_sam":
            return FocalSAM(self.backbone, self.class_counts, hp.rho, hp.focal_lambda, hp.focal_gamma, **settings)
        if hp.method == "sam":
            return SAM(self.backbone, hp.rho, **settings)
        return ClassAwareSAM(self.backbone, 0.0, self._rho, **settings)

    def _loss(self, class_counts: Tensor) -> nn.Module:
        args = self.settings.loss_args or {}
        try:
            return (
                CrossEntropy(**args) if self.settings.loss == "cross_entropy" else LogitAdjusted(class_counts, **args)
            )
        except TypeError as error:
            raise SettingError(f"loss_args is {args}: {error}") from error

    def _tail_rows(self, targets: Tensor) -> float:
        targets = targets.cpu()
        return float((self._tail[targets] if targets.dim() == 1 else targets @ self._tail.to(targets)).sum())

    def _step_scheduler(self) -> None:
        scheduler: Any = self.lr_schedulers()
        if isinstance(scheduler, ReduceLROnPlateau):
            metrics = self.trainer.callback_metrics
            scheduler.step(metrics.get("val/loss", metrics["train/loss"]))
        elif scheduler is not None:
            scheduler.step()

    def _check_length(self, scheduler: Any) -> None:
        """A cosine that ends before or after the run is a common slip after changing max_epochs."""
        end, run = getattr(scheduler, "T_max", None), self.trainer
        if end is None or getattr(run, "fast_dev_run", False) or not run.max_epochs or run.max_epochs < 0:
            return
        steps = run.max_epochs
        if self.settings.lr_interval == "step":
            steps = int(run.estimated_stepping_batches)  # knows the number of batches, but not that we accumulate them
            if self.settings.accumulate_grad_batches > 1:
                steps = run.max_epochs * -(-int(run.num_training_batches) // self.settings.accumulate_grad_batches)
        if end != steps:
            rank_zero_warn(
                f"the scheduler's T_max is {end} and the run has {steps} {self.settings.lr_interval}s: "
                f"set lr_scheduler.init_args.T_max to {steps} for a cosine that ends with the run"
            )

    def _evaluate(self, batch: Any, stage: str, accuracy: ClassGroupAccuracy) -> Tensor:
        images, targets = batch
        logits: Tensor = self(images)
        self.log(f"{stage}/loss", self.loss(logits, targets).mean(), batch_size=len(images), sync_dist=True)
        accuracy.update(logits, targets)
        return logits

    def _log_accuracy(self, stage: str, accuracy: ClassGroupAccuracy) -> None:
        # equal on all ranks; sync_dist only tells Lightning that we know
        several = self.trainer.world_size > 1
        values = {f"{stage}/{group}": value for group, value in accuracy.compute().items()}
        self.log_dict(values, batch_size=1, sync_dist=several)
        accuracy.reset()
