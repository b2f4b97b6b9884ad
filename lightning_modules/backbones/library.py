"""Networks of other libraries by their names there; torchvision's and timm's."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor, nn

from imbsam.errors import SettingError
from imbsam.messages import first_sentence
from lightning_modules.backbones.hub import HubUnreachable, hub

__all__ = ["LibraryNetwork", "MissingWeights", "Timm", "Torchvision"]


class MissingWeights(SettingError):
    """The weights are not where the setting says; a run that resumes does not need them."""


# in training these return their auxiliary classifiers' logits as well
_WITH_AUXILIARY_LOGITS = ("googlenet", "inception_v3")

_SIZES = ("image_size", "img_size", "force_image_size")


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
        self._check_name()
        try:
            return self._build(num_classes)
        except SettingError:
            raise
        except HubUnreachable as error:
            raise SettingError(
                f"backbone.name is {self.name}: building it takes files of the hub ({error}): connect once, or choose "
                "another backbone"
            ) from error
        except (TypeError, ValueError, RuntimeError, AssertionError, AttributeError) as error:
            settings = ", ".join(f"{key}={value!r}" for key, value in self.settings.items())
            raise SettingError(
                f"backbone.settings of {self.name} is {settings or 'empty'}: {_one_line(error)}"
            ) from error

    def pretrained(self, tag: str | None) -> dict[str, Tensor]:
        """The library's own weights, from its cache or downloaded.

        Args:
            tag: which of them; None for the library's default.

        Returns:
            Tensors by the names that they have in the network.

        Raises:
            SettingError: there are none, or they are not in the cache and cannot be downloaded.
        """
        self._check_name()
        try:
            return self._pretrained(tag)
        except SettingError:
            raise
        except Exception as error:  # each library, and each of its ways to download, has errors of its own
            given = "pretrained" if tag is None else f"pretrained:{tag}"
            raise MissingWeights(
                f"backbone_weights is {given}: {type(self).__name__} could not load those of {self.name} "
                f"({first_sentence(error)}); offline? give a local file"
            ) from error

    @property
    def size_setting(self) -> Any:
        """The image size in ``settings``, by its name in the library; None if it is not set."""
        return next((self.settings[key] for key in _SIZES if key in self.settings), None)

    def folder_of(self, path: Path) -> Path | None:
        """The folder that a path means: a folder itself; None for a file that can be read alone."""
        return path if path.is_dir() else None

    def read_folder(self, folder: Path) -> dict[str, Tensor]:
        """Weights in a folder that the library saved, by the names that they have in the network.

        Raises:
            SettingError: the library saves none.
        """
        raise SettingError(f"backbone_weights is {folder}: a folder; {type(self).__name__} takes a file")

    @abstractmethod
    def preprocessing(self, weights: str) -> dict[str, Any]:
        """What the weights were trained on.

        Args:
            weights: the setting ``backbone_weights``.

        Returns:
            ``image_size`` in pixels, ``mean`` and ``std`` of each channel, in [0, 1], as far as they are known.
        """

    def text_features(self, prompts: Sequence[str], weights: str | None) -> Tensor:
        """Features of texts in the space of the image features, float32 (len(prompts), D).

        Args:
            prompts: the texts.
            weights: the setting ``backbone_weights``.

        Raises:
            SettingError: the network has no text tower.
        """
        raise SettingError(
            f"head_init is TextFeatures, and {type(self).__name__} {self.name} has no text tower: choose OpenCLIP, a "
            "CLIP of HuggingFace, or ClassMeans"
        )

    def _check_name(self) -> None:
        names = self._names()
        if self.name not in names:
            spelt = {name.lower(): name for name in names}
            similar = [spelt[s] for s in difflib.get_close_matches(str(self.name).lower(), spelt, n=3, cutoff=0.4)]
            fix = f"did you mean {', '.join(similar)}?" if similar else "see the library's list of models"
            raise SettingError(
                f"backbone.name is {self.name}: {type(self).__name__.lower()} has no such network; {fix}"
            )

    @abstractmethod
    def _names(self) -> list[str]:
        """The names of the library's networks."""

    @abstractmethod
    def _build(self, num_classes: int) -> nn.Module:
        """Build the network of this name."""

    @abstractmethod
    def _pretrained(self, tag: str | None) -> dict[str, Tensor]:
        """What :meth:`pretrained` returns; may fail as the library does."""


