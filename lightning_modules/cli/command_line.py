"""The `imbsam` command: LightningCLI with our classes, defaults and one-line errors."""

import argparse
import importlib.util
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import dict_to_namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.core.saving import load_hparams_from_yaml
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

import datamodules  # noqa: F401  the command line finds classes by their short names once they are imported
import lightning_modules  # noqa: F401
from imbsam import SettingError
from lightning_modules.callbacks.calibration import Calibration
from lightning_modules.callbacks.decisions import Decisions
from lightning_modules.callbacks.network_summary import NetworkSummary
from lightning_modules.callbacks.predictions import PredictionsCSV
from lightning_modules.cli.seeds import FLAG, apply_seed
from lightning_modules.resuming.checkpoint_contents import NETWORK_SETTINGS, check_class, read_checkpoint, saved_classes
from lightning_modules.resuming.checkpoint_files import check_checkpoint, newest_checkpoint, newest_run, run_folder
from lightning_modules.resuming.resumable_checkpoint import ResumableCheckpoint
from lightning_modules.resuming.signals import StopSignals

CSV_LOGGER = "lightning_modules.resuming.csv_logger.ResumableCSVLogger"

EVALUATION_SETTINGS = ("flip_tta", "channels_last", "compile", "many", "few", "budget")
"""The model's settings that do not belong to its weights: those on the command line win over the checkpoint's."""


