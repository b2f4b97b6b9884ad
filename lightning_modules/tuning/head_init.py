"""What the classifier starts from, other than random weights."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from imbsam.errors import SettingError
from lightning_modules.backbones.heads import classifier
from lightning_modules.backbones.library import LibraryNetwork
from lightning_modules.tuning.prompts import prompts_of, readable_names

PHOTO = ["a photo of a {}."]
"""CLIP's template of a prompt."""


@dataclass(frozen=True)
class HeadInit(ABC):
    """A choice of the class weights that a training starts from: directions of length 1; a bias starts as 0.

    Source:
        Shi et al., *Long-Tail Learning with Foundation Model: Heavy Fine-Tuning Hurts*, ICML 2024, arXiv 2309.10019,
        section 4.2.
    """

    @torch.no_grad()
    def apply(self, model: Any) -> None:
        """Set the weights of a model's classifier, the same ones on every rank.

        Args:
            model: a classifier with a Trainer, whose layers are on their device.

        Raises:
            SettingError: they cannot be computed, or do not fit the classifier.
        """
        head = classifier(model.backbone)
        weights = F.normalize(self.directions(model), dim=1)
        if not isinstance(getattr(head, "weight", None), Tensor) or head.weight.shape != weights.shape:
            raise SettingError(
                f"head_init is {type(self).__name__}, whose weights are {tuple(weights.shape)}, and the head is "
                f"{head}: choose a linear head or CosineClassifier"
            )
        head.weight.copy_(model.trainer.strategy.broadcast(weights))
        if getattr(head, "bias", None) is not None:
            head.bias.zero_()

    @abstractmethod
    def directions(self, model: Any) -> Tensor:
        """A vector for each class, float32 (C, D), in the space of the features."""


@dataclass(frozen=True)
class ClassMeans(HeadInit):
    """Start from the mean feature of every class's training samples, without augmentation."""

    def directions(self, model: Any) -> Tensor:
        """One pass over the training samples."""
        if model.multi_label:
            raise SettingError(
                "head_init is ClassMeans, and samples of MultiLabelClassifier have any number of classes, so that the "
                "means of classes that occur together are alike: leave it out"
            )
        loader = getattr(model.data, "train_eval_dataloader", None)
        if loader is None:
            raise SettingError(
                f"head_init is ClassMeans, and {type(model.data).__name__} has no train_eval_dataloader, the training "
                "samples without augmentation"
            )
        seen: list[Tensor] = []
        head: nn.Module = classifier(model.backbone)
        hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float()))
        sums: Tensor | None = None
        counts = torch.zeros(len(model.class_counts), device=model.device)
        modes = {module: module.training for module in model.backbone.modules()}
        try:
            model.backbone.eval()
            for batch in loader():
                images, labels = batch[0].to(model.device), batch[1].to(model.device)
                with model.trainer.precision_plugin.forward_context():
                    model(images)
                features = seen.pop()
                if sums is None:
                    sums = features.new_zeros(len(counts), features.shape[1])
                sums.index_add_(0, labels, features)
                counts += torch.bincount(labels, minlength=len(counts))
        finally:
            hook.remove()
            for module, training in modes.items():
                module.training = training
        assert sums is not None
        return sums / counts.clamp(min=1)[:, None]


@dataclass(frozen=True)
class TextFeatures(HeadInit):
    """Start from CLIP's text features of the class names, for OpenCLIP and a CLIP of HuggingFace.

    Args:
        templates: prompts with ``{}`` in the place of the class name; the features of several are averaged.
        names: a text file with a name to read for each class, such as the classnames.txt of LIFT's repository: lines
            of a class name of the data, a space or tab, and the name; or the names alone in the order of the classes.
            Default: the data's, with spaces for ``_``, ``-`` and ``/``; WordNet's ids (n01440764) are refused.

    Source:
        Radford et al., ICML 2021, arXiv 2103.00020, section 3.1.4.
    """

    templates: list[str] = field(default_factory=lambda: list(PHOTO))
    names: str | None = None

    def __post_init__(self) -> None:
        if not self.templates or not all("{}" in template for template in self.templates):
            raise SettingError(f'templates is {self.templates}: give texts with {{}}, such as "a photo of a {{}}."')

    def directions(self, model: Any) -> Tensor:
        """The mean over the templates of features of length 1."""
        backbone = model.backbone_factory
        if not isinstance(backbone, LibraryNetwork):
            raise SettingError("head_init is TextFeatures, and the backbone has no text tower: choose OpenCLIP")
        prompts = prompts_of(readable_names(model.class_names, self.names), self.templates)
        rank_zero_info(f'head_init: {len(prompts)} prompts, from "{prompts[0]}" to "{prompts[-1]}"')
        features = backbone.text_features(prompts, model.settings.backbone_weights)
        means = F.normalize(features, dim=1).view(len(model.class_names), len(self.templates), -1).mean(dim=1)
        return means.to(model.device)
