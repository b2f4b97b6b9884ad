"""A long-tailed classifier whose backward pass is SGD's, SAM's, ImbSAM's or Focal-SAM's."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torchmetrics import MeanMetric

from imbsam import ClassAwareSAM, SettingError
from imbsam.class_groups import tail_mask
from imbsam.class_weights import check_beta, effective_number_weights
from imbsam.losses import LDAM, CrossEntropy, Focal, LogitAdjusted, VectorScaling
from imbsam.metrics import ClassGroupAccuracy
from imbsam.row_weights import check_labels
from lightning_modules.backbones import create_backbone
from lightning_modules.backbones.heads import CosineClassifier, Head, set_head
from lightning_modules.backbones.weights import load_weights
from lightning_modules.checkpoint_contents import check_model, check_weights, describe_classes
from lightning_modules.class_names import check_class_names
from lightning_modules.epoch_log import log_epoch
from lightning_modules.sharpness_aware import RhoSchedule, SharpnessAwareModule

LOSSES: dict[str, tuple[Callable[..., nn.Module], bool]] = {
    "cross_entropy": (CrossEntropy, False),
    "focal": (Focal, False),
    "ldam": (LDAM, True),
    "logit_adjusted": (LogitAdjusted, True),
    "vector_scaling": (VectorScaling, True),
}
"""The classes of the losses, and whether they take the class counts."""


class LongTailedClassifier(SharpnessAwareModule):
    """Classification with rare classes, by manual optimization: the engine takes the place of ``loss.backward()``.

    The number of classes and the class counts come from the DataModule (``class_counts``, ``class_names``); batches
    are ``(images, targets)``. Logs ``train/loss_step``, ``train/loss_epoch`` (the mean over the epoch's rows),
    ``train/tail_rows`` (rows of tail classes in the batch), ``lr``, and for validation and test the loss and the
    accuracies ``many``, ``medium``, ``few`` and ``all``. The training losses are weighted by `tail_weight` and
    `class_balanced_beta` where these weigh; those of validation and test are not.

    Args:
        backbone: cifar_resnet20, cifar_resnet32, cifar_resnet34, small_cnn, a torchvision classifier's name, or timm/
            and a timm classifier's name.
        backbone_args: further arguments of the backbone, for example ``{width: 8, norm: group}``.
        head: the last layer: linear, or cosine, whose logits do not depend on the lengths of features and weights.
        head_args: further arguments of the head: ``{scale: 30}`` for cosine.
        backbone_weights: a local file of weights to start the training from: a state_dict (.pt, .pth, .safetensors), or
            a checkpoint of ours. The classifier's are left out where they do not fit. Not read by test and predict.
        method: sgd (plain training), sam, imbsam or focal_sam.
        rho: length of the perturbation, at `start_epoch` where it has a schedule.
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
        rho_schedule: constant, or from rho at `start_epoch` to `rho_end` at the last epoch: linear, or cosine.
        rho_end: length of the perturbation in the last epoch, where rho has a schedule.
        loss: cross_entropy, focal (Lin et al. 2017), ldam (Cao et al. 2019), logit_adjusted (Menon et al. 2021;
            balanced softmax at tau 1) or vector_scaling (Kini et al. 2021).
        loss_args: further arguments of the loss, for example ``{label_smoothing: 0.1}`` or ``{tau: 1.0}``.
        class_balanced_beta: weigh the classes' losses by their effective number of samples (Cui et al. 2019) with this
            beta, 0.9999 for instance, whatever the loss; the mean weight of the training samples is 1. The weights
            multiply `tail_weight`, and enter the perturbation's direction too. null: no re-weighting.
        drw_start_epoch: first epoch, from 0, with these weights: deferred re-weighting, 160 of 200 in LDAM-DRW.
        optimizer: any torch optimizer that steps without a closure (LBFGS needs one).
        lr_scheduler: any torch scheduler. ReduceLROnPlateau watches the validation loss, or else the training loss.
        lr_interval: step the scheduler after every epoch or after every optimizer step.
        accumulate_grad_batches: batches that count as one, for the perturbation too.
        gradient_clip_val: clip the (unscaled) gradient at this value.
        gradient_clip_algorithm: clip by norm or by value.
        many: classes with more training samples than this are many-shot.
        few: classes with fewer training samples than this are few-shot.
        compile: compile the backbone with torch.compile.
        channels_last: keep images and weights with the channels last in memory, faster on GPUs in 16 bits.
        flip_tta: in test and predict, not in validation, average the logits of an image and of its mirror image.
    """

    train_loss_name = "train/loss_epoch"

    selection_metric = "val/all"
    """What best.ckpt is chosen by, where there is a validation set; more is better."""

    def __init__(
        self,
        backbone: str = "cifar_resnet32",
        backbone_args: dict[str, Any] | None = None,
        head: Head = "linear",
        head_args: dict[str, Any] | None = None,
        backbone_weights: str | None = None,
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
        rho_schedule: RhoSchedule = "constant",
        rho_end: float = 0.0,
        loss: Literal["cross_entropy", "focal", "ldam", "logit_adjusted", "vector_scaling"] = "cross_entropy",
        loss_args: dict[str, Any] | None = None,
        class_balanced_beta: float | None = None,
        drw_start_epoch: int = 0,
        optimizer: OptimizerCallable = torch.optim.SGD,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        many: int = 100,
        few: int = 20,
        compile: bool = False,
        channels_last: bool = False,
        flip_tta: bool = False,
    ) -> None:
        super().__init__(
            method,
            rho,
            start_epoch,
            optimizer,
            lr_scheduler,
            lr_interval,
            accumulate_grad_batches,
            gradient_clip_val,
            gradient_clip_algorithm,
            rho_schedule,
            rho_end,
        )
        if loss not in LOSSES:
            raise SettingError(f"loss is {loss!r}: choose one of {', '.join(LOSSES)}")
        if drw_start_epoch < 0:
            raise SettingError(f"drw_start_epoch is {drw_start_epoch}: give a number from 0")
        if class_balanced_beta is not None:
            check_beta("class_balanced_beta", class_balanced_beta)
        if drw_start_epoch > 0 and class_balanced_beta is None:
            raise SettingError(
                f"drw_start_epoch is {drw_start_epoch} and there are no weights to begin with then: set "
                "class_balanced_beta (0.9999 is usual), or leave drw_start_epoch out"
            )
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        if "num_classes" in (backbone_args or {}):
            raise SettingError("backbone_args sets num_classes: leave it out, the data says how many classes there are")
        self.settings: Any = self.hparams
        self.class_counts: Tensor | None = None
        self.class_names: list[str] = []
        # Lightning's own means are not in its checkpoints; "disable", or each update would wait for a GPU
        self.train_loss, self.val_loss, self.test_loss = (MeanMetric(nan_strategy="disable") for _ in range(3))
        self.backbone: nn.Module
        self._host_targets: Tensor | None = None
        self._tail: Tensor
        self._balance: Tensor
        self._weights_missing = False
        self._micro_batches: list[tuple[Callable[[Tensor], Tensor], Tensor]] = []

    def setup(self, stage: str) -> None:
        """Learn the classes from the DataModule; to predict, a checkpoint knows them."""
        data: Any = getattr(self.trainer, "datamodule", None)
        counts = getattr(data, "class_counts", None)
        if counts is None and stage == "predict":
            return
        if counts is None or getattr(data, "class_names", None) is None:
            raise SettingError(
                f"the data ({type(data).__name__}) has no class_counts or no class_names: use a LightningDataModule "
                "with class_counts (training samples per class) and class_names"
            )
        if self.class_counts is not None:
            check_class_names(self.class_names, data, "the model")
        # a trained model keeps the counts, and so the groups, of its training
        counts, names = torch.as_tensor(counts), list(data.class_names)
        known = self.class_counts is not None and torch.equal(counts, self.class_counts) and names == self.class_names
        if self.class_counts is None or (stage == "fit" and not known):
            self._learn_classes(counts, names)

    def configure_model(self) -> None:
        """Build the backbone, once the number of classes is known."""
        if not hasattr(self, "backbone") and self.class_counts is not None:
            self.backbone = self._create_backbone(len(self.class_counts))
            if self.settings.channels_last:
                self.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if self.settings.compile:
                self.backbone.compile()
            if self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy):
                assert self.device_mesh is not None
                mesh = self.device_mesh["data_parallel"]
                for child in self.backbone.children():
                    if next(child.parameters(), None) is not None:
                        fully_shard(child, mesh=mesh)
                fully_shard(self.backbone, mesh=mesh)

    def _create_backbone(self, num_classes: int) -> nn.Module:
        hp = self.settings
        backbone = create_backbone(hp.backbone, num_classes=num_classes, **(hp.backbone_args or {}))
        set_head(backbone, hp.head, **(hp.head_args or {}))
        # a checkpoint to go on from is loaded later; by then the file may be gone
        if hp.backbone_weights is not None and self._trainer is not None and self.trainer.state.fn == "fit":
            self._weights_missing = not Path(hp.backbone_weights).exists()
            if not self._weights_missing:
                load_weights(backbone, hp.backbone_weights)
        return backbone

    def create_engine(self) -> ClassAwareSAM:
        """The backward pass of the method."""
        hp = self.settings
        assert self.class_counts is not None
        if hp.class_balanced_beta is not None:
            self._balance = effective_number_weights(self.class_counts, hp.class_balanced_beta)
        return self.engine(
            self.backbone,
            self.class_counts,
            eta=hp.eta,
            tail_classes=hp.tail_classes,
            tail_weight=hp.tail_weight,
            focal_lambda=hp.focal_lambda,
            focal_gamma=hp.focal_gamma,
            adaptive=hp.adaptive,
            context_rows=hp.context_rows,
            perturbation=hp.perturbation,
        )

    def on_fit_start(self) -> None:
        """Say what settings will not do together."""
        hp = self.settings
        assert self.class_counts is not None
        self._watch_sampling(self.class_counts)
        if hp.class_balanced_beta is not None:
            epochs = self._max_epochs
            if epochs is not None and hp.drw_start_epoch >= epochs and not getattr(self.trainer, "fast_dev_run", False):
                rank_zero_warn(
                    f"drw_start_epoch is {hp.drw_start_epoch} and the run has {epochs} epochs: no loss is ever "
                    "re-weighted; begin earlier (LDAM-DRW: after 0.8 of the epochs)"
                )
        if hp.loss == "ldam" and hp.head != "cosine":
            rank_zero_warn(
                "loss is ldam and the head is not a cosine one: its margins are for the scaled cosines of such a head, "
                "and mean nothing fixed for logits that may grow at will; set head to cosine"
            )
        if isinstance(self.loss, LDAM) and hp.head == "cosine":
            scale = next(m.scale for m in self.backbone.modules() if isinstance(m, CosineClassifier))
            if scale != self.loss.scale:
                rank_zero_warn(
                    f"ldam's scale is {self.loss.scale:g} and the cosine head's {scale:g}, so that the margins are not "
                    f"max_margin of the cosine; set loss_args to {{scale: {scale:g}}}"
                )

    def on_train_start(self) -> None:
        """Forget the batches of a step that was interrupted."""
        if self._weights_missing:
            raise SettingError(f"backbone_weights is {self.settings.backbone_weights}: there is no such file")
        super().on_train_start()
        self._micro_batches = []

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of images (B, channels, H, W)."""
        if self.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        try:
            logits: Tensor = self.backbone(images)
        except RuntimeError as error:
            stem = next((m for m in self.backbone.modules() if isinstance(m, nn.Conv2d)), None)
            if stem is None or images.dim() != 4 or images.shape[1] == stem.in_channels:
                raise
            raise SettingError(
                f"backbone {self.settings.backbone} takes images of {stem.in_channels} channels and these have "
                f"{images.shape[1]}: set backbone_args to {{in_channels: {images.shape[1]}}} (in_chans for timm's), or "
                "choose another backbone"
            ) from error
        return logits

    def on_train_epoch_start(self) -> None:
        """Start the epoch's mean loss."""
        super().on_train_epoch_start()
        self.train_loss.reset()

    @property
    def between_steps(self) -> bool:
        """Whether no batch is waiting for others to make up a step: the moments at which a run can be interrupted."""
        return not self._micro_batches

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check the targets, and keep them on the host: which rows are sharp is decided there, without a wait."""
        if self.trainer.predicting:
            return batch
        self._host_targets = targets = batch[1].cpu()
        if self.class_counts is not None and targets.dim() == 1:
            check_labels(targets.tolist(), len(self.class_counts))
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Collect `accumulate_grad_batches` batches, then one backward pass over them and one optimizer step.

        Returns:
            The loss, detached; None while batches are collected.
        """
        images, targets = batch
        if self.only_updates_batch_norm:
            self(images)
            return None
        # a DataModule's own on_before_batch_transfer is called in place of ours; its other hooks may mix the targets
        on_host, self._host_targets = self._host_targets, None
        if on_host is None or on_host.shape != targets.shape:
            on_host = targets
        self._micro_batches.append((lambda rows: self.loss(self(images[rows]), targets[rows]), on_host))
        if len(self._micro_batches) < self.accumulate_grad_batches and not self.trainer.is_last_batch:
            return None
        micro_batches, self._micro_batches = self._micro_batches, []
        optimizer: Any = self.optimizers()
        moved = self.moved_share(self.backbone)
        if moved is not None:
            micro_batches = [(moved.watch(losses), targets) for losses, targets in micro_batches]
        loss = self.sam.backward(micro_batches, backward=self.manual_backward)
        rows = sum(len(targets) for _, targets in micro_batches)
        tail_rows = sum(self._tail_rows(targets) for _, targets in micro_batches)
        self.train_loss.update(loss, rows)
        self.log("train/loss_step", loss, prog_bar=True, batch_size=rows)
        self.log_dict({"train/tail_rows": tail_rows, "lr": optimizer.param_groups[0]["lr"]}, batch_size=rows)
        if moved is not None:
            self.log("train/moved_share", moved.share)
        self.step_optimizer()
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the mean loss."""
        if not self.only_updates_batch_norm:
            log_epoch(self, {"train/loss_epoch": self.train_loss.compute()}, prog_bar=True)
        super().on_train_epoch_end()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and group accuracies."""
        self._evaluate(self(batch[0]), batch[1], self.val_loss, self.val_accuracy)

    def on_validation_epoch_end(self) -> None:
        """Log the loss and the group accuracies."""
        self._log_metrics("val", self.val_loss, self.val_accuracy)

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss and group accuracies; returns the logits (B, C), for callbacks."""
        return self._evaluate(self._test_logits(batch[0]), batch[1], self.test_loss, self.test_accuracy)

    def on_test_epoch_end(self) -> None:
        """Log the loss and the group accuracies."""
        self._log_metrics("test", self.test_loss, self.test_accuracy)

    def on_predict_start(self) -> None:
        """Refuse to predict by a model that knows no classes."""
        if not hasattr(self, "backbone"):
            raise SettingError("ckpt_path is null: predict takes the checkpoint of a trained model")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class probabilities (B, C)."""
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        probabilities: Tensor = self._test_logits(images).float().softmax(dim=1)
        return probabilities

    def prediction_table(self, predictions: Sequence[Tensor]) -> tuple[list[str], Iterable[Sequence[Any]]]:
        """Header and rows of the predictions' file: the predicted class, and every class's probability."""
        probabilities = torch.cat(list(predictions))
        classes = probabilities.argmax(dim=1).tolist()
        return ["predicted", *self.class_names], (
            [self.class_names[c], *(f"{p:.6g}" for p in row.tolist())]
            for c, row in zip(classes, probabilities, strict=True)
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the model learned of its classes."""
        checkpoint["class_counts"], checkpoint["class_names"] = self.class_counts, self.class_names
        checkpoint.update(describe_classes(self))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the classes that the model was trained with, except to train it further on other data.

        Raises:
            SettingError: the checkpoint is of another model, or the data have other classes, by their names.
        """
        check_model(self, checkpoint)
        check_class_names(checkpoint["class_names"], getattr(self._trainer, "datamodule", None))
        if self._trainer is None or self.trainer.state.fn != "fit":
            if self.class_counts is not None and not torch.equal(self.class_counts, checkpoint["class_counts"]):
                rank_zero_warn(
                    "the data's class_counts are not those that the checkpoint was trained with (another seed, ratio "
                    "or val_share?): many, medium and few are the checkpoint's"
                )
            self._learn_classes(checkpoint["class_counts"], checkpoint["class_names"])
        self.configure_model()
        check_weights(self, checkpoint)
        self._weights_missing = False

    def _learn_classes(self, class_counts: Tensor, class_names: list[str]) -> None:
        """Build what depends on the class counts."""
        hp = self.settings
        self.class_counts, self.class_names = class_counts, class_names
        self._tail = tail_mask(class_counts, hp.eta, hp.tail_classes)
        self.loss = self._loss(class_counts).to(self.device)
        self.val_accuracy, self.test_accuracy = (
            ClassGroupAccuracy(class_counts, hp.many, hp.few, class_names=class_names).to(self.device) for _ in range(2)
        )

    def _loss(self, class_counts: Tensor) -> nn.Module:
        args = self.settings.loss_args or {}
        try:
            loss, takes_counts = LOSSES[self.settings.loss]
            return loss(class_counts, **args) if takes_counts else loss(**args)
        except TypeError as error:
            raise SettingError(f"loss_args is {args}: {error}") from error

    def _watch_sampling(self, class_counts: Tensor) -> None:
        """ImbSAM is for tail rows that are rare in the batches too."""
        data: Any = getattr(self.trainer, "datamodule", None)
        sampler, shares = getattr(data, "sampler", "instance_balanced"), getattr(data, "drawn_shares", None)
        hp = self.settings
        if hp.method == "imbsam" and hp.tail_classes is None and shares is not None and sampler != "instance_balanced":
            drawn = 100 * float(shares[self._tail].sum())
            there = 100 * float(class_counts[self._tail].sum() / class_counts.sum())
            rank_zero_warn(
                f"data.sampler is {sampler}, while model.eta={hp.eta:g} goes by the class counts: tail classes are "
                f"{there:.1f} % of the training samples and {drawn:.1f} % of the drawn rows, all of which ImbSAM "
                "perturbs, at a cost to match; set model.tail_classes where that is meant"
            )

    def _start_epoch(self) -> None:
        super()._start_epoch()
        hp = self.settings
        if hp.class_balanced_beta is not None:
            weight = torch.where(self._tail, float(hp.tail_weight), 1.0).double()
            self.sam.class_weight = weight * self._balance if self.current_epoch >= hp.drw_start_epoch else weight

    def _tail_rows(self, targets: Tensor) -> float:
        targets = targets.cpu()
        return float((self._tail[targets] if targets.dim() == 1 else targets @ self._tail.to(targets)).sum())

    def _test_logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self(images)
        return (logits + self(images.flip(-1))) / 2 if self.settings.flip_tta else logits

    def _evaluate(self, logits: Tensor, targets: Tensor, loss: MeanMetric, accuracy: ClassGroupAccuracy) -> Tensor:
        loss.update(self.loss(logits, targets))
        accuracy.update(logits, targets)
        return logits

    def _log_metrics(self, stage: str, loss: MeanMetric, accuracy: ClassGroupAccuracy) -> None:
        """Sums over all samples of all ranks, however they are shared."""
        metrics = {"loss": loss.compute(), **accuracy.compute()}
        log_epoch(self, {f"{stage}/{name}": value for name, value in metrics.items()})
        loss.reset()
        accuracy.reset()
