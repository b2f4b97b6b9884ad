"""Log the seconds of every epoch, and the device."""

import time

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules.epoch_log import log_epoch


class EpochTimer(Callback):
    """Log ``train/seconds``, the time of each training epoch with its validation, and the device, once.

    The device and the number of processes go where the logger keeps hyperparameters: ``hparams.yaml``, or the
    config of a Weights & Biases run.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the device, and start the clock: a run resumed mid-epoch does not start that epoch."""
        self._start = time.monotonic()
        device = pl_module.device
        threads = torch.get_num_threads()
        name = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
        if device.type != "cpu":
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        for logger in trainer.loggers:
            logger.log_hyperparams({"device": name, "processes": trainer.world_size})

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the time, once a GPU has finished the epoch: the mean of the processes' clocks."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        seconds = torch.tensor(time.monotonic() - self._start, device=pl_module.device)
        log_epoch(pl_module, {"train/seconds": trainer.strategy.reduce(seconds, reduce_op="mean")})
