"""The second stage of two-stage training: another classifier on the features of the first."""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from imbsam import SettingError
from imbsam.checks import check_choice, check_numbers
from imbsam.metrics import ClassGroupAccuracy
from lightning_modules.backbones.cifar_resnet import CifarResNet32
from lightning_modules.backbones.heads import CosineClassifier, classifier_name
from lightning_modules.backbones.network import create_network
from lightning_modules.callbacks.max_norm import MaxNorm
from lightning_modules.class_names import check_class_names
from lightning_modules.classifier import LongTailedClassifier
from lightning_modules.factories import restore
from lightning_modules.fine_tuning import complete
from lightning_modules.validation_part import see_validation_part, validation_loader
from lightning_modules.weight_files import read_file

Stage = Literal["crt", "lws", "tau_norm", "weight_balancing"]

TAUS = [tenth / 10 for tenth in range(21)]
"""The exponents that tau_norm tries, those of the published code."""


class SecondStageClassifier(LongTailedClassifier):
    r"""Classifier learning on a frozen (or fine-tuned) backbone from the checkpoint of a first stage.

    Backbone and head come from the checkpoint. What is trained, or changed, depends on the stage:

    * ``crt``, classifier re-training (Kang et al.): the classifier is re-initialised and trained, with
      class-balanced sampling. Published for ImageNet-LT: 10 epochs, learning rate 0.2 at batch size 512, momentum
      0.9, weight decay 5e-4, cosine.
    * ``lws``, learnable weight scaling (Kang et al.): one factor f_c for each class on the frozen classifier,
      :math:`z_c = f_c (w_c^\top x + b_c)`, starting from 1, with class-balanced sampling. Published for ImageNet-LT:
      as crt, 5 epochs.
    * ``tau_norm``, tau-normalisation (Kang et al., equation 4): no training, :math:`w_c \leftarrow
      w_c / \|w_c\|^\tau`, without bias. `tau` is the given one, or the best of 0, 0.1, ..., 2 by ``val/all``. ``fit``
      applies it, writes last.ckpt, and tests, as for the others.
    * ``weight_balancing`` (Alshammari et al.): the first stage's classifier is fine-tuned with the class-balanced loss
      (:class:`~lightning_modules.callbacks.schedules.DeferredReweighting`), weight decay, and
      :class:`~lightning_modules.callbacks.max_norm.MaxNorm`. The first stage is plain
      cross-entropy with tuned weight decay. Published code for CIFAR-100-LT 100: both stages SGD 0.01, momentum 0.9,
      cosine to 0, batch 64; first stage 320 epochs, weight decay 5e-3; second stage weight and bias of the last
      layer, 10 epochs, weight decay 0.1, beta 0.9999, `max_norm_threshold` 0.1. The published code differs in three
      ways: its loss is a binary cross-entropy of the softmax outputs, averaged over samples *and* classes, so about C
      times smaller than a cross-entropy (to match it, divide the learning rate and multiply the weight decay by
      C = 100); it projects once an epoch; BatchNorm's statistics keep changing.

    The frozen backbone is in evaluation mode (BatchNorm's statistics stay) and gets no gradients, so the samples of a
    batch do not see each other, and ImbSAM and SAM perturb only the trained part. A run that has a checkpoint of its
    own no longer needs the first stage's.

    Args:
        checkpoint: the first stage's: a checkpoint of LongTailedClassifier, or of this class with crt or
            weight_balancing. Its class counts are compared with the data's.
        stage: crt, lws, tau_norm or weight_balancing.
        freeze_backbone: train only the classifier; false fine-tunes the backbone too.
        tau: exponent of tau_norm; null chooses it on the validation set, never on the test set.
        max_norm_threshold: radius of weight_balancing's MaxNorm, from the shortest (0) to the longest (1) class weight
            of the first stage.
        **settings: the settings of LongTailedClassifier except backbone, head, backbone_weights, tune and head_init.

    Raises:
        SettingError: a setting cannot work, or the checkpoint does not suit the stage or the data.

    Source:
        Kang et al., *Decoupling Representation and Classifier for Long-Tailed Recognition*, ICLR 2020, arXiv
        1910.09217, and its code (facebookresearch/classifier-balancing, ``config/ImageNet_LT``, ``tau_norm.py``).
        Alshammari et al., *Long-Tailed Recognition via Weight Balancing*, CVPR 2022, arXiv 2203.14197, and its code
        (ShadeAlsha/LTR-weight-balancing, ``demo1`` and ``demo2``).
    """

    def __init__(
        self,
        checkpoint: str,
        stage: Stage = "crt",
        freeze_backbone: bool = True,
        tau: float | None = None,
        max_norm_threshold: float = 0.1,
        **settings: Any,
    ) -> None:
        # backbone and head follow from the checkpoint
        super().__init__(
            backbone=CifarResNet32, head=None, backbone_weights=None, tune=None, head_init=None, **settings
        )
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", "sam", "loss"])
        for name in ("backbone", "head", "backbone_weights", "tune", "head_init"):
            self.hparams.pop(name, None)
        check_choice(Stage, stage=stage)
        if tau is not None:
            check_numbers(hint="null chooses it on the validation set", tau=tau)
            if stage != "tau_norm":
                raise SettingError(f"tau is {tau} and stage is {stage}: tau belongs to tau_norm; leave it out")
        self._max_norm = MaxNorm(max_norm_threshold)
        self.architecture: dict[str, Any] | None = None
        self.tau_applied: float | None = None

    def learn_from_data(self, stage: str) -> None:
        """Learn the classes, and check whether the data suit the stage."""
        super().learn_from_data(stage)
        hp = self.settings
        if stage != "fit":
            return
        if hp.stage == "tau_norm" and self.trainer.world_size > 1:
            raise SettingError(
                f"stage is tau_norm, which does not train, on {self.trainer.world_size} devices: set "
                "trainer.devices to 1"
            )
        sampling = getattr(self.data, "sampling", "class_balanced")
        if hp.stage in ("crt", "lws") and sampling != "class_balanced":
            rank_zero_warn(
                f"stage is {hp.stage} and data.sampling is {sampling}: the paper's classifier is trained with "
                "class-balanced sampling; set data.sampling to class_balanced"
            )

    def configure_model(self) -> None:
        """Build the backbone: that of our own checkpoint, or else the first stage's, with its weights."""
        if hasattr(self, "backbone") or self.class_counts is None:
            return
        self._first_weights = None
        if self.architecture is None:
            if not self.sharded and not (self.fitting and Path(self.settings.checkpoint).exists()):
                return  # our own checkpoint is loaded later, or configure_optimizers raises
            self._first_weights = self._read_first_stage()
        assert self.architecture is not None
        self.backbone_factory = restore(self.architecture["backbone"])
        self.head_factory = restore(self.architecture["head"])
        super().configure_model()
        del self._first_weights

    def configure_callbacks(self) -> list[Callback]:
        """MaxNorm for weight_balancing."""
        own = [self._max_norm] if self.settings.stage == "weight_balancing" and self.trainer.training else []
        return [*super().configure_callbacks(), *own]

    def configure_optimizers(self) -> Any:
        """Refuse to train without the first stage."""
        if not hasattr(self, "backbone"):
            raise SettingError(f"checkpoint is {self.settings.checkpoint}: no such file; name the first stage's")
        return super().configure_optimizers()

    def train(self, mode: bool = True) -> "SecondStageClassifier":
        """Training mode, except for a frozen backbone."""
        super().train(mode)
        if mode and hasattr(self, "backbone") and self._frozen:
            self.backbone.eval()
            self.head.train()
        return self

    def on_train_start(self) -> None:
        """Freeze BatchNorm's statistics; all of tau_norm happens here."""
        super().on_train_start()
        self.train()
        if self.settings.stage == "tau_norm":
            if self.tau_applied is None:
                self._normalize()
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what the first stage's checkpoint said."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["architecture"], checkpoint["tau"] = self.architecture, self.tau_applied

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the checkpoint's network, without the first stage's checkpoint."""
        if "architecture" not in checkpoint:
            raise SettingError(
                "ckpt_path is a checkpoint of a first stage: name it with model.checkpoint, without ckpt_path"
            )
        self.architecture, self.tau_applied = checkpoint["architecture"], checkpoint["tau"]
        super().on_load_checkpoint(checkpoint)

    @property
    def _frozen(self) -> bool:
        return bool(self.settings.freeze_backbone) or self.settings.stage == "tau_norm"

    @property
    def head_name(self) -> str:
        """The name of the classifier, scaled or not, in the network."""
        return self._head_name

    def _read_first_stage(self) -> dict[str, Tensor]:
        """Read the first stage's checkpoint: set the architecture, return the backbone's weights."""
        path = self.settings.checkpoint
        first = read_file(path, "checkpoint")
        if not isinstance(first, dict) or not {"class_counts", "class_names", "hyper_parameters"} <= first.keys():
            raise SettingError(f"checkpoint is {path}: it is not one of LongTailedClassifier; name a run's last.ckpt")
        settings = first.get("architecture") or first["hyper_parameters"]
        if settings.get("stage") in ("lws", "tau_norm"):
            raise SettingError(
                f"checkpoint is {path}: it is of stage {settings['stage']}, whose classifier is not a plain one any "
                "more; name the first stage's"
            )
        assert self.class_counts is not None
        check_class_names(first["class_names"], self.data, f"the first stage ({path})")
        if not torch.equal(first["class_counts"], self.class_counts):
            rank_zero_warn(
                "the data's class_counts are not those of the first stage (another seed, ratio or val_share?): it may "
                "have been trained on what is now the validation set"
            )
        complete(first)
        self.preprocessing = first.get("preprocessing") or {}
        choices = {"backbone": settings["backbone"], "head": settings["head"], "tune": settings.get("tune")}
        self.architecture = choices | {"stage": self.settings.stage}
        state: dict[str, Tensor] = first["state_dict"]
        return {n.removeprefix("backbone."): tensor for n, tensor in state.items() if n.startswith("backbone.")}

    def _create_backbone(self, num_classes: int) -> nn.Module:
        hp = self.settings
        network = create_network(self.backbone_factory, num_classes, self.head_factory)
        self.hand_over_preprocessing()
        assert self.architecture is not None
        if (tune := restore(self.architecture.get("tune"))) is not None:
            tune.apply(network)  # its adapters
        self._head_name = classifier_name(network)
        if self._first_weights is not None:
            network.load_state_dict(self._first_weights)
        head: Any = network.get_submodule(self._head_name)
        if hp.stage in ("tau_norm", "weight_balancing") and isinstance(head, CosineClassifier):
            raise SettingError(
                f"stage is {hp.stage} and the first stage's head is cosine, in which the lengths of the class weights "
                "do not count; use crt or lws"
            )
        network.requires_grad_(not self._frozen)
        head.requires_grad_(hp.stage in ("crt", "weight_balancing"))
        if hp.stage == "crt" and self._first_weights is not None:
            head.reset_parameters()
        if hp.stage == "lws":
            network.set_submodule(self._head_name, ScaledClassifier(head))
        return network

    @torch.no_grad()
    def _normalize(self) -> None:
        """Choose tau and apply it."""
        head = self.head
        if head.bias is not None:
            head.bias.zero_()
        self.tau_applied = self.settings.tau if self.settings.tau is not None else self._choose_tau()
        head.weight.div_(head.weight.norm(dim=1, keepdim=True) ** self.tau_applied)
        for logger in self.trainer.loggers:
            logger.log_metrics({"tau": self.tau_applied}, step=0)

    def _choose_tau(self) -> float:
        """The tau with the best val/all, the smallest in a tie."""
        if validation_loader(self.trainer) is None:
            raise SettingError("tau is null and there is no validation set to choose it on: set tau or data.val_share")
        hp: Any = self.settings
        assert self.class_counts is not None
        accuracies = [ClassGroupAccuracy(self.class_counts, hp.many, hp.few).to(self.device) for _ in TAUS]
        norms = self.head.weight.norm(dim=1)

        def see(batch: Any, index: int) -> None:
            logits = self(batch[0])
            for tau, accuracy in zip(TAUS, accuracies, strict=True):
                accuracy.update(logits / norms**tau, batch[1])

        see_validation_part(self.trainer, self, see)
        shares = [float(accuracy.compute()["all"]) for accuracy in accuracies]
        best = shares.index(max(shares))
        rank_zero_info(
            f"tau_norm: tau {TAUS[best]:.1f} is best on the validation set: val/all {100 * shares[best]:.1f} % "
            f"({100 * shares[0]:.1f} % at tau 0)"
        )
        return TAUS[best]


class ScaledClassifier(nn.Module):
    """A frozen classifier with a learnable scale for each class (Kang et al., ICLR 2020, section 4.3).

    Args:
        classifier: a layer to C logits, with ``out_features``.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(int(classifier.out_features)))  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        """Return logits, shape (..., C)."""
        logits: Tensor = self.scale * self.classifier(features)
        return logits
