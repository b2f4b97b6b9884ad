"""A network from its backbone and its head."""

import inspect
from collections.abc import Callable

from torch import nn

from imbsam.errors import SettingError
from lightning_modules.backbones.heads import HeadCallable, replace_classifier

BackboneCallable = Callable[[int], nn.Module]
"""A class, a partial of one or a function, which builds a network from the number of classes."""


def create_network(backbone: BackboneCallable, num_classes: int, head: HeadCallable | None = None) -> nn.Module:
    """Build a network.

    Args:
        backbone: called with the number of classes, as ``num_classes`` if it has such a parameter.
        num_classes: number of logits.
        head: builds the layer that replaces the network's last one; default: it stays.

    Returns:
        a module from images (N, channels, H, W) to logits (N, num_classes).

    Raises:
        SettingError: a setting cannot work, or ``backbone`` is a network that has been built already.
    """
    if isinstance(backbone, nn.Module):
        # jsonargparse calls a function that is given as class_path
        raise SettingError(
            f"backbone is a {type(backbone).__name__} that is already built, but the number of classes comes from the "
            "data: give its class, or a function's path as text (backbone: torchvision.models.resnet50, without "
            "class_path)"
        )
    try:
        parameters = inspect.signature(backbone).parameters.values()  # a partial's are checked here
        named = any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters)
        network = backbone(num_classes=num_classes) if named else backbone(num_classes)  # type: ignore[call-arg]
        if head is not None:
            replace_classifier(network, head)
    except SettingError:
        raise
    except (TypeError, ValueError) as error:
        raise SettingError(f"backbone or head: {error}") from error
    return network
