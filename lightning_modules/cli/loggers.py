"""The loggers in the settings of a trainer."""

import importlib.util
from pathlib import Path
from typing import Any

from jsonargparse import dict_to_namespace

from imbsam import SettingError

CSV_LOGGER = "lightning_modules.resuming.csv_logger.ResumableCSVLogger"


def loggers(trainer: Any, *names: str) -> list[Any]:
    """The settings of the loggers whose class name ends with one of these; of all loggers without a name."""
    given = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    return [logger for logger in given if getattr(logger, "class_path", "").endswith(names or "")]


def csv_log(trainer: Any) -> tuple[Any, Path | None]:
    """The settings of the CSV logger and the folder of its runs, or None and None."""
    for logger in loggers(trainer, "CSVLogger"):
        return logger.init_args, Path(logger.init_args.save_dir) / (logger.init_args.name or "")
    return None, None


def complete_wandb(trainer: Any) -> None:
    """Put a CSV logger before a WandbLogger: its folder is the run's.

    Raises:
        SettingError: wandb is not installed, or is to upload checkpoints offline.
    """
    wandb, csv = loggers(trainer, "WandbLogger"), loggers(trainer, "CSVLogger")
    if not wandb:
        return
    if importlib.util.find_spec("wandb") is None:
        raise SettingError('trainer.logger is WandbLogger, but wandb is not installed: pip install "wandb>=0.31"')
    if not csv:
        settings = wandb[0].init_args
        save_dir = "logs" if settings.save_dir in (None, ".") else settings.save_dir  # Lightning's default is "."
        init_args = {"save_dir": save_dir, "name": settings.name or "", "version": None}
        csv = [dict_to_namespace({"class_path": CSV_LOGGER, "init_args": init_args})]
    trainer.logger = [*csv, *(logger for logger in loggers(trainer) if logger not in csv)]
    for logger in wandb:
        if logger.init_args.offline and logger.init_args.log_model:
            raise SettingError(
                f"trainer.logger.init_args.log_model is {logger.init_args.log_model}: Lightning uploads no checkpoints "
                "offline; set it to false, or offline to false"
            )
        # jsonargparse passes the default of wandb.init in place of WandbLogger's
        logger.init_args.resume = logger.init_args.resume or "allow"
