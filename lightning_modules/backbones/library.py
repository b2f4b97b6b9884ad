"""Networks of torchvision and timm, by their names there."""

import difflib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torchvision
from torch import nn

from imbsam.errors import SettingError

__all__ = ["LibraryNetwork", "Timm", "Torchvision"]

# in training these return their auxiliary classifiers' logits as well
_WITH_AUXILIARY_LOGITS = ("googlenet", "inception_v3")


@dataclass(frozen=True)
class LibraryNetwork(ABC):
    """A choice of a network, built with random weights once the number of classes is known.

    Args:
        name: the network's name in the library.
        settings: further settings of the network.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(self, num_classes: int) -> nn.Module:
        """Build it.

        Args:
            num_classes: number of logits.

        Returns:
            a module from images (N, channels, H, W) to logits (N, num_classes).

        Raises:
            SettingError: the name is unknown (the message suggests similar ones), or the network refuses a setting.
        """
        names = self._names()
        if self.name not in names:
            similar = difflib.get_close_matches(str(self.name).lower(), names, n=3, cutoff=0.4)
            fix = f"did you mean {', '.join(similar)}?" if similar else "see the library's list of models"
            raise SettingError(
                f"backbone.name is {self.name}: {type(self).__name__.lower()} has no such network; {fix}"
            )
        try:
            return self._build(num_classes)
        except SettingError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            settings = ", ".join(f"{key}={value!r}" for key, value in self.settings.items())
            reason = " ".join(str(error).split())
            raise SettingError(f"backbone.settings of {self.name} is {settings or 'empty'}: {reason}") from error

    @abstractmethod
    def _names(self) -> list[str]:
        """The names of the library's networks."""

    @abstractmethod
    def _build(self, num_classes: int) -> nn.Module:
        """Build the network of this name."""


class Torchvision(LibraryNetwork):
    """A classification network of torchvision, such as resnet50 or vit_b_16.

    Example:
        >>> type(Torchvision("resnet18")(num_classes=5)).__name__
        'ResNet'
    """

    def _names(self) -> list[str]:
        names: list[str] = torchvision.models.list_models(module=torchvision.models)
        return names

    def _build(self, num_classes: int) -> nn.Module:
        if self.settings.get("weights") is not None:
            raise SettingError(
                f"backbone.settings.weights is {self.settings['weights']}, which has other classes: leave it out and "
                "set model.backbone_weights to a local file"
            )
        settings = {**self.settings, "weights": None}
        if self.name in _WITH_AUXILIARY_LOGITS:
            if settings.get("aux_logits"):
                raise SettingError(
                    "backbone.settings.aux_logits is true, which returns more than logits in training: leave it out"
                )
            settings = {"init_weights": True, **settings, "aux_logits": False}  # torchvision warns of its default
        network: nn.Module = torchvision.models.get_model(self.name, num_classes=num_classes, **settings)
        return network


class Timm(LibraryNetwork):
    """A network of timm (the extra ``timm``), such as resnet50 or vit_tiny_patch16_224.

    Example:
        >>> type(Timm("resnet18", {"in_chans": 1})(num_classes=5)).__name__
        'ResNet'
    """

    def _names(self) -> list[str]:
        try:
            import timm
        except ImportError as error:
            raise SettingError("backbone is Timm, but timm is not installed: pip install timm") from error
        tagged = [self.name] if timm.is_model(self.name) else []  # such as resnet18.a1_in1k
        return [*timm.list_models(), *tagged]

    def _build(self, num_classes: int) -> nn.Module:
        import timm

        if self.settings.get("pretrained"):
            raise SettingError(
                f"backbone.settings.pretrained is {self.settings['pretrained']}, which downloads: leave it out and "
                "set model.backbone_weights to a local file"
            )
        network: nn.Module = timm.create_model(self.name, num_classes=num_classes, **self.settings)
        return network
