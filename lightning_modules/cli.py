"""The `imbsam` command: LightningCLI with our classes, defaults and one-line errors."""

import argparse
import importlib.util
import logging
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import dict_to_namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.core.saving import load_hparams_from_yaml
from lightning.pytorch.utilities import rank_zero_only

import datamodules  # noqa: F401  the command line finds classes by their short names once they are imported
import imbsam
import lightning_modules  # noqa: F401
from imbsam import SettingError
from lightning_modules.callbacks import AccuracyTable, AnomalyTable, DiscardRefusedRun, PredictionsCSV
from lightning_modules.checkpoint import check_checkpoint, newest_checkpoint
from lightning_modules.class_table import ClassTable
from lightning_modules.convergence import Convergence
from lightning_modules.cost import Cost
from lightning_modules.data_check import DataCheckTrainer
from lightning_modules.evaluation_files import EvaluationFiles
from lightning_modules.interruption import Interrupted, ResumableCheckpoint
from lightning_modules.seeds import FLAG, apply_seed, fresh_processes, split_seeds
from lightning_modules.weights_and_biases import WandbResults

PACKAGE = Path(imbsam.__file__).parent
"""`configs/` is inside the package in an installation, and beside it in a checkout."""

CSV_LOGGER = "lightning_modules.csv_logger.ResumableCSVLogger"

EVALUATION_SETTINGS = ("flip_tta", "channels_last", "compile")
"""The model's settings that do not belong to its weights."""

EXPECTED_WARNINGS = [
    ".*overridden `on_before_batch_transfer`.*",  # LongTailedClassifier does, on purpose
    ".*Total length of `list` across ranks is zero.*",  # no validation split
    ".*The dirpath has changed from.*",  # a test or prediction logs to a folder of its own
    ".*Couldn't infer the batch indices.*",  # our batches come from a loader without a batch sampler
    ".*module.s. in eval mode at the start of training.*",  # a frozen backbone is, on purpose
    ".*LeafSpec.*",  # Lightning calls a deprecated torch function
]


