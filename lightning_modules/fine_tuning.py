"""Training that starts from a pretrained network: its weights, what of it is trained, its image size."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from imbsam import SettingError
from lightning_modules.backbones.activation_checkpoints import checkpoint_blocks
from lightning_modules.backbones.heads import HeadCallable, classifier_name
from lightning_modules.backbones.library import LibraryNetwork, MissingWeights
from lightning_modules.backbones.network import BackboneCallable, create_network
from lightning_modules.backbones.weights import PretrainedWeights, copy_weights, read_weights
from lightning_modules.base import SharpnessAwareModule
from lightning_modules.factories import restore
from lightning_modules.tuning import frozen_weights
from lightning_modules.tuning.choice import Tuning
from lightning_modules.tuning.head_init import HeadInit
from lightning_modules.weight_files import FROZEN_WEIGHTS


class FineTunedModule(SharpnessAwareModule):
    """A module whose ``backbone`` may be pretrained.

    Args:
        tune: what is trained of the backbone: ``All()``, ``HeadOnly()``, ``Norm()``, ``Bias()``, ``LastBlocks(n)``,
            ``LoRA(rank)``, ``AdaptFormer(bottleneck)``, with the learning rates of backbone and head; default: all of
            it, with one learning rate.
        head_init: what the classifier starts from: ``ClassMeans()``, ``TextFeatures(templates, names)``; default:
            random weights, or those in ``backbone_weights`` if they fit and are for the same classes.
        gradient_checkpointing: keep no activations inside the backbone's blocks and compute them again in the backward
            pass: less memory, about a third more time.
        **training: see :class:`~lightning_modules.base.SharpnessAwareModule`.
    """

    backbone: nn.Module
    backbone_factory: BackboneCallable
    head_factory: HeadCallable | None
    settings: Any
    class_names: list[str]

    def __init__(
        self,
        tune: Tuning | None = None,
        head_init: HeadInit | None = None,
        gradient_checkpointing: bool = False,
        **training: Any,
    ) -> None:
        super().__init__(**training)
        self.tune_factory: Tuning | None = restore(tune)
        self.head_init_factory: HeadInit | None = restore(head_init)
        self.gradient_checkpointing = gradient_checkpointing
        self.preprocessing: dict[str, Any] = {}
        """Image size, mean and std that the weights were trained on, as far as they are known."""
        self._missing: MissingWeights | None = None
        self._resumed = False
        self._left_out: tuple[list[str], str] | None = None

    @property
    def sharded(self) -> bool:
        """Whether the weights are sharded over the processes (FSDP2)."""
        return self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy)

    @property
    def on_features(self) -> bool:
        """Whether the data are features of the network, so that its classifier alone is trained and applied."""
        return bool(getattr(self.data, "holds_features", False))

    @property
    def head_name(self) -> str:
        """The name of the classifier in the network."""
        return classifier_name(self.backbone)

    @property
    def head(self) -> Any:
        """The classifier."""
        return self.backbone.get_submodule(self.head_name)

    def build_network(self, num_classes: int, weights: str | None) -> nn.Module:
        """Build the network, load its pretrained weights for a training, and freeze what is not trained.

        Args:
            num_classes: number of logits.
            weights: where they are; None for random ones.
        """
        network, pretrained = create_network(self.backbone_factory, num_classes, self.head_factory), None
        if weights is not None and self.fitting:
            # a run that resumes does not need the weights, which may be gone; it loads its checkpoint later
            try:
                pretrained = read_weights(weights, self.backbone_factory)
            except MissingWeights as error:
                self._missing = error
        start(network, pretrained, self.tune_factory, self.class_names)
        if pretrained is not None:
            self.preprocessing = pretrained.preprocessing()
            self._set_preprocessing(self.data)
        if self.tune_factory is not None:
            if not self.tune_factory.save_frozen and weights is None:
                raise SettingError(
                    "tune.save_frozen is false and backbone_weights is null: nobody could find the frozen weights again"
                )
            if self.sharded and not self.tune_factory.save_frozen:
                raise SettingError(
                    "tune.save_frozen is false, and the strategy saves the shards of all weights: set it to true"
                )
            self.tune_factory.set_modes(network)
            if self.fitting:
                self.tune_factory.cast_frozen(network, str(self.trainer.precision))
        if self.on_features:
            head = f"{classifier_name(network)}."
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and name.startswith(head))
        if self.sharded and self.head_init_factory is not None:
            raise SettingError("head_init is set, and the strategy shards the weights: leave it out, or train with ddp")
        if self.gradient_checkpointing:
            checkpoint_blocks(network)
        return network

    def hand_over_preprocessing(self, data: Any = None) -> None:
        """Let the data use the model's image size, mean and std, unless they do or their settings say otherwise.

        Args:
            data: a DataModule; default: the Trainer's.
        """
        data = self.data if data is None else data
        if getattr(data, "used_preprocessing", None) != self.preprocessing:
            self._set_preprocessing(data)

    def _set_preprocessing(self, data: Any) -> None:
        if self.preprocessing and data is not None and not getattr(data, "holds_features", False):
            if (use := getattr(data, "use_preprocessing", None)) is not None:
                use(**self.preprocessing)
            else:
                rank_zero_info(
                    f"{type(data).__name__} does not take the backbone's preprocessing: {self.preprocessing}"
                )

    def train(self, mode: bool = True) -> "FineTunedModule":
        """Training mode, except for what is frozen."""
        super().train(mode)
        if mode and hasattr(self, "backbone"):
            if self.on_features:
                self.backbone.eval()
                self.head.train()
            elif self.tune_factory is not None:
                self.tune_factory.set_modes(self.backbone)
        return self

    def refuse_missing_weights(self) -> None:
        """Raise a :class:`SettingError` if ``backbone_weights`` are not there and no checkpoint has replaced them."""
        if self._missing is not None and not self._resumed:
            raise self._missing

    def on_fit_start(self) -> None:
        """Refuse to train without the weights, set the classifier's, and learn what the images are."""
        self.refuse_missing_weights()
        super().on_fit_start()
        self._warn_of_random_weights()
        self.preprocessing = getattr(self.data, "used_preprocessing", None) or self.preprocessing
        if self.head_init_factory is not None and not self._resumed:
            self.head_init_factory.apply(self)

    def _warn_of_random_weights(self) -> None:
        if self.tune_factory is None or self._resumed or self.settings.get("backbone_weights") is not None:
            return
        frozen = any(not parameter.requires_grad for parameter in self.backbone.parameters())
        if frozen and isinstance(self.backbone_factory, LibraryNetwork):  # a network of the user's may load its own
            rank_zero_warn(
                f"tune is {type(self.tune_factory).__name__} and backbone_weights is null: the frozen weights are "
                "random; set model.backbone_weights, to pretrained for the library's own"
            )

    def parameter_groups(self) -> Any:
        """The trained parameters by learning rate."""
        return self.parameters() if self.tune_factory is None else self.tune_factory.parameter_groups(self.backbone)

    def save_pretrained(self, checkpoint: dict[str, Any]) -> None:
        """Save the preprocessing, and leave the frozen weights out if that is wanted."""
        checkpoint["preprocessing"] = self.preprocessing
        tune = self.tune_factory
        if tune is not None and not tune.save_frozen:
            if self._left_out is None:  # they never change
                names = tune.frozen_tensors(self.backbone)
                self._left_out = names, frozen_weights.frozen_digest(self.backbone, names)
            frozen_weights.leave_out(checkpoint, *self._left_out)

    def load_pretrained(self, checkpoint: dict[str, Any]) -> None:
        """Take over the preprocessing, and put the frozen weights back into a checkpoint that has none.

        Args:
            checkpoint: Lightning's, changed in place.

        Raises:
            SettingError: the frozen weights are not there any more, or are others.
        """
        self._resumed = True
        self.preprocessing = checkpoint.get("preprocessing") or {}
        self.hand_over_preprocessing()
        complete(checkpoint, getattr(self.settings, "backbone_weights", None))


