"""Classification networks by name: this project's small ones, torchvision's and timm's."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import torchvision
from torch import nn

from imbsam.checks import check_whole_numbers
from imbsam.errors import SettingError
from lightning_modules.backbones.cifar_resnet import cifar_resnet20, cifar_resnet32, cifar_resnet34
from lightning_modules.backbones.small_cnn import small_cnn

__all__ = [
    "BACKBONES",
    "cifar_resnet20",
    "cifar_resnet32",
    "cifar_resnet34",
    "create_backbone",
    "small_cnn",
]

_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    builder.__name__: builder for builder in (cifar_resnet20, cifar_resnet32, cifar_resnet34, small_cnn)
}

BACKBONES: tuple[str, ...] = tuple(_BUILDERS)
"""Names of this project's own networks; ``create_backbone`` knows torchvision's and timm's too."""

TIMM = "timm/"
"""Before the name of a timm network, since both libraries have a "resnet50"."""

# In training these return their auxiliary classifiers' logits as well, and torchvision warns of a future
# default.
_WITH_AUXILIARY_LOGITS = ("googlenet", "inception_v3")


def create_backbone(name: str, num_classes: int, **kwargs: Any) -> nn.Module:
    """Create a classification network, randomly initialised.

    Args:
        name: one of ``BACKBONES``, or of torchvision's classification models such as "resnet50" or
            "vit_b_16", or of timm's after "timm/", such as "timm/resnet50" (needs the extra ``timm``).
        num_classes: number of logits, >= 1.
        kwargs: settings of that network, such as ``norm`` and ``width`` of ``cifar_resnet20``.

    Returns:
        a module from images (N, channels, H, W) to logits (N, num_classes).

    Raises:
        SettingError: if the name is unknown (the message gives the closest), or the network has no such
            setting.

    Example:
        >>> type(create_backbone("cifar_resnet32", num_classes=100, norm="group")).__name__
        'CifarResNet'
    """
    check_whole_numbers(num_classes=num_classes)
    if name in _BUILDERS:
        known = [key for key in inspect.signature(_BUILDERS[name]).parameters if key != "num_classes"]
        for key in kwargs:
            if key not in known:
                raise SettingError(f"{name} has no setting {key}={kwargs[key]!r}; it has {', '.join(known)}")
        return _BUILDERS[name](num_classes, **kwargs)
    if str(name).startswith(TIMM):
        return _timm_model(name.removeprefix(TIMM), num_classes, kwargs)
    return _torchvision_model(name, num_classes, kwargs)


def _torchvision_model(name: str, num_classes: int, kwargs: dict[str, Any]) -> nn.Module:
    models = torchvision.models.list_models(module=torchvision.models)
    if name not in models:
        closest = difflib.get_close_matches(str(name).lower(), [*BACKBONES, *models], n=3, cutoff=0.4)
        raise SettingError(
            f"backbone name={name!r} is unknown; did you mean {', '.join(closest)}?"
            if closest
            else f"backbone name={name!r} is unknown; choose one of {', '.join(BACKBONES)} or torchvision's"
        )
    if kwargs.get("weights") is not None:
        raise SettingError(
            f"weights={kwargs['weights']!r} cannot be loaded into {name} with {num_classes} classes; "
            "leave it out and name a local file in backbone_weights"
        )
    kwargs = {**kwargs, "weights": None}
    if name in _WITH_AUXILIARY_LOGITS:
        if kwargs.get("aux_logits"):
            raise SettingError(f"aux_logits=True of {name} returns more than logits; leave it out")
        kwargs = {"init_weights": True, **kwargs, "aux_logits": False}
    try:
        model: nn.Module = torchvision.models.get_model(name, num_classes=num_classes, **kwargs)
    except (TypeError, ValueError) as error:
        settings = ", ".join(f"{key}={value!r}" for key, value in kwargs.items() if key != "weights")
        reason = " ".join(str(error).split())
        raise SettingError(f"torchvision's {name} does not take {settings}: {reason}") from error
    return model


def _timm_model(name: str, num_classes: int, kwargs: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise SettingError(f"backbone name={TIMM + name!r} needs timm: pip install timm") from error
    if not timm.is_model(name):
        closest = difflib.get_close_matches(name.lower(), timm.list_models(), n=3, cutoff=0.4)
        fix = f"did you mean {', '.join(TIMM + other for other in closest)}?" if closest else "see timm.list_models()"
        raise SettingError(f"backbone name={TIMM + name!r} is unknown; {fix}")
    if kwargs.get("pretrained"):
        raise SettingError(
            f"pretrained={kwargs['pretrained']!r} downloads; leave it out and name a local file in backbone_weights"
        )
    try:
        model: nn.Module = timm.create_model(name, num_classes=num_classes, **kwargs)
    except (TypeError, ValueError, RuntimeError) as error:
        settings = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
        raise SettingError(f"timm's {name} does not take {settings}: {' '.join(str(error).split())}") from error
    return model