class ImbSAMCLI(LightningCLI):
    """Lightning's commands, `sharpness` and `check`; after `fit` the last epoch's weights are tested once."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and ours; with the arguments that the command line does not offer."""
        own = {"model", "datamodule"}
        return {**LightningCLI.subcommands(), "sharpness": own, "check": own}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our checkpoint and predictions are configured like any other setting."""
        parser.add_lightning_class_args(ResumableCheckpoint, "checkpoint")
        parser.add_lightning_class_args(PredictionsCSV, "predictions")
        parser.add_argument(FLAG, type=int, nargs="+", help="Train once for each seed, of the run and of the data.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Name the run's folder after its config, where nobody named it, and find the checkpoint."""
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        apply_seed(config)
        files = [Path(path.relative) for path in config.get("config") or []]
        folder = str(Path(files[0].parent.name) / files[0].stem) if files else ""
        self._give_wandb_a_run_folder()
        for logger in self._loggers("CSVLogger"):
            logger.init_args.name = folder if logger.init_args.name == "" else logger.init_args.name
            for wandb in self._loggers("WandbLogger"):
                wandb.init_args.name = wandb.init_args.name or logger.init_args.name or None
                wandb.init_args.group = wandb.init_args.group or logger.init_args.name or None
        self._go_on_in: Path | None = None
        self._find_checkpoint()

    def _parse_ckpt_path(self) -> None:
        """LightningCLI lets the checkpoint's model settings win over the command line's; not in a training.

        Nor those that say how to evaluate: there the command line and its config win.
        """
        subcommand = self.config.subcommand
        if subcommand == "fit":
            return
        given = self.config[subcommand].model.init_args
        asked = {name: given[name] for name in EVALUATION_SETTINGS if name in given}
        super()._parse_ckpt_path()
        for name, value in asked.items():
            self.config[subcommand].model.init_args[name] = value

    def before_instantiate_classes(self) -> None:
        """Refuse what Lightning would only trip over."""
        config = self.config[self.subcommand]
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
        if config.trainer.enable_checkpointing is False:
            raise SettingError("trainer.enable_checkpointing is false: set checkpoint.save_last to false instead")
        if self._go_on_in is not None:
            self.save_config_callback = None  # the run's config.yaml stays

    def _loggers(self, name: str) -> list[Any]:
        """The settings of the loggers whose class name ends so."""
        loggers = self.config[self.config.subcommand].trainer.logger
        loggers = loggers if isinstance(loggers, list) else [loggers]
        return [logger for logger in loggers if getattr(logger, "class_path", "").endswith(name)]

    def _give_wandb_a_run_folder(self) -> None:
        """Beside a WandbLogger there is a CSV log, and it comes first: its folder is the run's."""
        wandb, csv = self._loggers("WandbLogger"), self._loggers("CSVLogger")
        if not wandb:
            return
        if importlib.util.find_spec("wandb") is None:
            raise SettingError('trainer.logger is WandbLogger, but wandb is not installed: pip install "wandb>=0.31"')
        if not csv:
            settings = wandb[0].init_args
            save_dir = "logs" if settings.save_dir in (None, ".") else settings.save_dir  # Lightning's default is "."
            init_args = {"save_dir": save_dir, "name": settings.name or "", "version": None}
            csv = [dict_to_namespace({"class_path": CSV_LOGGER, "init_args": init_args})]
        trainer = self.config[self.config.subcommand].trainer
        loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
        trainer.logger = [*csv, *(logger for logger in loggers if logger not in csv)]
        for logger in wandb:
            if logger.init_args.offline and logger.init_args.log_model:
                raise SettingError(
                    f"trainer.logger.init_args.log_model is {logger.init_args.log_model}: Lightning uploads no "
                    "checkpoints offline; set it to false, or offline to false"
                )
            # jsonargparse passes the default of wandb.init in place of WandbLogger's
            logger.init_args.resume = logger.init_args.resume or "allow"

    def _find_checkpoint(self) -> None:
        """Turn `--ckpt_path last` into a path, refuse a file that is not whole, go on in the folder of its run."""
        subcommand = self.config.subcommand
        config = self.config[subcommand]
        asked = path = config.get("ckpt_path")
        logger: Any = next(iter(self._loggers("CSVLogger")), None)
        if path is None and subcommand not in ("fit", "check"):
            what = "measure" if subcommand == "sharpness" else subcommand
            raise SettingError(f"ckpt_path is null: name the checkpoint to {what} with --ckpt_path")
        if path in (None, "best"):
            return
        runs = Path(logger.init_args.save_dir) / (logger.init_args.name or "") if logger else None
        if path == "last":
            if runs is None:
                raise SettingError("ckpt_path is last: runs are looked up in the folder of a CSV log; name the file")
            path = newest_checkpoint(runs, logger.init_args.version)
            if path is None and subcommand != "fit":
                raise SettingError(f"ckpt_path is last: no run in {runs} has a checkpoint yet")
            _say(f"no run in {runs} has a checkpoint yet: starting anew" if path is None else f"checkpoint: {path}")
        elif not Path(path).exists():
            raise SettingError(f"ckpt_path is {path}: there is no such file; a run keeps checkpoints/last.ckpt")
        config.ckpt_path = path and str(path)
        if path is None:
            return
        check_checkpoint(Path(path))
        run = Path(path).parent.parent
        if subcommand == "fit" and (differing := self._other_settings(run)):
            if asked == "last":
                raise SettingError(
                    f"ckpt_path is last: {run} was trained with {differing[0]}; name the checkpoint to go on with "
                    "other settings, or train in another folder with --trainer.logger.init_args.save_dir"
                )
            _say(f"other settings than in {run / 'config.yaml'}: {', '.join(differing)}")
        if subcommand == "fit" and runs and run.parent.resolve() == runs.resolve():
            version = run.name.removeprefix("version_")
            logger.init_args.version = int(version) if version.isdigit() else run.name
            if logger.class_path.endswith("ResumableCSVLogger"):
                logger.init_args.resume = True
            for wandb in self._loggers("WandbLogger"):
                earlier = load_hparams_from_yaml(run / "hparams.yaml").get("wandb_id")
                wandb.init_args.id = wandb.init_args.version or wandb.init_args.id or earlier
            self._go_on_in = run

    def _other_settings(self, run: Path) -> list[str]:
        """The settings of model, data and seed in which this training differs from a run's config.yaml."""
        if not (run / "config.yaml").exists():
            return []
        subcommand = self.config.subcommand
        dumped = self._parser(subcommand).dump(self.config[subcommand], skip_link_targets=False)
        now, then = (_flat(yaml.safe_load(text)) for text in (dumped, (run / "config.yaml").read_text()))
        return [
            f"{key} {then[key]}, not {now[key]}"
            for key in now.keys() & then.keys()
            if now[key] != then[key]
            and key.split(".")[0] in ("model", "data", "seed_everything")
            and key.split(".")[-1] not in ("root", "num_workers")  # where the data lie and who reads them
        ]

    def before_validate(self) -> None:
        """Without a validation split there is nothing to do."""
        if getattr(self.datamodule, "val_share", None) == 0 and not getattr(self.datamodule, "own_validation", False):
            raise SettingError("data.val_share is 0: there is no validation split; set it, or run test")

    def after_fit(self) -> None:
        """Test the last epoch's weights, of a run that was finished before too; with it the W&B run ends."""
        if self.trainer.state.finished:
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        if "wandb" in sys.modules:  # Lightning leaves it to the end of the program, where the next seed would log to it
            sys.modules["wandb"].finish()


