"""The classifier of a network, which is its last layer: finding it, replacing it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imbsam.checks import check_numbers, check_whole_numbers
from imbsam.errors import SettingError

__all__ = ["CosineClassifier", "HeadCallable", "classifier", "classifier_name", "replace_classifier"]

HeadCallable = Callable[[int, int], nn.Module]
"""A class, or a partial of one, which builds a last layer from the number of features and of classes."""

# the attribute in our networks and torchvision's ResNets; its other convolutional networks; its ViT; its Swin
_ATTRIBUTES = ("fc", "classifier", "heads", "head")


class CosineClassifier(nn.Module):
    r"""Logits from the angle between features and class weights, independent of their lengths.

    .. math::
        z_c = s \cos(x, w_c) = s \frac{x^\top w_c}{\|x\| \|w_c\|}

    There is no bias. The logits are ready for a softmax; a loss that scales logits itself needs ``scale=1``. A zero
    feature vector has zero logits.

    Args:
        in_features: length of a feature vector, >= 1.
        num_classes: number of logits, >= 1.
        scale: s > 0. Logits lie in [-scale, scale]; 30 is LDAM's (Cao et al., NeurIPS 2019).

    Attributes:
        weight: parameter of shape (num_classes, in_features); the rows start with length 1 and random directions.

    Raises:
        SettingError: a size is not a positive integer, or ``scale`` is not a finite number above 0.

    Shapes:
        * features: floating (..., in_features).
        * returns: logits (..., num_classes).

    Source:
        Gidaris and Komodakis, *Dynamic Few-Shot Visual Learning without Forgetting*, CVPR 2018, arXiv 1804.09458,
        section 3.2.

    Example:
        >>> head = CosineClassifier(in_features=4, num_classes=3, scale=10)
        >>> features = torch.ones(2, 4)
        >>> torch.allclose(head(features), head(5 * features))
        True
    """

    def __init__(self, in_features: int, num_classes: int, scale: float = 30.0) -> None:
        super().__init__()
        check_whole_numbers(in_features=in_features, num_classes=num_classes)
        check_numbers(above=True, hint="30 is LDAM's", scale=scale)
        self.in_features, self.out_features, self.scale = in_features, num_classes, float(scale)
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw random directions of length 1."""
        self.weight.copy_(F.normalize(torch.randn_like(self.weight), dim=1))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits, shape (..., num_classes)."""
        # the usual eps of 1e-12 is 0 in float16
        cosine = F.linear(F.normalize(features, dim=-1, eps=1e-6), F.normalize(self.weight, dim=1, eps=1e-6))
        return self.scale * cosine

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"in_features={self.in_features}, num_classes={self.out_features}, scale={self.scale:g}"


def classifier_name(network: nn.Module) -> str:
    """Return the dotted name of a network's classifier.

    Args:
        network: one of this project's networks, of torchvision's or of timm's.

    Returns:
        the name of the last layer with ``in_features`` and ``out_features``, such as an ``nn.Linear`` or a
        :class:`CosineClassifier`, for ``network.get_submodule``.

    Raises:
        SettingError: there is none, as in torchvision's SqueezeNet, whose classifier is a convolution.

    Example:
        >>> from lightning_modules.backbones import Torchvision
        >>> classifier_name(Torchvision("mobilenet_v3_small")(num_classes=10))
        'classifier.3'
    """
    names: dict[nn.Module, str] = {module: name for name, module in network.named_modules()}
    if callable(get := getattr(network, "get_classifier", None)):  # timm's networks all have it
        layer: Any = get()
        if _is_classifier(layer):
            return names[layer]
    else:
        for attribute in _ATTRIBUTES:
            if isinstance(inside := getattr(network, attribute, None), nn.Module):
                layers = [module for module in inside.modules() if _is_classifier(module)]
                if layers:
                    return names[layers[-1]]
    raise SettingError(
        f"backbone is {type(network).__name__}, which has no linear classifier to replace: choose another, or leave "
        "head out and train in one stage"
    )


def classifier(network: nn.Module) -> Any:
    """Return a network's classifier, see :func:`classifier_name`."""
    return network.get_submodule(classifier_name(network))


def replace_classifier(network: nn.Module, head: HeadCallable) -> None:
    """Replace a network's classifier.

    Args:
        network: see :func:`classifier_name`; changed in place.
        head: called with the number of features and of classes.

    Raises:
        SettingError: the network's classifier cannot be found.

    Example:
        >>> from functools import partial
        >>> from lightning_modules.backbones import SmallCNN
        >>> network = SmallCNN(num_classes=10)
        >>> replace_classifier(network, partial(CosineClassifier, scale=16))
        >>> network.fc
        CosineClassifier(in_features=64, num_classes=10, scale=16)
    """
    old = classifier(network)
    network.set_submodule(classifier_name(network), head(old.in_features, old.out_features))


def _is_classifier(module: Any) -> bool:
    return isinstance(module, nn.Module) and hasattr(module, "in_features") and hasattr(module, "out_features")
