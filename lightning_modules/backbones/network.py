"""A network from the choices that make it."""

import inspect
from collections.abc import Callable

from torch import nn

from imbsam.errors import SettingError
from lightning_modules.backbones.heads import HeadCallable, replace_classifier

BackboneCallable = Callable[[int], nn.Module]
"""What makes a network of a number of classes: a class, a partial of one, a function."""


def create_network(backbone: BackboneCallable, num_classes: int, head: HeadCallable | None = None) -> nn.Module:
    """Build a network.

    Args:
        backbone: is given the number of classes, as ``num_classes`` where it has such a parameter.
        num_classes: number of logits.
        head: what takes the place of the network's last layer; default: nothing does.

    Returns:
        a module from images (N, channels, H, W) to logits (N, num_classes).

    Raises:
        SettingError: a setting does not fit, or ``backbone`` is a network that has been built already.
    """
    if isinstance(backbone, nn.Module):
        # what jsonargparse makes of a function under class_path
        raise SettingError(
            f"backbone is a {type(backbone).__name__} that is built already, and the number of classes comes from the "
            "data: give its class, or a function's path as text (backbone: torchvision.models.resnet50, without "
            "class_path)"
        )
    try:
        parameters = inspect.signature(backbone).parameters.values()  # a partial's are checked here
        named = any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters)
        network = backbone(num_classes=num_classes) if named else backbone(num_classes)  # type: ignore[call-arg]
        if head is not None:
            replace_classifier(network, head)
    except (TypeError, ValueError) as error:
        raise SettingError(f"backbone or head: {error}") from error
    return network
