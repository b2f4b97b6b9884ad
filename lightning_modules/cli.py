"""The `imbsam` command: LightningCLI with our classes, defaults and one-line errors."""

import argparse
import logging
import sys
import warnings
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import datamodules  # noqa: F401  the command line finds classes by their short names once they are imported
import lightning_modules  # noqa: F401
from imbsam import SettingError
from lightning_modules.callbacks import AccuracyTable, DiscardRefusedRun, PredictionsCSV
from lightning_modules.cost import Cost
from lightning_modules.evaluation_files import EvaluationFiles
from lightning_modules.weights_and_biases import WeightsAndBiases

INSTALLED = Path(__file__).parent.parent
"""The folder that holds `configs/`, in a checkout and in an installation."""

EXPECTED_WARNINGS = [
    ".*overridden `on_before_batch_transfer`.*",  # LongTailedClassifier does, on purpose
    ".*Total length of `list` across ranks is zero.*",  # no validation split
    ".*The dirpath has changed from.*",  # a test or prediction logs to a folder of its own
    ".*LeafSpec.*",  # Lightning calls a deprecated torch function
]


class ImbSAMCLI(LightningCLI):
    """`imbsam fit | validate | test | predict`; after `fit` the last epoch's weights are tested once."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our checkpoint and predictions are configured like any other setting."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.save_top_k": 0})  # one file, last.ckpt
        parser.add_lightning_class_args(PredictionsCSV, "predictions")
        parser.add_lightning_class_args(WeightsAndBiases, "wandb")

    def before_instantiate_classes(self) -> None:
        """Name the run's folder after its config, where nobody named it; refuse what Lightning would only trip over."""
        config = self.config[self.subcommand]
        files = [Path(path.relative) for path in config.get("config") or []]
        logger = config.trainer.logger
        if files and getattr(logger, "class_path", "").endswith("CSVLogger") and logger.init_args.name == "":
            logger.init_args.name = str(Path(files[0].parent.name) / files[0].stem)
        if config.trainer.fast_dev_run:
            config.checkpoint.save_last = False
        if self.subcommand == "test":
            config.verbose = False  # the table says it all
        for name, unset in (("accumulate_grad_batches", (None, 1)), ("gradient_clip_val", (None,))):
            if config.trainer[name] not in unset:
                raise SettingError(
                    f"trainer.{name} is {config.trainer[name]}: Lightning does that for automatic optimization only; "
                    f"set model.{name}"
                )
        if "WandbLogger" in str(logger):
            raise SettingError(
                "trainer.logger has a WandbLogger: set wandb.mode to offline or online instead"
            )
        if config.trainer.enable_checkpointing is False:
            raise SettingError("trainer.enable_checkpointing is false: set checkpoint.save_last to false instead")
        path = config.get("ckpt_path")
        if path is None and self.subcommand != "fit":
            raise SettingError(f"ckpt_path is null: name the checkpoint to {self.subcommand} with --ckpt_path")
        if path not in (None, "last", "best") and not Path(path).exists():
            raise SettingError(f"ckpt_path is {path}: there is no such file; a run keeps checkpoints/last.ckpt")

    def before_validate(self) -> None:
        """Without a validation split there is nothing to do."""
        if getattr(self.datamodule, "val_share", None) == 0:
            raise SettingError("data.val_share is 0: there is no validation split; set it, or run test")

    def after_fit(self) -> None:
        """Test the last epoch's weights."""
        if self.trainer.state.finished:
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)


def main() -> None:
    """Run the command line without `report`, see `report/entry.py`; a wrong setting is one line and exit code 2."""
    sys.argv[1:] = _find_configs(sys.argv[1:])
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip" not in record.getMessage()
    )
    try:
        ImbSAMCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            trainer_defaults={
                "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "logs", "name": ""}},
                "callbacks": [AccuracyTable(), EvaluationFiles(), Cost(), DiscardRefusedRun()],
            },
            save_config_kwargs={"overwrite": True},  # loggers other than the CSV log have one folder for all runs
            parser_kwargs={
                "exit_on_error": False,
                "epilog": "Beside these: imbsam report RUN [RUN ...] compares finished runs; see imbsam report --help.",
            },
        )
    except Exception as error:
        line = _one_line(error)
        if line is None:
            raise
        print(f"imbsam: error: {line}", file=sys.stderr)
        sys.exit(2)


def _one_line(error: BaseException | None) -> str | None:
    """What a wrong setting or argument says, or None where the error is a bug and its traceback is wanted."""
    while error is not None:
        if isinstance(error, SettingError):  # jsonargparse wraps what a constructor raises
            return str(error)
        if isinstance(error, MisconfigurationException):
            return " ".join(str(error).split())
        if isinstance(error, argparse.ArgumentError) and not isinstance(error.__cause__, SettingError):
            return _shorten(str(error))
        error = error.__cause__ or error.__context__
    return None


def _shorten(message: str) -> str:
    """Of jsonargparse's report on every type that a value was tried as, the lines that say what is wrong."""
    noise = ("Does not validate", "Subtypes:", "Errors:", "- Expected a <class 'NoneType'>", "Given value")
    lines = [line.strip() for line in message.splitlines()]
    return " ".join(line for line in lines if not line.startswith(noise))


def _find_configs(args: list[str]) -> list[str]:
    """`configs/...` that is not in the current folder is looked for beside the installed packages."""

    def find(value: str) -> str:
        if value.startswith("configs/") and not Path(value).exists() and (INSTALLED / value).exists():
            return str(INSTALLED / value)
        return value

    return ["--config=" + find(a.removeprefix("--config=")) if a.startswith("--config=") else find(a) for a in args]


if __name__ == "__main__":
    main()
