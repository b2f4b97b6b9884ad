"""A long-tailed classifier, trained by a sharpness-aware method."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torchmetrics import MeanMetric

from imbsam import ImbSAM, SettingError
from imbsam.checks import check_whole_numbers
from imbsam.class_groups import tail_mask
from imbsam.class_measures import ClassMeasures
from imbsam.losses import LDAM, CrossEntropy
from imbsam.row_weights import check_labels
from lightning_modules.backbones.cifar_resnet import CifarResNet32
from lightning_modules.backbones.heads import CosineClassifier, HeadCallable, classifier
from lightning_modules.backbones.input_errors import FAILURES, input_error
from lightning_modules.backbones.library import LibraryNetwork
from lightning_modules.backbones.network import BackboneCallable
from lightning_modules.class_names import check_class_names
from lightning_modules.epoch_log import log_epoch
from lightning_modules.factories import called, describe, plain_settings, restore, takes
from lightning_modules.features.weights import check_features
from lightning_modules.fine_tuning import FineTunedModule
from lightning_modules.image_views import image_views
from lightning_modules.resuming.checkpoint_contents import check_model, check_weights, describe_classes

LossCallable = Callable[[], nn.Module] | Callable[[Tensor], nn.Module]
"""A loss's class, or a partial of one; it gets ``class_counts`` if it takes them."""


