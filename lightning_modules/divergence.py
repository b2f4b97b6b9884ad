"""A training that has diverged stops with one line, instead of running to its end with weights that are not numbers."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from imbsam import SettingError
from imbsam.gradients import local_shards


class StopOnDivergence(Callback):
    """After every epoch, refuse to go on where a trained weight is infinite or not a number.

    The last checkpoint is then still one of before. A loss that overflows once under a ``GradScaler``, which skips the
    step, leaves the weights as they are and is no divergence.

    Raises:
        SettingError: naming the epoch and the learning rate.
    """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the weights that the epoch before has left."""
        if trainer.current_epoch > 0:
            self._check(trainer, pl_module, trainer.current_epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the last weights, before they are saved."""
        self._check(trainer, pl_module, trainer.current_epoch)

    def _check(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        diverged = _not_finite([p for p in pl_module.parameters() if p.requires_grad]).to(pl_module.device)
        if trainer.world_size > 1:  # under FSDP2 each rank sees its own shards
            diverged = trainer.strategy.reduce(diverged, reduce_op="sum")
        if diverged > 0:
            groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
            rates = ", ".join(f"{group['lr']:g}" for group in groups)
            raise SettingError(
                f"the training diverged in epoch {epoch}: weights are infinite or not numbers; lower the learning rate "
                f"(model.optimizer.init_args.lr, now {rates}), or set model.gradient_clip_val"
            )


@torch.no_grad()
def _not_finite(params: list[torch.nn.Parameter]) -> Tensor:
    if not params:
        return torch.zeros(())
    norms = torch._foreach_norm(local_shards(params), 1, dtype=torch.float64) if params else []
    return (~torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite().all()).float()
