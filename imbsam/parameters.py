"""The parameters that are trained, and those of them that are perturbed."""

from collections.abc import Sequence
from typing import Literal

from torch import nn

from imbsam.errors import SettingError
from imbsam.extra_passes import class_name

Perturb = Literal["all", "norm", "classifier"] | Sequence[str]
"""Which trained parameters are perturbed: a kind of them, or the names of layers or parameters."""


def check_perturb(perturb: Perturb) -> None:
    """Refuse what is no kind of parameters, and no list of names."""
    names = not isinstance(perturb, str) and isinstance(perturb, Sequence) and len(perturb) > 0
    if perturb not in ("all", "norm", "classifier") and not (names and all(isinstance(n, str) for n in perturb)):
        raise SettingError(
            f'perturb is {perturb!r}: give "all", "norm", "classifier" or a list of names of layers, such as ["layer4"]'
        )


def trained_parameters(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """As ``module.parameters()`` orders them, tied ones once, without another walk of the modules."""
    params = {id(p): p for m in modules for p in m._parameters.values() if p is not None and p.requires_grad}
    if not params:
        raise SettingError("module has no parameter that requires a gradient: unfreeze one")
    return list(params.values())


def perturbed_parameters(
    perturb: Perturb, modules: Sequence[nn.Module], params: Sequence[nn.Parameter], num_classes: int | None
) -> list[bool]:
    """Whether each of the trained parameters is perturbed.

    Args:
        perturb: the setting.
        modules: the module's submodules, itself first.
        params: the trained parameters.
        num_classes: by which the classifier is known; None where nobody has said.

    Raises:
        SettingError: where none is.
    """
    if perturb == "all":
        return [True] * len(params)
    if perturb == "norm":
        chosen = _own(filter(is_normalisation, modules))
        missing = "normalisation layer with a trained parameter"
    elif perturb == "classifier":
        heads = [m for m in modules if _is_classifier(m, num_classes)]
        chosen = _own(heads[-1:])
        missing = "trained layer" if num_classes is None else f"trained layer with {num_classes} outputs"
    else:
        chosen = {id(p) for name, p in modules[0].named_parameters() if any(f".{n}." in f".{name}." for n in perturb)}
        missing = "trained parameter of such a name"
    perturbed = [id(p) in chosen for p in params]
    if not any(perturbed):
        raise SettingError(
            f'perturb is {perturb!r} and module has no {missing}: give "all", or the names of its layers, as '
            "module.named_modules() has them"
        )
    return perturbed


def _own(modules: "Sequence[nn.Module] | filter[nn.Module]") -> set[int]:
    return {id(p) for m in modules for p in m._parameters.values()}


def is_normalisation(module: nn.Module) -> bool:
    """By its name too: timm's, torchvision's and hand-written ones are not torch's classes."""
    name = class_name(module)
    return "Norm" in name or isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm)


def _is_classifier(module: nn.Module, num_classes: int | None) -> bool:
    """Whether a matrix of its own (a convolution's in SqueezeNet) has an output for each class."""
    weights = [p for p in module._parameters.values() if p is not None and p.dim() >= 2]
    return any(num_classes is None or p.shape[0] == num_classes for p in weights)
