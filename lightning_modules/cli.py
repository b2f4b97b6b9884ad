"""The `imbsam` command: LightningCLI with our classes, defaults and one-line errors."""

import argparse
import errno
import itertools
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

import datamodules  # noqa: F401  the command line finds classes by their short names once they are imported
import lightning_modules  # noqa: F401
from imbsam import SettingError
from lightning_modules.callbacks import AccuracyTable, AnomalyTable, DiscardRefusedRun, PredictionsCSV
from lightning_modules.checkpoint import check_checkpoint, newest_checkpoint, newest_run, run_folder
from lightning_modules.cost import Cost
from lightning_modules.evaluation_files import EvaluationFiles
from lightning_modules.interruption import ResumableCheckpoint
from lightning_modules.sharpness import SharpnessTrainer
from lightning_modules.signals import Interrupted, StopSignals
from lightning_modules.weights_and_biases import WeightsAndBiases

INSTALLED = Path(__file__).parent.parent
"""The folder that holds `configs/`, in a checkout and in an installation."""

EVALUATION_SETTINGS = ("flip_tta", "channels_last", "compile")
"""The model's settings that do not belong to its weights."""

_ELSEWHERE = "set trainer.logger.init_args.save_dir, checkpoint.dirpath or predictions.path to a folder for writing"
_FULL = "free some space, and resume a training with --ckpt_path last"
UNWRITABLE = dict.fromkeys((errno.EACCES, errno.EEXIST, errno.ENOTDIR, errno.EPERM, errno.EROFS), _ELSEWHERE)
UNWRITABLE |= dict.fromkeys((errno.EDQUOT, errno.EFBIG, errno.ENOSPC), _FULL)
"""What an error of the file system asks for."""

EXPECTED_WARNINGS = [
    ".*overridden `on_before_batch_transfer`.*",  # LongTailedClassifier does, on purpose
    ".*Total length of `list` across ranks is zero.*",  # no validation split
    ".*The dirpath has changed from.*",  # a test or prediction logs to a folder of its own
    ".*Couldn't infer the batch indices.*",  # our batches come from a loader without a batch sampler
    ".*module.s. in eval mode at the start of training.*",  # a frozen backbone is, on purpose
    ".*LeafSpec.*",  # Lightning calls a deprecated torch function
]


class ImbSAMCLI(LightningCLI):
    """`imbsam fit | validate | test | predict | sharpness`; after `fit` the last epoch's weights are tested once.

    Args:
        signals: the program's, which are to know the processes that the trainer starts.
        *args: LightningCLI's.
        **kwargs: LightningCLI's.
    """

    def __init__(self, signals: StopSignals, *args: Any, **kwargs: Any) -> None:
        self._signals = signals
        super().__init__(*args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and `sharpness`; with the arguments that the command line does not offer."""
        return {**LightningCLI.subcommands(), "sharpness": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our checkpoint and predictions are configured like any other setting."""
        parser.add_lightning_class_args(ResumableCheckpoint, "checkpoint")
        parser.add_lightning_class_args(PredictionsCSV, "predictions")
        parser.add_lightning_class_args(WeightsAndBiases, "wandb")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Name the run's folder after its config, where nobody named it, and find the checkpoint."""
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        files = [Path(path.relative) for path in config.get("config") or []]
        logger = config.trainer.logger
        if files and getattr(logger, "class_path", "").endswith("CSVLogger") and logger.init_args.name == "":
            logger.init_args.name = str(Path(files[0].parent.name) / files[0].stem)
        self._go_on_in: Path | None = None
        self._restarting = config.get("ckpt_path") == "last"
        self._find_checkpoint()
        if self.config.subcommand == "fit":
            self._refuse_another_runs_folder()
        else:
            self._log_beside_the_runs()

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
        logger = config.trainer.logger
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
            raise SettingError("trainer.logger has a WandbLogger: set wandb.mode to offline or online instead")
        if config.trainer.enable_checkpointing is False:
            raise SettingError("trainer.enable_checkpointing is false: set checkpoint.save_last to false instead")
        if self._go_on_in is not None or not logger:
            self.save_config_callback = None  # the run's config.yaml stays, and without a log there is no folder for it

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Let the signals know of the processes that the trainer starts."""
        trainer = super().instantiate_trainer(**kwargs)
        self._signals.launcher = trainer.strategy.launcher
        return trainer

    def _find_checkpoint(self) -> None:
        """Turn `--ckpt_path last` into a path, refuse a file that is not whole, go on in the folder of its run."""
        subcommand = self.config.subcommand
        config = self.config[subcommand]
        asked = path = config.get("ckpt_path")
        logger = config.trainer.logger
        if path is None and subcommand != "fit":
            what = "measure" if subcommand == "sharpness" else subcommand
            raise SettingError(f"ckpt_path is null: name the checkpoint to {what} with --ckpt_path")
        if path in (None, "best"):
            return
        a_csv_log = getattr(logger, "class_path", "").endswith("CSVLogger")
        runs = Path(logger.init_args.save_dir) / (logger.init_args.name or "") if a_csv_log else None
        if path == "last":
            if runs is None:
                raise SettingError("ckpt_path is last: runs are looked up in the folder of a CSV log; name the file")
            path = newest_checkpoint(runs, logger.init_args.version)
            if path is None and subcommand != "fit":
                raise SettingError(f"ckpt_path is last: no run in {runs} has a checkpoint yet")
            newer = newest_run(runs) if path and logger.init_args.version is None else None
            newer = newer if path and newer != path.parent.parent else None
            if newer and subcommand == "fit":
                raise SettingError(
                    f"ckpt_path is last: the newest run, {newer}, ended before its first checkpoint; start anew "
                    f"without --ckpt_path, or resume an older run with --ckpt_path {path}"
                )
            found = f"checkpoint: {path}" + (f", since the newer run {newer.name} has none" if newer else "")
            _say(found if path else f"no run in {runs} has a checkpoint yet: starting anew")
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
            self._go_on_in = run

    def _refuse_another_runs_folder(self) -> None:
        """A training does not write over another one that had its version."""
        config = self.config[self.config.subcommand]
        logger = config.trainer.logger
        is_csv = getattr(logger, "class_path", "").endswith("CSVLogger")
        if not is_csv or logger.init_args.version is None or config.trainer.fast_dev_run or self._go_on_in:
            return
        version = logger.init_args.version
        run = run_folder(Path(logger.init_args.save_dir) / (logger.init_args.name or ""), version)
        if not any((run / name).exists() for name in ("config.yaml", "metrics.csv", "checkpoints")):
            return
        if self._restarting and not self._other_settings(run):
            return  # it ended before its first checkpoint
        mend = "leave it out for the next free number, or resume that run with --ckpt_path last"
        raise SettingError(f"trainer.logger.init_args.version is {version}: {run} holds another run; {mend}")

    def _log_beside_the_runs(self) -> None:
        """An evaluation's log has a folder of its own, test_0 beside version_0: a run's folder is the training's."""
        subcommand = self.config.subcommand
        loggers = self.config[subcommand].trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            settings: Any = getattr(logger, "init_args", {})
            if "version" in settings and "save_dir" in settings:
                runs = Path(settings.save_dir) / (settings.get("name") or "")
                number = next(n for n in itertools.count() if not (runs / f"{subcommand}_{n}").exists())
                settings.version = f"{subcommand}_{number}"

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
        """Test the last epoch's weights, of a run that was finished before too."""
        if self.trainer.state.finished:
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)