def _flat(settings: Any, name: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    if not isinstance(settings, dict):
        return {name: settings}
    return {k: v for key, inner in settings.items() for k, v in _flat(inner, f"{name}.{key}".lstrip(".")).items()}


def main() -> None:
    """Run the command line without `report`, see `imbsam/command.py`; `fit --seeds 0 1 2` trains once for each."""
    try:
        runs = split_seeds(_find_configs(sys.argv[1:]))
    except SettingError as error:
        print(f"imbsam: error: {error}", file=sys.stderr)
        sys.exit(2)
    for args in runs:
        sys.argv[1:] = args  # Lightning starts further processes with it
        with fresh_processes() if len(runs) > 1 else nullcontext():
            run()


def run() -> None:
    """Run `sys.argv`. A wrong setting is one line and exit code 2, an interruption one line and 0."""
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
            trainer_class=DataCheckTrainer,
            trainer_defaults={
                "logger": {
                    "class_path": CSV_LOGGER,
                    "init_args": {"save_dir": "logs", "name": ""},
                },
                "callbacks": [
                    ClassTable(),
                    Convergence(),
                    AccuracyTable(),
                    AnomalyTable(),
                    EvaluationFiles(),
                    Cost(),
                    WandbResults(),
                    DiscardRefusedRun(),
                ],
            },
            save_config_kwargs={"overwrite": True},  # loggers other than the CSV log have one folder for all runs
            parser_kwargs={"exit_on_error": False},
        )
    except Interrupted as interrupted:  # a wanted end: the next job goes on
        _say(str(interrupted))
        sys.exit(0)  # no further seed either
    except Exception as error:
        line = _one_line(error)
        if line is None:
            raise
        print(f"imbsam: error: {line}", file=sys.stderr)
        sys.exit(2)


@rank_zero_only
def _say(line: str) -> None:
    print(f"imbsam: {line}")


def _one_line(error: BaseException | None) -> str | None:
    """What a wrong setting or argument says, or None where the error is a bug and its traceback is wanted."""
    while error is not None:
        if isinstance(error, SettingError):  # jsonargparse wraps what a constructor raises
            return str(error)
        if isinstance(error, MisconfigurationException):
            return " ".join(str(error).split())
        if isinstance(error, getattr(sys.modules.get("wandb"), "Error", ())):
            return f"trainer.logger is WandbLogger: {' '.join(str(error).split())} (offline: true needs no account)"
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
    """`configs/...` that is not in the current folder is looked for in the installation, or in the checkout."""

    def find(value: str) -> str:
        if value.startswith("configs/") and not Path(value).exists():
            return next((str(home / value) for home in (PACKAGE, PACKAGE.parent) if (home / value).exists()), value)
        return value

    return ["--config=" + find(a.removeprefix("--config=")) if a.startswith("--config=") else find(a) for a in args]


if __name__ == "__main__":
    main()
