"""The `imbsam` command line: LightningCLI with our classes, defaults and one-line errors."""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.core.saving import load_hparams_from_yaml
from lightning.pytorch.utilities import rank_zero_only

import datamodules  # noqa: F401  jsonargparse resolves the short names of imported classes
import lightning_modules  # noqa: F401
from imbsam import SettingError
from imbsam.report.runs import flatten
from lightning_modules.callbacks.calibration import Calibration
from lightning_modules.callbacks.decisions import Decisions
from lightning_modules.callbacks.drift import Drift
from lightning_modules.callbacks.network_summary import NetworkSummary
from lightning_modules.callbacks.predictions import PredictionsCSV
from lightning_modules.cli.decide import take_over_settings
from lightning_modules.cli.loggers import complete_wandb, csv_log, loggers
from lightning_modules.cli.run_folder import experiment_name, run_of
from lightning_modules.cli.seeds import FLAG, apply_seed
from lightning_modules.resuming.checkpoint_contents import NETWORK_SETTINGS, check_class, read_checkpoint, saved_classes
from lightning_modules.resuming.checkpoint_files import check_checkpoint, newest_checkpoint, newest_run, run_folder
from lightning_modules.resuming.resumable_checkpoint import ResumableCheckpoint
from lightning_modules.resuming.signals import StopSignals

EVALUATION_SETTINGS = ("flip_tta", "crop_tta", "channels_last", "compile", "many", "few", "budget")
"""Model settings that do not belong to the weights: in an evaluation the command line wins over the checkpoint."""