class ImbSAMCLI(LightningCLI):
    """Lightning's commands, `sharpness` and `check`; after `fit` the last epoch's weights are tested once.

    Args:
        signals: the program's, which are to know the processes that the trainer starts.
        *args: LightningCLI's.
        **kwargs: LightningCLI's.
    """

    def __init__(self, signals: StopSignals, *args: Any, **kwargs: Any) -> None:
        self._signals = signals
        super().__init__(*args, **kwargs)
        if "wandb" in sys.modules:  # Lightning leaves the run to the end of the program; the next seed would log to it
            sys.modules["wandb"].finish()

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and ours; with the arguments that the command line does not offer."""
        own = {"model", "datamodule"}
        return {**LightningCLI.subcommands(), "sharpness": own, "check": own}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our checkpoint, predictions, calibration and decisions are configured like any other setting."""
        parser.add_lightning_class_args(ResumableCheckpoint, "checkpoint")
        parser.add_lightning_class_args(PredictionsCSV, "predictions")
        parser.add_lightning_class_args(Calibration, "calibration")  # before what decides by it
        parser.add_lightning_class_args(Decisions, "decisions")
        parser.add_argument(FLAG, type=int, nargs="+", help="Train once for each seed, of the run and of the data.")

    def setup_parser(self, *args: Any) -> None:
        """Where one process is all that there can be, one is the default, whatever the machine has."""
        super().setup_parser(*args)
        for subcommand in ("predict", "sharpness"):
            self._parser(subcommand).set_defaults({"trainer.devices": 1})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Name the run's folder after its config, where nobody named it, and find the checkpoint.

        A checkpoint that is evaluated or predicted with knows its model and its data: their classes and settings are
        the defaults, which configs and the command line change. Other data take nothing of them.
        """
        self._trained: dict[str, Any] | None = None
        self._unknown_data: str | None = None
        subcommand, path = _evaluated(sys.argv[1:])
        if path is not None:
            self._take_over(subcommand, Path(path))
        self._parse(parser, args)
        self._go_on_in: Path | None = None
        self._restarting = self.config[self.config.subcommand].get("ckpt_path") == "last"
        self._find_checkpoint()
        found = self.config[self.config.subcommand].get("ckpt_path")
        if found and self.config.subcommand != "fit" and self._trained is None:  # it was found by "last" or in a config
            self._take_over(self.config.subcommand, Path(found))
            self._parse(parser, args)
            self.config[self.config.subcommand].ckpt_path = found

        if self.config.subcommand == "fit":
            self._refuse_another_runs_folder()
        else:
            self._log_beside_the_runs()

    def _parse(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            super().parse_arguments(parser, args)
        except argparse.ArgumentError as error:
            if self._unknown_data is None:
                raise
            raise SettingError(
                f"the checkpoint's data cannot be built ({self._unknown_data}): add the folder of their module to "
                "PYTHONPATH, or name other data with --data"
            ) from error
        subcommand = self.config.subcommand
        saved, given = saved_classes(self._trained or {}).get("data"), self.config[subcommand].get("data")
        if saved and given and saved["class_path"].rpartition(".")[2] != given.class_path.rpartition(".")[2]:
            self._parser(subcommand).set_defaults({"data": None})
            super().parse_arguments(parser, args)
        self._name_run()

    def _take_over(self, subcommand: str, path: Path) -> None:
        """Make model and data of a checkpoint the defaults of a subcommand."""
        check_checkpoint(_existing(path))
        self._trained = read_checkpoint(path)
        for key, settings in saved_classes(self._trained).items():
            try:
                self._parser(subcommand).set_defaults({key: settings})
            except (argparse.ArgumentError, ImportError, AttributeError, ValueError, TypeError, KeyError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                self._unknown_data = f"{settings['class_path']}: {reason}"  # other data may be given
                if key == "model":
                    raise SettingError(
                        f"ckpt_path is {path}: its model cannot be built ({self._unknown_data}): add the folder of its "
                        "module to PYTHONPATH"
                    ) from error

    def _name_run(self) -> None:
        """Name the run's folder after its config, or put it beside the checkpoint's."""
        config = self.config[self.config.subcommand]
        apply_seed(config)
        self._give_wandb_a_run_folder()
        for logger in self._loggers("CSVLogger"):
            settings = logger.init_args
            settings.name = self._experiment(Path(settings.save_dir)) if settings.name == "" else settings.name
            for wandb in self._loggers("WandbLogger"):
                wandb.init_args.name = wandb.init_args.name or settings.name or None
                wandb.init_args.group = wandb.init_args.group or settings.name or None

    def _experiment(self, save_dir: Path) -> str:
        """The folder of the runs inside `save_dir`: by the configs, or the checkpoint's."""
        config = self.config[self.config.subcommand]
        if files := [Path(path.relative) for path in config.get("config") or []]:
            method = getattr(config.model.init_args.get("sam"), "class_path", config.model.init_args.get("sam"))
            return experiment_name(files, str(method).rpartition(".")[2].lower())
        if self._trained is not None:
            runs, logs = _run_of(config.ckpt_path).parent.resolve(), save_dir.resolve()
            if runs != logs and runs.is_relative_to(logs):
                return str(runs.relative_to(logs))
        return ""

    def _parse_ckpt_path(self) -> None:
        """LightningCLI lets the checkpoint's model settings win over the command line's; not in a training.

        Nor those that say how to evaluate: there the command line and its config win. Nor those that say what the
        weights are of: another network than the checkpoint's is refused when they are loaded.
        """
        subcommand = self.config.subcommand
        saved = saved_classes(self._trained or {}).get("model")
        if subcommand == "fit" or saved is None:
            return
        model = self.config[subcommand].model
        check_class(saved["class_path"], [model.class_path.rpartition(".")[2]])
        own = (*EVALUATION_SETTINGS, *NETWORK_SETTINGS)
        settings = {name: value for name, value in saved["init_args"].items() if name not in own}
        settings = {subcommand: {"model": {"class_path": model.class_path, "dict_kwargs": settings}}}
        self.config = self.parser.parse_object(settings, self.config)

    def before_instantiate_classes(self) -> None:
        """Refuse what Lightning would only trip over."""
        config = self.config[self.subcommand]
        if config.trainer.fast_dev_run:
            config.checkpoint.save_last = False
        if config.trainer.enable_model_summary is False:
            callbacks = self.trainer_defaults["callbacks"]
            self.trainer_defaults["callbacks"] = [c for c in callbacks if not isinstance(c, NetworkSummary)]
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
        if self._go_on_in is not None or not config.trainer.logger:
            self.save_config_callback = None  # the run's config.yaml stays, and without a log there is no folder for it

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Let the signals know of the processes that the trainer starts."""
        trainer = super().instantiate_trainer(**kwargs)
        self._signals.launcher = trainer.strategy.launcher
        return trainer

    def _loggers(self, name: str | tuple[str, ...]) -> list[Any]:
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
        """Turn `--ckpt_path last` into a path, refuse a file that is not whole, resume in the folder of its run."""
        subcommand = self.config.subcommand
        config = self.config[subcommand]
        asked = path = config.get("ckpt_path")
        logger: Any = next(iter(self._loggers("CSVLogger")), None)
        if path is None and subcommand not in ("fit", "check"):
            what = "measure" if subcommand == "sharpness" else subcommand
            raise SettingError(f"ckpt_path is null: name the checkpoint to {what} with --ckpt_path")
        if path is None:
            return
        runs = Path(logger.init_args.save_dir) / (logger.init_args.name or "") if logger else None
        if path in ("last", "best"):
            if runs is None:
                raise SettingError(
                    f"ckpt_path is {asked}: runs are looked up in the folder of a CSV log; name the file"
                )
            path = newest_checkpoint(runs, logger.init_args.version)
            if path is None and (subcommand != "fit" or asked == "best"):
                raise SettingError(f"ckpt_path is {asked}: no run in {runs} has a checkpoint yet")
            if path is not None and asked == "best":
                path = path.with_name("best.ckpt")
                if not path.exists():
                    raise SettingError(
                        f"ckpt_path is best: {path.parent.parent} has no best.ckpt, which a training keeps where it "
                        "has a validation set (data.val_share); name another one, or last"
                    )
            newer = newest_run(runs) if path and logger.init_args.version is None else None
            newer = newer if path and newer != _run_of(path) else None
            if newer and subcommand == "fit":
                raise SettingError(
                    f"ckpt_path is {asked}: the newest run, {newer}, ended before its first checkpoint; start over "
                    f"without --ckpt_path, or resume an older run with --ckpt_path {path}"
                )
            found = f"checkpoint: {path}" + (f", since the newer run {newer.name} has none" if newer else "")
            say(found if path else f"no run in {runs} has a checkpoint yet: starting a new run")
        elif subcommand == "fit":
            _existing(Path(path))
        config.ckpt_path = path and str(path)
        if path is None or subcommand != "fit":
            return
        check_checkpoint(Path(path))
        read_checkpoint(Path(path), config.get("weights_only") is not False)
        run = _run_of(path)
        if differing := self._other_settings(run):
            if asked == "last":
                raise SettingError(
                    f"ckpt_path is last: {run} was trained with {differing[0]}; name the checkpoint to resume with "
                    "other settings, or train in another folder with --trainer.logger.init_args.save_dir"
                )
            say(f"other settings than in {run / 'config.yaml'}: {', '.join(differing)}")
        if runs and run.parent.resolve() == runs.resolve():
            version = run.name.removeprefix("version_")
            logger.init_args.version = int(version) if version.isdigit() else run.name
            if logger.class_path.endswith("ResumableCSVLogger"):
                logger.init_args.resume = True
            for wandb in self._loggers("WandbLogger"):
                earlier = load_hparams_from_yaml(run / "hparams.yaml").get("wandb_id")
                wandb.init_args.id = wandb.init_args.version or wandb.init_args.id or earlier
            self._go_on_in = run

    def _refuse_another_runs_folder(self) -> None:
        """A training does not write over another one that had its version."""
        config = self.config[self.config.subcommand]
        logger = next(iter(self._loggers("CSVLogger")), None)
        if logger is None or logger.init_args.version is None or config.trainer.fast_dev_run or self._go_on_in:
            return
        version = logger.init_args.version
        run = run_folder(Path(logger.init_args.save_dir) / (logger.init_args.name or ""), version)
        if not any((run / name).exists() for name in ("config.yaml", "metrics.csv", "checkpoints")):
            return
        if self._restarting and not self._other_settings(run):
            return  # it ended before its first checkpoint
        fix = "leave it out for the next free number, or resume that run with --ckpt_path last"
        raise SettingError(f"trainer.logger.init_args.version is {version}: {run} holds another run; {fix}")

    def _log_beside_the_runs(self) -> None:
        """An evaluation's log has a folder of its own, test_0 beside version_0: a run's folder is the training's."""
        subcommand = self.config.subcommand
        for logger in self._loggers(("CSVLogger", "TensorBoardLogger")):
            settings = logger.init_args
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
            and key.split(".")[-1] not in ("root", "num_workers", "predict")  # where the data lie, and who reads them
        ]

    def before_validate(self) -> None:
        """Without a validation split there is nothing to do."""
        if getattr(self.datamodule, "val_share", None) == 0 and not getattr(self.datamodule, "own_validation", False):
            raise SettingError("data.val_share is 0: there is no validation split; set it, or run test")

    def after_fit(self) -> None:
        """Test the last epoch's weights, of a run that was finished before too."""
        if self.trainer.state.finished:
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)


