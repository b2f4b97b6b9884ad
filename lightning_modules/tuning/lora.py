"""Low-rank adaptation."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from imbsam.checks import check_interval, check_whole_numbers
from imbsam.errors import SettingError
from lightning_modules.backbones.blocks import named_blocks
from lightning_modules.tuning.choice import Tuning


@dataclass(frozen=True)
class LoRA(Tuning):
    r"""Train a low-rank matrix beside each linear layer of the blocks, by ``peft`` (the extra ``peft``).

    .. math::
        W x + \frac{\alpha}{r} B A x

    A starts random and B as 0, so the network starts as the pretrained one.

    Args:
        rank: r >= 1.
        alpha: the factor is alpha / rank.
        dropout: on x, in [0, 1).
        targets: names of the layers, or their ends, such as qkv; by default every ``nn.Linear`` in the blocks except
            those inside ``nn.MultiheadAttention``, which does not call them (torchvision's ViT, OpenCLIP).
        peft: further settings of ``peft.LoraConfig``, such as ``use_dora`` (DoRA) or ``use_rslora``.
        **settings: those of :class:`Tuning`.

    Source:
        Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022, arXiv 2106.09685.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] | None = None
    peft: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole_numbers(rank=self.rank)
        check_interval("(0, inf)", alpha=self.alpha)
        check_interval("[0, 1)", dropout=self.dropout)

    def _choose(self, network: nn.Module) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise SettingError("tune is LoRA, but peft is not installed: pip install peft") from error
        targets = self.targets if self.targets is not None else _linear_layers(network)
        if not targets:
            raise SettingError(
                f"tune is LoRA, and the blocks of {type(network).__name__} have no linear layer: choose another, or "
                "name layers in model.tune.targets"
            )
        settings = {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout, **self.peft}
        before = dict(network.named_parameters())
        try:
            inject_adapter_in_model(LoraConfig(target_modules=targets, **settings), network)
        except (TypeError, ValueError) as error:
            raise SettingError(
                f"tune is LoRA with targets {self.targets}: {' '.join(str(error).split())[:300]}"
            ) from error
        _check_attention(network)
        kept = set(map(id, before.values()))
        for parameter in network.parameters():
            parameter.requires_grad_(id(parameter) not in kept)


def _check_attention(network: nn.Module) -> None:
    """Refuse LoRA in ``nn.MultiheadAttention``.

    It reads the weight of its output layer without calling the layer, so that LoRA there does nothing. If the attention
    itself is a target, peft adds to the frozen weights and subtracts again in every forward, which leaves roundings.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            wrapped = name.endswith(".base_layer")
            if wrapped or any("lora_" in inside for inside, _ in module.named_parameters()):
                raise SettingError(
                    f"model.tune.targets chooses {name.removesuffix('.base_layer')} or a layer in it: LoRA does not "
                    "work in nn.MultiheadAttention; choose layers of the MLPs, or a Timm or HuggingFace backbone"
                )


def _linear_layers(network: nn.Module) -> list[str]:
    """Names of the linear layers in the blocks that are called as modules."""
    found = []
    for prefix, block in named_blocks(network):
        inside = [name for name, module in block.named_modules() if isinstance(module, nn.MultiheadAttention)]
        found += [
            f"{prefix}.{name}"
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear) and not any(name.startswith(f"{attention}.") for attention in inside)
        ]
    return found