def start(
    network: nn.Module,
    pretrained: PretrainedWeights | None,
    tune: Tuning | None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Load the weights that a training starts from, and freeze what it does not train.

    Args:
        network: changed in place.
        pretrained: its weights; with those of adapters, if another training has added them by the same ``tune``.
        tune: what is trained; None for everything.
        class_names: see :func:`~lightning_modules.backbones.weights.copy_weights`.

    Raises:
        SettingError: the weights do not fit, or the network has nothing that ``tune`` could train.
    """
    adapted = pretrained is not None and pretrained.adapted and tune is not None
    if tune is not None and adapted:
        tune.apply(network)
    if pretrained is not None:
        copy_weights(network, pretrained, class_names)
    if tune is not None and not adapted:
        tune.apply(network)


def complete(checkpoint: dict[str, Any], weights: str | None = None) -> None:
    """Put the frozen weights back into a checkpoint that was saved without them.

    Args:
        checkpoint: of a LongTailedClassifier, changed in place; one that has its frozen weights stays as it is.
        weights: where they are; default: where they were for the training.

    Raises:
        SettingError: they are not there any more, or are others.
    """
    if FROZEN_WEIGHTS not in checkpoint:
        return
    settings = checkpoint["hyper_parameters"]
    backbone, head, tune = (restore(settings[name]) for name in ("backbone", "head", "tune"))
    source = weights or settings["backbone_weights"]
    with torch.random.fork_rng(devices=[]):
        network = create_network(backbone, len(checkpoint["class_counts"]), head)
        start(network, read_weights(source, backbone), tune)
    frozen_weights.put_back(checkpoint, network, tune.frozen_tensors(network), source)