class Torchvision(LibraryNetwork):
    """A classification network of torchvision, such as resnet50 or vit_b_16.

    The tags of its weights are those of its enums, such as IMAGENET1K_V2.

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
                "set model.backbone_weights to a local file or to pretrained"
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

    def _weights(self, tag: str | None) -> Any:
        choices = torchvision.models.get_model_weights(self.name)
        if (tag or "DEFAULT") not in choices.__members__:
            raise SettingError(
                f"backbone_weights is pretrained:{tag}: {self.name} has {', '.join(choices.__members__)}"
            )
        return choices[tag or "DEFAULT"]

    def _pretrained(self, tag: str | None) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = self._weights(tag).get_state_dict(check_hash=True)
        # we build no auxiliary classifiers (aux1, aux2, AuxLogits)
        return {name: tensor for name, tensor in weights.items() if not name.lower().startswith("aux")}

    def preprocessing(self, weights: str) -> dict[str, Any]:
        """Those of the transforms of the weights; for a file those of the default weights."""
        transforms = self._weights(tag_of(weights)).transforms()
        size = self.settings.get("image_size", transforms.crop_size[0])
        return {"image_size": size, "mean": list(transforms.mean), "std": list(transforms.std)}


class Timm(LibraryNetwork):
    """A network of timm (the extra ``timm``), such as resnet50 or vit_tiny_patch16_224.

    The tags of its weights are what follows the point in its names, such as a1_in1k.

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
                f"backbone.settings.pretrained is {self.settings['pretrained']}: leave it out and set "
                "model.backbone_weights to a local file or to pretrained"
            )
        network: nn.Module = timm.create_model(self.name, num_classes=num_classes, **self.settings)
        return network

    def _tagged(self, tag: str | None) -> str:
        return self.name if tag is None else f"{self.name.partition('.')[0]}.{tag}"

    def _pretrained(self, tag: str | None) -> dict[str, Tensor]:
        import timm

        name, architecture = self._tagged(tag), self.name.partition(".")[0]
        tags = timm.list_pretrained(f"{architecture}.*") + timm.list_pretrained(architecture)
        if name not in tags and not any(t.partition(".")[0] == name for t in tags):
            raise SettingError(f"backbone_weights is pretrained{':' + tag if tag else ''}: timm has {', '.join(tags)}")
        # the positional embedding of another size is interpolated where the weights are copied
        settings = {key: value for key, value in self.settings.items() if key != "img_size"}
        with hub():
            weights: dict[str, Tensor] = timm.create_model(name, pretrained=True, **settings).state_dict()
        return weights

    def preprocessing(self, weights: str) -> dict[str, Any]:
        """Those of timm's ``pretrained_cfg``."""
        import timm

        config = timm.get_pretrained_cfg(self._tagged(tag_of(weights)))
        if config is None:
            return {}
        size = self.settings.get("img_size", config.input_size[-1])
        return {"image_size": size, "mean": list(config.mean), "std": list(config.std)}


def check_text_weights(weights: str | None) -> None:
    """Refuse text features of random weights.

    Args:
        weights: the setting ``backbone_weights``.

    Raises:
        SettingError: it is None.
    """
    if weights is None:
        raise SettingError(
            "head_init is TextFeatures and backbone_weights is null: set model.backbone_weights, or the text features "
            "are those of random weights"
        )


def tag_of(weights: str | None) -> str | None:
    """The tag in ``pretrained:TAG``, None for anything else."""
    source, _, tag = str(weights).partition(":")
    return (tag or None) if source == "pretrained" else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
