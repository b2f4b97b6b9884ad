"""What a training costs: the seconds of every epoch in the log, and the device in its hyperparameters."""

import time

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Cost(Callback):
    """Log ``train/seconds``, the time of each training epoch with its validation, and the device, once.

    The device and the number of processes go where the logger keeps hyperparameters: ``hparams.yaml``, or a Weights & Biases
    run's config.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the device."""
        device = pl_module.device
        name = f"CPU, {torch.get_num_threads()} threads"
        if device.type != "cpu":
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        for logger in trainer.loggers:
            logger.log_hyperparams({"device": name, "processes": trainer.world_size})

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the time; the epoch's mean loss has been read by now, so a GPU has finished it."""
        pl_module.log("train/seconds", time.monotonic() - self._start, rank_zero_only=False)