def experiment_name(files: Sequence[Path], method: str) -> str:
    """The folder of the runs of some configs.

    Args:
        files: the configs in their order.
        method: the name of the method, for pieces without one.

    Example:
        >>> pieces = ["data/cifar100_lt.yaml", "method/sam.yaml", "ratio/50.yaml", "trainer/gpu.yaml"]
        >>> experiment_name([Path(piece) for piece in pieces], "sam")
        'cifar100_lt/sam_ratio_50'
        >>> experiment_name([Path("my.yaml")], "sam")
        'my'
    """
    first, kinds = files[0], [file.parent.name for file in files]
    if kinds[0] != "data":
        return str(Path(first.parent.name) / first.stem)
    choices = [file for file in files[1:] if file.parent.name not in ("trainer", "logger")]
    names = [f.stem if f.stem[:1].isalpha() else f"{f.parent.name}_{f.stem}" for f in choices]
    return str(Path(first.stem) / "_".join(names if "method" in kinds else [method, *names]))


def _run_of(checkpoint: str | Path) -> Path:
    """The run's folder, which has the checkpoint in its folder ``checkpoints``."""
    return Path(checkpoint).parent.parent


def _existing(path: Path) -> Path:
    if not path.exists():
        raise SettingError(f"ckpt_path is {path}: there is no such file; a run keeps checkpoints/last.ckpt")
    return path


def _evaluated(args: list[str]) -> tuple[str, str | None]:
    """The subcommand and the checkpoint's file, before the arguments are parsed: it may know model and data.

    Returns:
        The subcommand, and the file; None where it trains, or where the file is to be looked for in a config's runs.

    Raises:
        SettingError: Nothing says what the model is.
    """
    found = args[0] if args else ""
    if found not in ImbSAMCLI.subcommands() or found in ("fit", "check"):
        return found, None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in (("--ckpt_path",), ("--config", "-c"), ("--model",)):
        parser.add_argument(*name)
    given = parser.parse_known_args(args[1:])[0]
    if given.ckpt_path not in (None, "null", "last", "best"):
        return found, given.ckpt_path
    if given.config is None and given.model is None and not {"-h", "--help"} & set(args):
        raise SettingError(
            f"ckpt_path is {given.ckpt_path or 'null'}: name the checkpoint's file with --ckpt_path, or the config of "
            "its runs with --config"
        )
    return found, None


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


@rank_zero_only
def say(line: str) -> None:
    """Print a line of the command's, once."""
    print(f"imbsam: {line}")
