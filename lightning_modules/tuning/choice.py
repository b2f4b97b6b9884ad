"""What all choices of trained parameters share."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from imbsam.checks import check_choice, check_interval
from imbsam.errors import SettingError
from lightning_modules.backbones.blocks import depths
from lightning_modules.backbones.heads import classifier_name

FrozenPrecision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Tuning(ABC):
    """A choice of the parameters that are trained. The classifier always is; the rest is frozen.

    Frozen layers are in evaluation mode, so that BatchNorm among them uses its running statistics.

    Args:
        backbone_lr: the learning rate of what is trained before the classifier, as a share of the classifier's, which
            is the optimizer's.
        layer_decay: each block's learning rate as a share of that of the block after it (0.65 to 0.75 are usual for
            fine-tuning a ViT whole); 1 for none.
        freeze_batch_norm: BatchNorm uses its running statistics in trained layers too; its weights are still trained.
        save_frozen: checkpoints hold the frozen weights; without them they are small, and testing or resuming reads
            ``backbone_weights`` again.
        frozen_precision: bfloat16 keeps the frozen weights of linear layers and convolutions so while training,
            at half the memory; it needs ``trainer.precision: bf16-mixed``. What is trained stays in float32.

    Raises:
        SettingError: a setting is out of range.
    """

    backbone_lr: float = 1.0
    layer_decay: float = 1.0
    freeze_batch_norm: bool = False
    save_frozen: bool = True
    frozen_precision: FrozenPrecision = "float32"

    def __post_init__(self) -> None:
        check_interval("(0, inf)", backbone_lr=self.backbone_lr)
        check_interval("(0, 1]", layer_decay=self.layer_decay)
        check_choice(FrozenPrecision, frozen_precision=self.frozen_precision)

    def apply(self, network: nn.Module) -> None:
        """Freeze everything but the choice and the classifier; adapters are added.

        Args:
            network: a classification network, with its pretrained weights; changed in place.

        Raises:
            SettingError: the network has no such part.
        """
        network.requires_grad_(False)
        self._choose(network)
        network.get_submodule(classifier_name(network)).requires_grad_(True)

    @abstractmethod
    def _choose(self, network: nn.Module) -> None:
        """Require gradients of the chosen parameters; all are frozen before."""

    def set_modes(self, network: nn.Module) -> None:
        """Put the frozen layers of a network in training mode into evaluation mode."""
        for module in self._frozen_modules(network):
            module.eval()

    def frozen_tensors(self, network: nn.Module) -> list[str]:
        """Names of the parameters and buffers that a training does not change, as in ``state_dict``."""
        names = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
        frozen = {id(buffer) for module in self._frozen_modules(network) for buffer in module.buffers()}
        names += [name for name, buffer in network.named_buffers() if id(buffer) in frozen]
        saved = network.state_dict().keys()
        return [name for name in names if name in saved]

    def _frozen_modules(self, network: nn.Module) -> Iterator[nn.Module]:
        for module in network.children():
            if any(p.requires_grad for p in module.parameters()):
                yield from self._frozen_modules(module)
                if self.freeze_batch_norm and isinstance(module, _BatchNorm):
                    yield module
            elif next(module.parameters(), None) is not None:
                yield module

    def parameter_groups(self, network: nn.Module) -> list[dict[str, Any]]:
        """The trained parameters by learning rate.

        Returns:
            Groups for a torch optimizer, the classifier's first, each with ``lr_factor``, by which its learning rate
            is to be multiplied.
        """
        head, depth = classifier_name(network) + ".", depths(network)
        after_last = max(depth.values()) if depth else 0
        groups: dict[float, list[nn.Parameter]] = {1.0: []}
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                factor = self.backbone_lr * self.layer_decay ** (after_last - depth[name])
                groups.setdefault(1.0 if name.startswith(head) else factor, []).append(parameter)
        return [{"params": params, "lr_factor": factor} for factor, params in groups.items() if params]

    def cast_frozen(self, network: nn.Module, precision: str) -> None:
        """Keep the frozen weights in their precision, for a training.

        Args:
            network: changed in place.
            precision: the Trainer's.

        Raises:
            SettingError: the Trainer does not run in bf16-mixed.
        """
        if self.frozen_precision == "float32":
            return
        if precision != "bf16-mixed":
            raise SettingError(
                f"model.tune.frozen_precision is bfloat16 and trainer.precision is {precision}: set trainer.precision "
                "to bf16-mixed"
            )
        for module in network.modules():
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                for parameter in module.parameters(recurse=False):
                    if not parameter.requires_grad:
                        parameter.data = parameter.data.to(torch.bfloat16)
