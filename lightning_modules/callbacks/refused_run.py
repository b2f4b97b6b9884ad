"""Leave no folder behind for a run that was refused."""

import shutil
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger


class DiscardRefusedRun(Callback):
    """Remove the folder of a run that stopped before its first step."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove what this run wrote."""
        logger = trainer.logger
        if trainer.is_global_zero and isinstance(logger, CSVLogger) and trainer.global_step == 0:
            folder = Path(logger.log_dir)
            if not (folder / "metrics.csv").exists() and not any(folder.rglob("*.ckpt")):
                shutil.rmtree(folder, ignore_errors=True)
