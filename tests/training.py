"""What the tests of trainings share: a quiet Trainer, and how a run's tables are read."""

import csv
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

RANKS = [
    "fit",
    "--config=configs/data/digits_lt.yaml",
    "--trainer.accelerator=cpu",
    "--trainer.strategy=ddp",
    "--trainer.max_epochs=2",
    "--trainer.log_every_n_steps=2",
    "--model.lr_scheduler.init_args.T_max=2",
    "--checkpoint.every_seconds=0",
    "--ckpt_path=last",
]
"""Arguments of a short run of the command on any number of processes; it resumes where there is a checkpoint."""
QUIET = {"enable_progress_bar": False, "enable_model_summary": False}


def quiet_trainer(**settings: Any) -> Trainer:
    """One epoch on the CPU, without bar, summary, log and checkpoints, unless `settings` say otherwise."""
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_checkpointing": False}
    return Trainer(**{**defaults, **QUIET, **settings})


def sgd(params: Any) -> torch.optim.Optimizer:
    """SGD at a rate at which the small networks of the tests learn in few steps."""
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def csv_rows(path: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV file, such as a run's metrics.csv."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
