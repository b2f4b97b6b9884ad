"""How many weights a perturbation changes: in half precision rounding removes a small one."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from imbsam.gradients import local_shards


class PerturbedFraction:
    """The fraction of the weights (under FSDP2: of this rank's shard) that differ between the passes of one step.

    Args:
        module: the perturbed module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._params = local_shards([p for p in module.parameters() if p.requires_grad])
        self._before = [p.detach().clone() for p in self._params]
        self._total = sum(p.numel() for p in self._params)
        self.fraction = torch.zeros((), device=self._params[0].device)
        """The largest fraction seen, in [0, 1]."""

    def watch(self, losses: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`losses`, which compares the weights before every call."""

        def watched(*batch: Tensor) -> Tensor:
            moved = [(p != before).sum() for p, before in zip(self._params, self._before, strict=True)]
            self.fraction = torch.maximum(self.fraction, torch.stack(moved).sum() / self._total)
            return losses(*batch)

        return watched
