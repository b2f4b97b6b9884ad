"""AdaptFormer: a small network beside the MLP of every block."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from imbsam.checks import check_interval, check_whole_numbers
from imbsam.errors import SettingError
from lightning_modules.backbones.blocks import named_blocks
from lightning_modules.backbones.heads import classifier
from lightning_modules.tuning.choice import Tuning


@dataclass(frozen=True)
class AdaptFormer(Tuning):
    r"""Train a bottleneck beside the MLP of every block of a transformer.

    .. math::
        \mathrm{MLP}(x) + s\, W_\text{up}\, \mathrm{ReLU}(W_\text{down}\, x)

    with x the input of the MLP, normalised by the block. :math:`W_\text{up}` starts as 0, so the network starts as the
    pretrained one.

    Args:
        bottleneck: width of the bottleneck, >= 1; 64 is the paper's. None is the rule of LIFT's code,
            :func:`lift_bottleneck`: all bottlenecks together have no more weights than the classifier.
        scale: s > 0; 0.1 is the paper's.
        learn_scale: train s, one number for each block, from ``scale`` on; LIFT does, from 1.
        **settings: those of :class:`Tuning`.

    Source:
        Chen et al., *AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition*, NeurIPS 2022,
        arXiv 2205.13535, section 3.2. Shi et al., *Long-Tail Learning with Foundation Model: Heavy Fine-Tuning Hurts*,
        ICML 2024, arXiv 2309.10019.
    """

    bottleneck: int | None = 64
    scale: float = 0.1
    learn_scale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bottleneck is not None:
            check_whole_numbers(bottleneck=self.bottleneck)
        check_interval("(0, inf)", scale=self.scale)

    def _choose(self, network: nn.Module) -> None:
        found = [
            (name, mlp) for name, block in named_blocks(network) if (mlp := getattr(block, "mlp", None)) is not None
        ]
        pairs = [(f"{name}.mlp", mlp, linear) for name, mlp in found if (linear := _first_linear(mlp)) is not None]
        if not pairs:
            raise SettingError(
                f"tune is AdaptFormer, and {type(network).__name__} has no blocks with an mlp: choose a transformer, "
                "or another tune"
            )
        bottleneck = self.bottleneck
        if bottleneck is None:
            bottleneck = lift_bottleneck(int(classifier(network).weight.shape[0]), len(pairs))
        for name, mlp, linear in pairs:
            beside = ParallelAdapter(mlp, linear.in_features, bottleneck, self.scale, self.learn_scale)
            network.set_submodule(name, beside)
            beside.adapter.requires_grad_(True)


class ParallelAdapter(nn.Module):
    """An MLP with a bottleneck beside it.

    Args:
        mlp: maps (..., D) to (..., D).
        width: D.
        bottleneck: width of the bottleneck.
        scale: factor of the bottleneck's output.
        learn_scale: whether the factor is trained.
    """

    def __init__(self, mlp: nn.Module, width: int, bottleneck: int, scale: float, learn_scale: bool = False) -> None:
        super().__init__()
        self.mlp = mlp
        down, up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.adapter = nn.Sequential(down, nn.ReLU(), up)
        self.scale = scale
        if learn_scale:
            self.scale = 1.0
            self.adapter.append(LearnedScale(scale))
        for tensor in (down.bias, up.weight, up.bias):  # the other stays as torch starts it, which is the paper's way
            nn.init.zeros_(tensor)
        self.adapter.to(next(mlp.parameters()).device)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., D)."""
        out: Tensor = self.mlp(x) + self.scale * self.adapter(x)
        return out


class LearnedScale(nn.Module):
    """Multiplies by one trained number.

    Args:
        start: the number at the beginning.
    """

    def __init__(self, start: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(start)))

    def forward(self, x: Tensor) -> Tensor:
        """Return x times the number."""
        return self.scale * x


def lift_bottleneck(num_classes: int, blocks: int) -> int:
    """LIFT's width: the power of two at or below C / 2L, at least 4, since with one or two units all may be dead.

    Args:
        num_classes: C.
        blocks: L.

    Example:
        >>> [lift_bottleneck(classes, 12) for classes in (3, 100, 365, 1000, 8142)]
        [4, 4, 8, 32, 256]
    """
    return max(4, 1 << max(0, (num_classes // (2 * blocks)).bit_length() - 1))


def _first_linear(mlp: nn.Module) -> nn.Linear | None:
    return next((module for module in mlp.modules() if isinstance(module, nn.Linear)), None)