class SaveConfigOnce(SaveConfigCallback):
    """Write ``config.yaml`` unless there is one: some loggers have one folder for all runs, or the current one."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file, at the first stage."""
        path = Path(trainer.log_dir or "") / self.config_filename  # every rank takes part in log_dir
        if not self.already_saved and trainer.strategy.broadcast(path.exists()):
            rank_zero_warn(f"{path} is there already and stays: the settings of this run are not saved")
            self.already_saved = True
        super().setup(trainer, pl_module, stage)


def _flat(settings: Any, name: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    if not isinstance(settings, dict):
        return {name: settings}
    return {k: v for key, inner in settings.items() for k, v in _flat(inner, f"{name}.{key}".lstrip(".")).items()}


def main() -> None:
    """Run the command line without `report`, see `report/entry.py`.

    A wrong setting is one line and exit code 2. A training that SIGTERM or SIGUSR1 ended after a checkpoint is one line
    and 0, or 130 after SIGINT (Ctrl-C); where a signal ended the program at once, 128 and its number.
    """
    sys.argv[1:] = _find_configs(sys.argv[1:])
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip" not in record.getMessage()
    )
    signals = StopSignals(deferred=False)
    signals.install()
    try:
        ImbSAMCLI(
            signals,
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            trainer_class=SharpnessTrainer,
            trainer_defaults={
                "logger": {
                    "class_path": "lightning_modules.csv_logger.ResumableCSVLogger",
                    "init_args": {"save_dir": "logs", "name": ""},
                },
                "callbacks": [AccuracyTable(), AnomalyTable(), EvaluationFiles(), Cost(), DiscardRefusedRun()],
            },
            save_config_callback=SaveConfigOnce,
            parser_kwargs={
                "exit_on_error": False,
                "epilog": "Beside these: imbsam report RUN [RUN ...] compares finished runs; see imbsam report --help.",
            },
        )
    except Interrupted as interrupted:
        _say(str(interrupted))
        if interrupted.at_once:
            signals.end_launched()
        if interrupted.exit_code:
            sys.exit(interrupted.exit_code)
    except Exception as error:
        if signals.received:  # another process stopped at once, and this one has missed it
            signals.end_launched()
            sys.exit(128 + signals.received)
        line = _one_line(error)
        if line is None:
            raise
        print(f"imbsam: error: {line}", file=sys.stderr)
        signals.end_launched()
        sys.exit(2)
    finally:
        signals.remove()


@rank_zero_only
def _say(line: str) -> None:
    print(f"imbsam: {line}")


def _one_line(error: BaseException | None) -> str | None:
    """What a wrong setting or argument says, or None where the error is a bug and its traceback is wanted."""
    if isinstance(error, OSError) and error.errno in UNWRITABLE:  # of the error itself, not of what led to it
        return f"{error.filename or 'a file of the run'}: {error.strerror}: {UNWRITABLE[error.errno]}"
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
