"""The validation part, seen once more by the weights as they are: for what is chosen or fitted on it."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import SequentialSampler
from torchmetrics import CatMetric


def validation_loader(trainer: Trainer) -> Any:
    """The first validation loader, None without one: a second one is for the loss."""
    if not trainer.limit_val_batches:
        return None
    data: Any = getattr(trainer, "datamodule", None)
    loaders = trainer.val_dataloaders if data is None else data.val_dataloader()
    if isinstance(loaders, (list, tuple)):
        loaders = loaders[0] if loaders else None
    return loaders


@torch.no_grad()
def see_validation_part(trainer: Trainer, module: LightningModule, see: Callable[[Any, int], None]) -> None:
    """Show every validation batch of this process, whatever ``check_val_every_n_epoch`` is.

    Args:
        trainer: in a stage that has set up model and data.
        module: is in evaluation mode meanwhile.
        see: gets a batch on the device and its number, without gradients and in the Trainer's precision. It is not
            called where there is no validation part.
    """
    was_training, stage = module.training, trainer.state.stage
    module.eval()
    trainer.validating = True  # for the data's hooks, which may mix training images
    try:
        for index, batch in enumerate(validation_loader(trainer) or ()):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = trainer.strategy.batch_to_device(module._on_before_batch_transfer(batch, dataloader_idx=0))
            with trainer.precision_plugin.forward_context():
                see(batch, index)
    finally:
        trainer.state.stage = stage
        module.train(was_training)


def validation_predictions(trainer: Trainer, module: LightningModule) -> tuple[Tensor, Tensor]:
    """What ``imbsam predict`` would write of the validation samples of all processes, and their labels.

    Returns:
        Probabilities (N, C) or scores (N,), float64, and labels (N,), int64, on the CPU.
    """
    # a loader of the user's own has all samples on every process
    whole = isinstance(getattr(validation_loader(trainer), "sampler", None), SequentialSampler)
    found, labels = (CatMetric(nan_strategy="disable", sync_on_compute=not whole).to(module.device) for _ in range(2))

    def see(batch: Any, index: int) -> None:
        found.update(module.predict_step(batch, index).float())
        labels.update(batch[1])

    see_validation_part(trainer, module, see)
    return torch.as_tensor(found.compute()).double().cpu(), torch.as_tensor(labels.compute()).cpu().long()