class LongTailedClassifier(FineTunedModule):
    """Classification with rare classes.

    The number of classes and the class counts come from the DataModule (``class_counts``, ``class_names``); batches
    are ``(images, targets)``. Logs ``train/loss_step``, ``train/loss_epoch`` (the mean over the epoch's samples),
    ``train/tail_rows`` (tail samples in the batch), ``lr``, and for validation and test the loss and the accuracies
    and measures of :class:`~imbsam.class_measures.ClassMeasures`. The training losses are weighted by the method's
    class weights; those of validation and test are not.

    Args:
        backbone: builds the network from the number of classes: a class or a partial of one (``CifarResNet32``,
            ``SmallCNN``, one of your own), ``Torchvision(name)``, ``Timm(name)``, ``OpenCLIP(name)``,
            ``HuggingFace(name)``, or a function such as ``torchvision.models.resnet50``.
        head: builds the last layer from the number of features and of classes, such as ``CosineClassifier``; default:
            the network's own.
        backbone_weights: weights to start the training from: a local file, which is a state_dict (.pt, .pth,
            .safetensors) or a checkpoint of imbsam; a folder of transformers; or ``pretrained`` or ``pretrained:TAG``,
            the library's own, from its cache or downloaded. The classifier's are skipped if they do not fit, are the
            library's, or are a checkpoint's for other classes. Not read by test and predict. ``pickle:FILE`` runs the
            code in the file.
        loss: the per-sample loss, a class or a partial of one, which gets ``class_counts`` if it takes them:
            CrossEntropy (the default), Focal, LDAM, LogitAdjusted (balanced softmax at tau 1), VectorScaling, or your
            own.
        accumulate_grad_batches: batches in one optimizer step, and in one perturbation.
        many: classes with more training samples than this are many-shot.
        few: classes with fewer training samples than this are few-shot.
        compile: compile the backbone with torch.compile.
        channels_last: keep images and weights in the channels-last format, faster on GPUs in 16 bits.
        flip_tta: average the logits of an image and of its mirror image, in test and predict but not in validation.
        crop_tta: enlarge images by so many pixels (24 in LIFT), and average the logits of five crops, the centre and
            the corners, in test and predict; with flip_tta, of their mirror images too.
        **training: ``tune``, ``head_init`` and ``gradient_checkpointing``, see
            :class:`~lightning_modules.fine_tuning.FineTunedModule`; ``sam``, ``optimizer``, ``lr_scheduler``,
            ``lr_interval``, ``gradient_clip_val`` and ``capture``, see
            :class:`~lightning_modules.base.SharpnessAwareModule`.
    """

    train_loss_name = "train/loss_epoch"

    multi_label = False
    """Whether a sample has any number of classes, and not one."""

    selection_metric = "val/all"
    """The metric that best.ckpt maximizes if there is a validation set."""

    def __init__(
        self,
        backbone: BackboneCallable | LibraryNetwork = CifarResNet32,
        head: HeadCallable | None = None,
        backbone_weights: str | None = None,
        loss: LossCallable | None = None,
        accumulate_grad_batches: int = 1,
        many: int = 100,
        few: int = 20,
        compile: bool = False,
        channels_last: bool = False,
        flip_tta: bool = False,
        crop_tta: int | None = None,
        **training: Any,
    ) -> None:
        super().__init__(**training)
        check_whole_numbers(accumulate_grad_batches=accumulate_grad_batches)
        if crop_tta is not None:
            check_whole_numbers(crop_tta=crop_tta)
        self.accumulate_grad_batches = accumulate_grad_batches
        self.backbone_factory: BackboneCallable = restore(backbone)
        self.head_factory: HeadCallable | None = restore(head)
        self.loss_factory: LossCallable = restore(loss) or CrossEntropy
        choices = ("backbone", "head", "head_init", "tune", "loss", "sam")
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", *choices])
        self.save_hyperparameters({name: describe(getattr(self, f"{name}_factory")) for name in choices})
        self.settings: Any = self.hparams
        self.class_counts: Tensor | None = None
        self.class_names: list[str] = []
        self.group_counts: Tensor | None = None
        # Lightning's own means are not in its checkpoints; without "disable" each update would wait for the GPU
        self.train_loss, self.val_loss, self.test_loss = (MeanMetric(nan_strategy="disable") for _ in range(3))
        self._tail: Tensor
        self._micro_batches: list[tuple[tuple[Tensor, Tensor], Tensor]] = []
        self._weights_of_checkpoint: tuple[Tensor | None, Tensor | None] | None = None

    @property
    def training_weights(self) -> tuple[Tensor | None, Tensor | None]:
        """What the training did to the class priors: loss weights (C,), and shares of the drawn samples (C,).

        As the training ended, also after a checkpoint is loaded; None for weights of 1, and for unknown shares.
        """
        if self._weights_of_checkpoint is not None and not self.fitting:
            return self._weights_of_checkpoint
        assert self.class_counts is not None
        sam = self.sam if hasattr(self, "sam") else self.sam_factory(self.backbone, self.class_counts)
        return sam.class_weight, getattr(self.data, "drawn_shares", None)

    def learn_from_data(self, stage: str) -> None:
        """Learn the classes from the DataModule; for prediction a checkpoint knows them."""
        self.hand_over_preprocessing()  # of a model that has been trained or loaded before
        counts, names = getattr(self.data, "class_counts", None), getattr(self.data, "class_names", None)
        if stage == "predict" and counts is None:
            return
        if counts is None or names is None:
            raise SettingError(
                f"the data ({type(self.data).__name__}) has no class_counts or no class_names: use a "
                "LightningDataModule with class_counts (training samples per class) and class_names"
            )
        if self.multi_label != hasattr(self.data, "label_counts"):
            several, one = "any number of classes", "one class"
            own, others, fix = (
                (several, one, "LongTailedClassifier") if self.multi_label else (one, several, "MultiLabelClassifier")
            )
            raise SettingError(
                f"model is {type(self).__name__}, for samples of {own}, and those of {type(self.data).__name__} have "
                f"{others} each: set model to {fix}, or choose other data"
            )
        if self.class_counts is not None:
            check_class_names(self.class_names, self.data, "the model")
        # a trained model keeps the counts, and so the groups, of its training
        if self.class_counts is None or stage == "fit":
            self.group_counts = getattr(self.data, "group_counts", None)
            self._learn_classes(torch.as_tensor(counts), list(names))

    def configure_model(self) -> None:
        """Build the backbone, once the number of classes is known."""
        if hasattr(self, "backbone") or self.class_counts is None:
            return
        self.backbone = self._create_backbone(len(self.class_counts))
        if self.settings.channels_last:
            self.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.settings.compile:
            self.backbone.compile()
        if self.sharded:
            assert self.device_mesh is not None
            mesh = self.device_mesh["data_parallel"]
            for child in self.backbone.children():
                if next(child.parameters(), None) is not None:
                    fully_shard(child, mesh=mesh)
            fully_shard(self.backbone, mesh=mesh)

    def make_sam(self) -> None:
        """The backbone is what is perturbed."""
        if self.fitting and hasattr(self, "backbone"):
            assert self.class_counts is not None
            self.sam = self.sam_factory(self.backbone, self.class_counts)

    def _create_backbone(self, num_classes: int) -> nn.Module:
        return self.build_network(num_classes, self.settings.backbone_weights)

    def on_fit_start(self) -> None:
        """Warn of a loss that does not suit the head, or of a sampling that does not suit ImbSAM."""
        super().on_fit_start()
        self._check_features()
        self._check_sampling()
        if isinstance(self.loss, LDAM):
            head = classifier(self.backbone)
            if not isinstance(head, CosineClassifier):
                rank_zero_warn(
                    "loss is LDAM and the head is not a cosine one: LDAM's margins are meant for scaled cosines; "
                    "unbounded logits can outgrow them; set head to CosineClassifier"
                )
            elif head.scale != self.loss.scale:
                rank_zero_warn(
                    f"LDAM's scale is {self.loss.scale:g} and the cosine head's {head.scale:g}, so that the margins "
                    f"are not max_margin of the cosine; set model.loss.scale to {head.scale:g}"
                )

    def on_train_start(self) -> None:
        """Drop the batches of a step that was interrupted."""
        super().on_train_start()
        self._micro_batches = []
        if self.on_features:
            self.train()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of images (B, channels, H, W), or of the network's features (B, d) where the data are these."""
        if self.on_features:
            from_features: Tensor = self.head(images)
            return from_features
        if self.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        try:
            logits: Tensor = self.backbone(images)
        except FAILURES as error:
            if (why := input_error(self.backbone, images, self.settings.backbone)) is None:
                raise
            raise why from error
        return logits

    def on_train_epoch_start(self) -> None:
        """Reset the epoch's mean loss."""
        super().on_train_epoch_start()
        self.train_loss.reset()

    @property
    def tail_settings(self) -> tuple[float, Any]:
        """The method's eta and tail_classes; the logs count tail samples by them, whatever the method."""
        settings = plain_settings(self.sam_factory)
        return settings.get("eta", 20), settings.get("tail_classes")

    @property
    def between_steps(self) -> bool:
        """Whether no micro-batch waits for the rest of its step: only then can a run be interrupted."""
        return not self._micro_batches

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check the targets."""
        if not self.trainer.predicting and self.class_counts is not None and batch[1].dim() == 1:
            check_labels(batch[1].cpu(), len(self.class_counts))
        return super().on_before_batch_transfer(batch, dataloader_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Collect `accumulate_grad_batches` batches, then one backward pass over them and one optimizer step.

        Returns:
            The loss, detached; None while batches are collected.
        """
        images, targets = batch
        on_host = self.targets_on_host(targets)
        if self.trainer.fit_loop._skip_backward:  # StochasticWeightAveraging updates BatchNorm's statistics
            with torch.no_grad():
                self.train_loss.update(self.loss(self(images), targets))
            return None
        self._micro_batches.append(((images, targets), on_host))
        if len(self._micro_batches) < self.accumulate_grad_batches and not self.trainer.is_last_batch:
            return None
        batches, all_targets = zip(*self._micro_batches, strict=True)
        self._micro_batches = []
        loss = self.backward_passes(self, self._losses_of, batches, all_targets)
        samples = sum(map(len, all_targets))
        self.train_loss.update(loss.expand(samples))
        if self.logs_this_batch:
            self.log("train/loss_step", loss, prog_bar=True, batch_size=samples)
            lr = self.trainer.optimizers[0].param_groups[0]["lr"]
            numbers = {"train/tail_rows": sum(map(self._count_tail, all_targets)), "lr": lr}
            # tensors on the host: Lightning would copy numbers to the GPU, and wait for it
            self.log_dict({k: torch.as_tensor(n, dtype=torch.float32) for k, n in numbers.items()}, batch_size=samples)
        self.step_optimizer()
        return loss  # for callbacks, such as the learning rate finder

    def on_train_epoch_end(self) -> None:
        """Log the mean loss."""
        loss = self.train_loss.compute()
        log_epoch(self, {"train/loss_epoch": loss}, prog_bar=True)
        self.check_loss(loss)
        super().on_train_epoch_end()

    def on_validation_start(self) -> None:
        """Refuse features of another network."""
        super().on_validation_start()
        if not self.fitting:
            self._check_features()

    def on_test_start(self) -> None:
        """Refuse features of another network."""
        self._check_features()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and group accuracies."""
        self._evaluate(self(batch[0]), batch[1], self.val_loss, self.val_accuracy)

    def on_validation_epoch_end(self) -> None:
        """Log the loss and the group accuracies."""
        self._log_metrics("val", self.val_loss, self.val_accuracy)

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss and group accuracies; returns the logits (B, C), for callbacks."""
        return self._evaluate(self.test_logits(batch[0]), batch[1], self.test_loss, self.test_accuracy)

    def on_test_epoch_end(self) -> None:
        """Log the loss and the group accuracies."""
        self._log_metrics("test", self.test_loss, self.test_accuracy)

    def on_predict_start(self) -> None:
        """Refuse to predict with an untrained model, which knows no classes."""
        if not hasattr(self, "backbone"):
            raise SettingError("ckpt_path is null: predict takes the checkpoint of a trained model")
        self._check_features()

    def test_views(self, images: Tensor) -> list[Tensor]:
        """The views of images (B, channels, H, W) whose logits a test averages."""
        return image_views(images, self.settings.flip_tta, self.settings.crop_tta)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class probabilities (B, C)."""
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        return self.probabilities(self.test_logits(images))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Class probabilities (B, C), float32, of logits (B, C)."""
        return logits.float().softmax(dim=1)

    def prediction_table(self, predictions: Sequence[Tensor]) -> tuple[list[str], Iterable[Sequence[Any]]]:
        """Header and rows of the predictions file: the predicted class, and the probability of every class."""
        probabilities = torch.cat(list(predictions))
        classes = probabilities.argmax(dim=1).tolist()
        return ["predicted", *self.class_names], (
            [self.class_names[c], *(f"{p:.6g}" for p in row.tolist())]
            for c, row in zip(classes, probabilities, strict=True)
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the classes."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["class_counts"], checkpoint["class_names"] = self.class_counts, self.class_names
        checkpoint["group_counts"] = self.group_counts
        checkpoint["training_weights"] = self.training_weights
        checkpoint.update(describe_classes(self))
        self.save_pretrained(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the classes that the model was trained on, except in a training, which has those of the data.

        Raises:
            SettingError: the checkpoint is of another model, or the classes of the data have other names.
        """
        super().on_load_checkpoint(checkpoint)
        check_model(self, checkpoint)
        check_class_names(checkpoint["class_names"], self.data)
        self._weights_of_checkpoint = None if self.fitting else checkpoint.get("training_weights")
        if not self.fitting:
            if self.class_counts is not None and not torch.equal(self.class_counts, checkpoint["class_counts"]):
                rank_zero_warn(
                    "the data's class_counts are not those that the checkpoint was trained with (another seed, ratio "
                    "or val_share?): many, medium and few are the checkpoint's"
                )
            if self.group_counts is None:
                self.group_counts = checkpoint.get("group_counts")
            self._learn_classes(checkpoint["class_counts"], checkpoint["class_names"])
        if not hasattr(self, "backbone"):
            self.configure_model()
            self.make_sam()
        self.load_pretrained(checkpoint)
        check_weights(self, checkpoint)

    def _learn_classes(self, class_counts: Tensor, class_names: list[str]) -> None:
        """Build what depends on the class counts."""
        hp = self.settings
        self.class_counts, self.class_names = class_counts, class_names
        self._tail = tail_mask(class_counts, *self.tail_settings)
        self.loss = self._loss(class_counts).to(self.device)
        self.val_accuracy, self.test_accuracy = (
            ClassMeasures(class_counts, hp.many, hp.few, class_names, group_counts=self.group_counts).to(self.device)
            for _ in range(2)
        )

    def _loss(self, class_counts: Tensor) -> nn.Module:
        try:
            takes_counts = takes(self.loss_factory, "class_counts")
            return self.loss_factory(class_counts=class_counts) if takes_counts else self.loss_factory()  # type: ignore[call-arg]
        except TypeError as error:
            raise SettingError(f"loss is {getattr(called(self.loss_factory), '__name__', '')}: {error}") from error

    def _check_sampling(self) -> None:
        """ImbSAM expects tail samples that are rare in the batches too."""
        sampling, shares = getattr(self.data, "sampling", None), getattr(self.data, "drawn_shares", None)
        eta, tail_classes = self.tail_settings
        if not isinstance(self.sam, ImbSAM) or tail_classes is not None or shares is None:
            return
        if sampling not in (None, "instance_balanced"):
            assert self.class_counts is not None
            drawn = 100 * float(shares[self._tail].sum())
            present = 100 * float(self.class_counts[self._tail].sum() / self.class_counts.sum())
            rank_zero_warn(
                f"data.sampling is {sampling}, while model.sam.eta={eta:g} goes by the class counts: tail classes are "
                f"{present:.1f} % of the training samples and {drawn:.1f} % of the drawn samples, all of which ImbSAM "
                "perturbs, at a matching cost; set model.sam.tail_classes if that is intended"
            )

    def _check_features(self) -> None:
        if self.on_features:
            check_features(self, self.data)

    def _losses_of(self, images: Tensor, targets: Tensor) -> Any:
        return self.loss(self(images), targets)

    def _count_tail(self, targets: Tensor) -> Tensor:
        targets = targets.cpu()
        return (self._tail[targets] if targets.dim() == 1 else targets @ self._tail.to(targets)).sum()

    def test_logits(self, images: Tensor) -> Tensor:
        """Logits (B, C) of images (B, channels, H, W), averaged over their :meth:`test_views`."""
        return torch.stack([self(view) for view in self.test_views(images)]).mean(dim=0)

    def _evaluate(self, logits: Tensor, targets: Tensor, loss: MeanMetric, accuracy: ClassMeasures) -> Tensor:
        loss.update(self.loss(logits, targets))
        accuracy.update(logits, targets)
        return logits

    def _log_metrics(self, stage: str, loss: MeanMetric, accuracy: ClassMeasures) -> None:
        """Log the metrics of all samples of all ranks."""
        metrics = {"loss": loss.compute(), **accuracy.compute()}
        log_epoch(self, {f"{stage}/{name}": value for name, value in metrics.items()})
        loss.reset()
        accuracy.reset()
