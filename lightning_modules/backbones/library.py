"""Networks of other libraries, by their names there."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable
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
    """A choice of a network, built once the number of classes is known, with random weights.

    Args:
        name: the network's name in the library.
        settings: further settings of the network.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    @abstractmethod
    def __call__(self, num_classes: int) -> nn.Module:
        """Build it.

        Args:
            num_classes: number of logits.

        Returns:
            a module from images (N, channels, H, W) to logits (N, num_classes).

        Raises:
            SettingError: the name is unknown (the message gives the closest), or the network has no such setting.
        """

    def _unknown(self, names: Iterable[str]) -> SettingError:
        closest = difflib.get_close_matches(str(self.name).lower(), names, n=3, cutoff=0.4)
        fix = f"did you mean {', '.join(closest)}?" if closest else "see the library's list of models"
        return SettingError(f"backbone.name is {self.name}: {type(self).__name__.lower()} has no such network; {fix}")

    def _refused(self, error: Exception) -> SettingError:
        settings = ", ".join(f"{key}={value!r}" for key, value in self.settings.items())
        reason = " ".join(str(error).split())
        return SettingError(f"backbone.settings of {self.name} is {settings or 'empty'}: {reason}")


class Torchvision(LibraryNetwork):
    """A classification network of torchvision, such as resnet50 or vit_b_16.

    Example:
        >>> type(Torchvision("resnet18")(num_classes=5)).__name__
        'ResNet'
    """

    def __call__(self, num_classes: int) -> nn.Module:
        """Build it, see :class:`LibraryNetwork`."""
        models = torchvision.models.list_models(module=torchvision.models)
        if self.name not in models:
            raise self._unknown(models)
        if self.settings.get("weights") is not None:
            raise SettingError(
                f"backbone.settings.weights is {self.settings['weights']}, which has other classes: leave it out and "
                "name a local file in model.backbone_weights"
            )
        settings = {**self.settings, "weights": None}
        if self.name in _WITH_AUXILIARY_LOGITS:
            if settings.get("aux_logits"):
                raise SettingError(
                    "backbone.settings.aux_logits is true, which returns more than logits in training: leave it out"
                )
            settings = {"init_weights": True, **settings, "aux_logits": False}  # torchvision warns of its default
        try:
            network: nn.Module = torchvision.models.get_model(self.name, num_classes=num_classes, **settings)
        except (TypeError, ValueError) as error:
            raise self._refused(error) from error
        return network


class Timm(LibraryNetwork):
    """A network of timm (the extra ``timm``), such as resnet50 or vit_tiny_patch16_224.

    Example:
        >>> type(Timm("resnet18", {"in_chans": 1})(num_classes=5)).__name__
        'ResNet'
    """

    def __call__(self, num_classes: int) -> nn.Module:
        """Build it, see :class:`LibraryNetwork`."""
        try:
            import timm
        except ImportError as error:
            raise SettingError("backbone is Timm, but timm is not installed: pip install timm") from error
        if not timm.is_model(self.name):
            raise self._unknown(timm.list_models())
        if self.settings.get("pretrained"):
            raise SettingError(
                f"backbone.settings.pretrained is {self.settings['pretrained']}, which downloads: leave it out and "
                "name a local file in model.backbone_weights"
            )
        try:
            network: nn.Module = timm.create_model(self.name, num_classes=num_classes, **self.settings)
        except (TypeError, ValueError, RuntimeError) as error:
            raise self._refused(error) from error
        return network
