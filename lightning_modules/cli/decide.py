"""`imbsam decide`: calibration, decisions and drift of a finished run, fitted again without training."""

import inspect
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from imbsam import SettingError
from lightning_modules.callbacks.calibration import Calibration
from lightning_modules.callbacks.decisions import Decisions
from lightning_modules.callbacks.drift import Drift
from lightning_modules.callbacks.fitted_callback import FittedCallback, fitted_callbacks
from lightning_modules.resuming.checkpoint_files import AtomicCheckpointIO
from lightning_modules.validation_part import validation_predictions

CHOICES: dict[type[FittedCallback], tuple[str, ...]] = {
    Calibration: ("method",),
    Decisions: ("recall", "precision", "false_alarms", "costs", "coverage"),
    Drift: ("alpha",),
}
"""Settings that say what is to be fitted. Where one is given, the checkpoint's settings of that callback are not used;
the others (a prior, a confidence) change the checkpoint's."""


class FitAgain(Callback):
    """Fits the Trainer's calibration, decisions and drift when a validation ends."""

    def __init__(self) -> None:
        self.done = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be fitted, before anything is predicted."""
        for callback in fitted_callbacks(trainer):
            callback.check_model(pl_module)
            callback.check(trainer, pl_module)

    @torch.inference_mode(False)  # vector scaling needs gradients
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit; unlike at the end of a training, what cannot be fitted ends the command."""
        predictions, labels = validation_predictions(trainer, pl_module)
        for callback in fitted_callbacks(trainer):
            callback.fit_to(trainer, pl_module, predictions, labels)
        self.done = True


def take_over_settings(settings: Any, checkpoint: Mapping[str, Any], path: Path) -> None:
    """Complete the settings of calibration, decisions and drift by those of a checkpoint.

    Args:
        settings: the parsed settings, with ``calibration``, ``decisions`` and ``drift``; changed in place.
        checkpoint: the checkpoint.
        path: its file, for the message.

    Raises:
        SettingError: neither says what to fit.
    """
    nothing = True
    for callback, choices in CHOICES.items():
        given = settings[callback.name]
        if all(given[name] is None for name in choices):
            saved = checkpoint.get("callbacks", {}).get(callback.__qualname__, {}).get("settings", {})
            defaults = inspect.signature(callback).parameters
            for name, value in saved.items():
                if given[name] == defaults[name].default:
                    given[name] = value
        nothing = nothing and all(given[name] is None for name in choices)
    if nothing:
        raise SettingError(
            f"ckpt_path is {path}: it has neither calibration nor decisions: say what to fit, with "
            "--decisions.recall, precision, false_alarms, costs or coverage, --calibration.method or --drift.alpha"
        )


def check_validation_part(data: LightningDataModule, trained: Mapping[str, Any]) -> None:
    """Refuse to fit on samples that the model was trained on.

    Args:
        data: the data.
        trained: settings of the data that the checkpoint was trained with; of other data (another class, or another
            file) none is compared.

    Raises:
        SettingError: a setting that splits the data is not the checkpoint's.
    """
    now = data.hparams
    if any(name in trained and str(trained[name]) != str(now.get(name)) for name in ("_class_path", "path")):
        return
    splits = ("ratio", "profile", "draw", "val_share", "test_share", "labelled_share", "min_rows", "max_rows", "seed")
    for name in splits:
        if name in trained and name in now and trained[name] != now[name]:
            raise SettingError(
                f"data.{name} is {now[name]} and the checkpoint was trained with {trained[name]}, so that samples of "
                "its training would be among those that are decided by: leave it out, or name other data"
            )


def new_file(asked: str | None, checkpoint: Path) -> Path:
    """Where the checkpoint is written: as asked, or decided.ckpt, decided-v1.ckpt, ... beside the old one.

    Raises:
        SettingError: the checkpoint is a folder, or there is such a file: none is ever overwritten.
    """
    if checkpoint.is_dir():
        raise SettingError(f"ckpt_path is {checkpoint}: it is sharded, and decide writes one file: name a last.ckpt")
    if asked is None:
        names = itertools.chain(["decided.ckpt"], (f"decided-v{n}.ckpt" for n in itertools.count(1)))
        return next(path for name in names if not (path := checkpoint.with_name(name)).exists())
    if Path(asked).exists():
        raise SettingError(f"output is {asked}: there is such a file, and decide overwrites none: name another one")
    return Path(asked)


def write_fits(trainer: Trainer, checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint with the Trainer's calibration, decisions and drift in place of its own."""
    fits = {callback.state_key: callback.state_dict() for callback in fitted_callbacks(trainer)}
    callbacks = {**checkpoint.get("callbacks", {}), **fits}
    AtomicCheckpointIO().save_checkpoint({**checkpoint, "callbacks": callbacks}, path)