class ImbSAMCLI(LightningCLI):
    """Lightning's commands and ours; `fit` then tests the weights of the last epoch.

    Args:
        signals: the signal handlers, which must know the processes that the trainer launches.
        *args: those of LightningCLI.
        **kwargs: those of LightningCLI.
    """

    def __init__(self, signals: StopSignals, *args: Any, **kwargs: Any) -> None:
        self._signals = signals
        super().__init__(*args, **kwargs)
        if "wandb" in sys.modules:  # Lightning leaves the run open until exit; the next seed would log to it
            sys.modules["wandb"].finish()

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands and ours, with the arguments that the command line does not offer."""
        own = {"model", "datamodule"}
        ours = ("decide", "sharpness", "check", "export", "features")
        return {**LightningCLI.subcommands(), **dict.fromkeys(ours, own)}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Make the checkpoint, the predictions, calibration, decisions, drift and the seeds configurable."""
        parser.add_lightning_class_args(ResumableCheckpoint, "checkpoint")
        parser.add_lightning_class_args(PredictionsCSV, "predictions")
        parser.add_lightning_class_args(Calibration, "calibration")  # before what decides by it
        parser.add_lightning_class_args(Decisions, "decisions")
        parser.add_lightning_class_args(Drift, "drift")
        parser.add_argument(FLAG, type=int, nargs="+", help="Train once for each seed, of the run and of the data.")

    def setup_parser(self, *args: Any) -> None:
        """Default to one device where only one is supported."""
        super().setup_parser(*args)
        for subcommand in ("predict", "decide", "sharpness", "export", "features"):
            self._parser(subcommand).set_defaults({"trainer.devices": 1})

    @property
    def settings(self) -> Any:
        """The parsed settings of the subcommand."""
        return self.config[self.config.subcommand]

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, name the run's folder after its configs unless it has a name, and find the checkpoint.

        To evaluate or predict, the model and the data of the checkpoint are the defaults, which configs and the command
        line change. Data of another class take none of these settings.
        """
        self._trained: dict[str, Any] | None = None
        self._data_error: str | None = None
        self._resumed_run: Path | None = None
        subcommand, named = _evaluated(sys.argv[1:])
        if named is not None:
            self._use_as_defaults(subcommand, Path(named))
        self._parse(parser, args)
        asked = self.settings.get("ckpt_path")
        path = self._find_checkpoint(asked)
        if self.config.subcommand == "fit":
            if path is not None:
                self._resume(path, asked)
            self._check_run_folder(restarting=asked == "last")
        else:
            if path is not None and self._trained is None:  # from "last", "best" or a config
                self._use_as_defaults(self.config.subcommand, path)
                self._parse(parser, args)
            self._log_beside_the_runs()
        if self.config.subcommand == "decide":
            assert path is not None
            assert self._trained is not None
            take_over_settings(self.settings, self._trained, path)
        if asked is not None:
            self.settings.ckpt_path = path and str(path)

    def _parse(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            super().parse_arguments(parser, args)
        except argparse.ArgumentError as error:
            if self._data_error is None:
                raise
            raise SettingError(
                f"the checkpoint's data cannot be built ({self._data_error}): add the folder of their module to "
                "PYTHONPATH, or name other data with --data"
            ) from error
        saved, given = saved_classes(self._trained or {}).get("data"), self.settings.get("data")
        if saved and given and saved["class_path"].rpartition(".")[2] != given.class_path.rpartition(".")[2]:
            self._parser(self.config.subcommand).set_defaults({"data": None})
            super().parse_arguments(parser, args)
        self._name_run()

    def _use_as_defaults(self, subcommand: str, path: Path) -> None:
        """Make the model and the data of a checkpoint the defaults of a subcommand."""
        check_checkpoint(path)
        self._trained = read_checkpoint(path)
        for key, settings in saved_classes(self._trained).items():
            try:
                self._parser(subcommand).set_defaults({key: settings})
            except (argparse.ArgumentError, ImportError, AttributeError, ValueError, TypeError, KeyError) as error:
                reason = f"{settings['class_path']}: {' '.join(str(error).split()) or type(error).__name__}"
                if key == "model":
                    raise SettingError(
                        f"ckpt_path is {path}: its model cannot be built ({reason}): add the folder of its module to "
                        "PYTHONPATH"
                    ) from error
                self._data_error = reason  # raised if no other data are given

    def _name_run(self) -> None:
        """Name the run's folder after its configs, or after the checkpoint's."""
        apply_seed(self.settings)
        trainer = self.settings.trainer
        complete_wandb(trainer)
        for logger in loggers(trainer, "CSVLogger"):
            if logger.init_args.name == "":
                logger.init_args.name = self._experiment(Path(logger.init_args.save_dir))
            for wandb in loggers(trainer, "WandbLogger"):
                wandb.init_args.name = wandb.init_args.name or logger.init_args.name or None
                wandb.init_args.group = wandb.init_args.group or logger.init_args.name or None

    def _experiment(self, save_dir: Path) -> str:
        """The folder of the runs inside `save_dir`, from the configs or from the checkpoint's path."""
        if files := [Path(path.relative) for path in self.settings.get("config") or []]:
            sam = self.settings.model.init_args.get("sam")
            return experiment_name(files, str(getattr(sam, "class_path", sam)).rpartition(".")[2].lower())
        if self._trained is not None:
            runs, logs = run_of(Path(self.settings.ckpt_path)).parent.resolve(), save_dir.resolve()
            if runs != logs and runs.is_relative_to(logs):
                return str(runs.relative_to(logs))
        return ""

    def _parse_ckpt_path(self) -> None:
        """In an evaluation, let the checkpoint's settings of the model win, except the three kinds below.

        LightningCLI lets all of them win, in a training too. Here the command line decides how to train and how to
        evaluate; and the settings of the network are left alone, so that another network than the checkpoint's is
        refused when its weights are loaded.
        """
        saved = saved_classes(self._trained or {}).get("model")
        if self.config.subcommand == "fit" or saved is None:
            return
        model_class = self.settings.model.class_path
        check_class(saved["class_path"], [model_class.rpartition(".")[2]])
        given = (*EVALUATION_SETTINGS, *NETWORK_SETTINGS)
        settings = {name: value for name, value in saved["init_args"].items() if name not in given}
        model = {"class_path": model_class, "dict_kwargs": settings}
        self.config = self.parser.parse_object({self.config.subcommand: {"model": model}}, self.config)

    def before_instantiate_classes(self) -> None:
        """Refuse what Lightning would fail on later, and leave out what is not wanted."""
        trainer = self.settings.trainer
        for name, unset in (("accumulate_grad_batches", (None, 1)), ("gradient_clip_val", (None,))):
            if trainer[name] not in unset:
                raise SettingError(
                    f"trainer.{name} is {trainer[name]}: Lightning does that only in automatic optimization; "
                    f"set model.{name}"
                )
        if trainer.enable_checkpointing is False:
            raise SettingError("trainer.enable_checkpointing is false: set checkpoint.save_last to false instead")
        if trainer.fast_dev_run:
            self.settings.checkpoint.save_last = False
        if trainer.enable_model_summary is False:
            callbacks = self.trainer_defaults["callbacks"]
            self.trainer_defaults["callbacks"] = [c for c in callbacks if not isinstance(c, NetworkSummary)]
        if self.subcommand == "decide":
            trainer.logger = False  # what it finds is in the checkpoint
        if self.subcommand == "test":
            self.settings.verbose = False  # our table has the same numbers
        if self._resumed_run is not None or not trainer.logger:
            self.save_config_callback = None  # a resumed run keeps its config.yaml; without a logger it has no folder

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Tell the signal handlers of the processes that the trainer launches."""
        trainer = super().instantiate_trainer(**kwargs)
        self._signals.launcher = trainer.strategy.launcher
        return trainer

    def _find_checkpoint(self, asked: str | None) -> Path | None:
        """The checkpoint's path; "last" and "best" are those of the newest run."""
        subcommand = self.config.subcommand
        if asked is None and subcommand not in ("fit", "check", "features"):
            what = {"sharpness": "measure", "decide": "decide with"}.get(subcommand, subcommand)
            raise SettingError(f"ckpt_path is null: name the checkpoint to {what} with --ckpt_path")
        if asked not in ("last", "best"):
            return asked and Path(asked)  # type: ignore[return-value]
        logger, runs = csv_log(self.settings.trainer)
        if runs is None:
            raise SettingError(f"ckpt_path is {asked}: runs are looked up in the folder of a CSV log; name the file")
        path = newest_checkpoint(runs, logger.version)
        if path is None:
            if subcommand != "fit" or asked == "best":
                raise SettingError(f"ckpt_path is {asked}: no run in {runs} has a checkpoint yet")
            say(f"no run in {runs} has a checkpoint yet: starting a new run")
            return None
        if asked == "best":
            path = path.with_name("best.ckpt")
            if not path.exists():
                raise SettingError(
                    f"ckpt_path is best: {run_of(path)} has no best.ckpt, which a training keeps only if it has a "
                    "validation set (data.val_share); name another one, or last"
                )
        newer = newest_run(runs) if logger.version is None else None
        if newer in (None, run_of(path)):
            say(f"checkpoint: {path}")
        elif subcommand == "fit":
            raise SettingError(
                f"ckpt_path is {asked}: the newest run, {newer}, ended before its first checkpoint; start over "
                f"without --ckpt_path, or resume an older run with --ckpt_path {path}"
            )
        else:
            assert newer is not None
            say(f"checkpoint: {path}, since the newer run {newer.name} has none")
        return path

    def _resume(self, path: Path, asked: str) -> None:
        """Refuse a damaged checkpoint, and continue the logs of its run."""
        check_checkpoint(path)
        read_checkpoint(path, self.settings.get("weights_only") is not False)
        run, (logger, runs) = run_of(path), csv_log(self.settings.trainer)
        if differing := self._changed_settings(run):
            if asked == "last":
                raise SettingError(
                    f"ckpt_path is last: {run} was trained with {differing[0]}; name the checkpoint to resume with "
                    "other settings, or train in another folder with --trainer.logger.init_args.save_dir"
                )
            say(f"other settings than in {run / 'config.yaml'}: {', '.join(differing)}")
        if runs is None or run.parent.resolve() != runs.resolve():
            return
        version = run.name.removeprefix("version_")
        logger.version = int(version) if version.isdigit() else run.name
        for resumable in loggers(self.settings.trainer, "ResumableCSVLogger")[:1]:
            resumable.init_args.resume = True
        for wandb in loggers(self.settings.trainer, "WandbLogger"):
            earlier = load_hparams_from_yaml(run / "hparams.yaml").get("wandb_id")
            wandb.init_args.id = wandb.init_args.version or wandb.init_args.id or earlier
        self._resumed_run = run

    def _check_run_folder(self, restarting: bool) -> None:
        """Refuse to overwrite another run that has the same version."""
        logger, runs = csv_log(self.settings.trainer)
        if runs is None or logger.version is None or self.settings.trainer.fast_dev_run or self._resumed_run:
            return
        run = run_folder(runs, logger.version)
        if not any((run / name).exists() for name in ("config.yaml", "metrics.csv", "checkpoints")):
            return
        if restarting and not self._changed_settings(run):
            return  # it ended before its first checkpoint
        raise SettingError(
            f"trainer.logger.init_args.version is {logger.version}: {run} holds another run; leave it out for the next "
            "free number, or resume that run with --ckpt_path last"
        )

    def _log_beside_the_runs(self) -> None:
        """Log an evaluation to a folder of its own, test_0 beside version_0: only a training writes to a run's."""
        subcommand = self.config.subcommand
        for logger in loggers(self.settings.trainer, "CSVLogger", "TensorBoardLogger"):
            settings = logger.init_args
            if "version" in settings and "save_dir" in settings:
                runs = Path(settings.save_dir) / (settings.get("name") or "")
                number = next(n for n in itertools.count() if not (runs / f"{subcommand}_{n}").exists())
                settings.version = f"{subcommand}_{number}"

    def _changed_settings(self, run: Path) -> list[str]:
        """The settings of model, data and seed in which this training differs from a run's config.yaml."""
        if not (run / "config.yaml").exists():
            return []
        dumped = self._parser(self.config.subcommand).dump(self.settings, skip_link_targets=False)
        now, then = (flatten(yaml.safe_load(text)) for text in (dumped, (run / "config.yaml").read_text()))
        return [
            f"{key} {then[key]}, not {now[key]}"
            for key in now.keys() & then.keys()
            if now[key] != then[key]
            and key.split(".")[0] in ("model", "data", "seed_everything")
            # where the data are, who reads them, and how a step is run
            and key.split(".")[-1] not in ("root", "num_workers", "images_on_device", "predict", "capture")
        ]

    def before_validate(self) -> None:
        """Refuse to validate without a validation split."""
        if getattr(self.datamodule, "val_share", None) == 0 and not getattr(self.datamodule, "own_validation", False):
            raise SettingError("data.val_share is 0: there is no validation split; set it, or run test")

    def after_fit(self) -> None:
        """Test the weights of the last epoch, also of a run that had finished before."""
        if self.trainer.state.finished:
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)


def _evaluated(args: list[str]) -> tuple[str, str | None]:
    """The subcommand and the checkpoint that it evaluates, read before the parser runs: they set its defaults.

    Returns:
        The subcommand, and the file; None for a training, or if the file is to be looked up in the runs of a config.

    Raises:
        SettingError: Nothing says what the model is.
    """
    subcommand = args[0] if args else ""
    if subcommand not in ImbSAMCLI.subcommands() or subcommand in ("fit", "check"):
        return subcommand, None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in (("--ckpt_path",), ("--config", "-c"), ("--model",)):
        parser.add_argument(*name)
    given = parser.parse_known_args(args[1:])[0]
    if given.ckpt_path not in (None, "null", "last", "best"):
        return subcommand, given.ckpt_path
    if given.config is None and given.model is None and not {"-h", "--help"} & set(args):
        raise SettingError(
            f"ckpt_path is {given.ckpt_path or 'null'}: name the checkpoint's file with --ckpt_path, or the config of "
            "its runs with --config"
        )
    return subcommand, None


@rank_zero_only
def say(line: str) -> None:
    """Print a line of the command's, on rank 0."""
    print(f"imbsam: {line}")
