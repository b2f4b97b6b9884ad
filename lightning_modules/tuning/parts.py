"""Parts of the network that may be trained alone."""

from dataclasses import dataclass

from torch import nn

from imbsam.checks import check_whole_numbers
from imbsam.errors import SettingError
from imbsam.parameters import is_normalisation
from lightning_modules.backbones.blocks import depths, named_blocks
from lightning_modules.tuning.choice import Tuning


@dataclass(frozen=True)
class All(Tuning):
    """Train everything: full fine-tuning."""

    def _choose(self, network: nn.Module) -> None:
        network.requires_grad_(True)


@dataclass(frozen=True)
class HeadOnly(Tuning):
    """Train the classifier alone: a linear probe."""

    def _choose(self, network: nn.Module) -> None:
        pass


@dataclass(frozen=True)
class Norm(Tuning):
    """Train the normalisation layers.

    Source:
        Frankle, Schwab and Morcos, *Training BatchNorm and Only BatchNorm*, ICLR 2021, arXiv 2003.00152.
    """

    def _choose(self, network: nn.Module) -> None:
        layers = [module for module in network.modules() if is_normalisation(module)]
        if not any(True for layer in layers for _ in layer.parameters()):
            raise SettingError(f"tune is Norm, and {type(network).__name__} has no normalisation layer with weights")
        for layer in layers:
            layer.requires_grad_(True)


@dataclass(frozen=True)
class Bias(Tuning):
    """Train the biases.

    Source:
        Ben Zaken, Goldberg and Ravfogel, *BitFit*, ACL 2022, arXiv 2106.10199.
    """

    def _choose(self, network: nn.Module) -> None:
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.requires_grad_(True)


@dataclass(frozen=True)
class LastBlocks(Tuning):
    """Train the last blocks and what follows them.

    Args:
        n: how many, >= 1.
        **settings: those of :class:`Tuning`.
    """

    n: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole_numbers(n=self.n)

    def _choose(self, network: nn.Module) -> None:
        number = len(named_blocks(network))
        if self.n > number:
            raise SettingError(
                f"tune.n is {self.n}, and {type(network).__name__} has {number} blocks: give at most {number}, or "
                "choose All or HeadOnly"
            )
        depth = depths(network)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(depth[name] > number - self.n)
