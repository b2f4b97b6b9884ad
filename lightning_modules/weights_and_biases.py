"""Log a run to Weights & Biases beside the run's folder, through Lightning's WandbLogger."""

import csv
import importlib.util
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from imbsam import SettingError
from imbsam.report.runs import flatten

FILES = {"config.yaml": "resolved_config.yaml"} | {
    name: name for name in ("per_class.csv", "confusion.csv", "calibration.csv")
}
"""What is kept of the run's folder, and under which name: W&B writes a config.yaml of its own."""

MOST_CELLS = 10_000
"""W&B cuts a longer table; a confusion matrix as a chart has one row for every pair of classes."""


class WeightsAndBiases(Callback):
    """Log to Weights & Biases what the run's folder holds; W&B's files lie in its ``wandb/``.

    From the first batch to the end of the test that follows there is one W&B run, also under DDP. It has all that the
    other loggers get, the settings as its config (``model.sam.rho``, ``data.ratio``, ...), and after the test:

    * ``test/classes``: a table with the rows of ``per_class.csv``;
    * ``test/accuracy_by_count``: a chart of it, accuracy against the logarithm of the training samples;
    * ``test/confusion_cells``: a table of the pairs that occurred, the 10,000 most frequent where there are more;
    * ``test/confusion``: the confusion matrix as a chart, up to 100 classes;
    * the CSV files and the config as files;
    * the best and the last checkpoint as versions of one artifact, ``model-ID``, with the aliases ``best``, ``last``.

    The tables come from the files of :class:`~lightning_modules.evaluation_files.EvaluationFiles`.

    Args:
        mode: disabled, offline (into the run's folder; ``wandb sync`` sends it) or online.
        project: W&B's project.
        entity: W&B's user or team; the account's default if null.
        name: the run's name; its folder if null, for example digits_lt/imbsam/version_0.
        group: runs of a group are shown as one; the folder of the config's runs if null, so that seeds are grouped.
        tags: the method, the data set and the backbone if null.
        checkpoints: whether checkpoints are logged.
    """

    def __init__(
        self,
        mode: Literal["disabled", "offline", "online"] = "disabled",
        project: str = "imbsam",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        checkpoints: bool = True,
    ) -> None:
        if mode != "disabled" and importlib.util.find_spec("wandb") is None:
            raise SettingError(f'wandb.mode is {mode}, but wandb is not installed: pip install "wandb>=0.31"')
        self.mode, self.project, self.entity = mode, project, entity
        self.name, self.group, self.tags, self.checkpoints = name, group, tags, checkpoints
        self._run: Any = None
        self._logger: WandbLogger | None = None
        self._folder = Path()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the W&B run: only now, so that a run with wrong settings leaves nothing, neither here nor there."""
        self._attach(trainer, pl_module, "fit")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the training's W&B run, or begin one."""
        self._attach(trainer, pl_module, "test")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """After the test: log what was found, and end the W&B run."""
        self._detach(trainer)
        if self._run is not None and stage == "test":
            self._log_test(trainer)
            self._finish(exit_code=0)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the W&B run as a failed one, before its folder may be removed."""
        self._detach(trainer)
        if self._run is not None:
            self._finish(exit_code=1)

    def _attach(self, trainer: Trainer, pl_module: LightningModule, job: str) -> None:
        if self.mode == "disabled" or getattr(trainer, "fast_dev_run", False):
            return
        folder = Path(trainer.log_dir or trainer.default_root_dir).absolute()  # every rank takes part in log_dir
        if not trainer.is_global_zero:
            return
        if self._run is None:
            self._folder = folder
            self._run = self._begin(trainer, pl_module, job)
        self._logger = WandbLogger(experiment=self._run)
        trainer.loggers.append(self._logger)

    def _detach(self, trainer: Trainer) -> None:
        """Between training and test Lightning would log the model's settings again, as sam.rho, not model.sam.rho."""
        if self._logger in trainer.loggers:
            trainer.loggers.remove(self._logger)

    def _begin(self, trainer: Trainer, pl_module: LightningModule, job: str) -> Any:
        import wandb

        log = next((logger for logger in trainer.loggers if isinstance(logger, CSVLogger)), None)
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            run = wandb.init(
                mode=self.mode,
                project=self.project,
                entity=self.entity,
                name=self.name or (os.path.relpath(log.log_dir, log.save_dir) if log else None),
                group=self.group or (log.name if log else None) or None,
                tags=_tags(trainer, pl_module) if self.tags is None else self.tags,
                job_type=job,
                dir=self._folder,
                id=_earlier_id(self._folder) if trainer.ckpt_path and job == "fit" else None,
                resume="allow",
            )
        except wandb.Error as error:
            said = " ".join(str(error).split())
            raise SettingError(f"wandb.mode is {self.mode}: {said} (offline needs no account)") from error
        run.define_metric("trainer/global_step")  # the horizontal axis, as WandbLogger has it
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        settings = _settings(self._folder, trainer, pl_module)
        # what a sweep has set is locked, and an update that changes nothing would warn
        new = {key: value for key, value in settings.items() if key not in run.config or run.config[key] != value}
        run.config.update(new, allow_val_change=True)  # type: ignore[no-untyped-call]
        return run

    def _log_test(self, trainer: Trainer) -> None:
        import wandb

        run = self._run
        with _staged_in(self._folder / "wandb"):
            if (self._folder / "per_class.csv").exists():
                run.log({**_tables(self._folder), "trainer/global_step": trainer.global_step})
            for path, alias in _checkpoints(trainer) if self.checkpoints else []:
                artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata={"run": run.name})
                artifact.add_file(str(path), name=path.name, policy="immutable")  # not copied: it lies in the folder
                run.log_artifact(artifact, aliases=[alias])
        for name, kept_as in FILES.items():
            if (self._folder / name).exists():
                copy = Path(run.dir) / kept_as
                shutil.copyfile(self._folder / name, copy)
                run.save(str(copy), base_path=run.dir, policy="now")

    def _finish(self, exit_code: int) -> None:
        run, self._run = self._run, None
        run.finish(exit_code)


def _tags(trainer: Trainer, pl_module: LightningModule) -> list[str]:
    data = type(getattr(trainer, "datamodule", None)).__name__.removesuffix("DataModule")
    found = [getattr(pl_module, "method", None), data, pl_module.hparams.get("backbone")]
    return [str(tag) for tag in found if tag and tag != "NoneType"]


def _earlier_id(folder: Path) -> str | None:
    """The id of the W&B run that a resumed run goes on with."""
    runs = sorted(folder.glob("wandb/*run-*-*/"), key=lambda path: path.name.split("run-")[1])
    return runs[-1].name.rpartition("-")[2] if runs else None


def _settings(folder: Path, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """The settings under the names that the command line has for them, without those that are null."""
    if (folder / "config.yaml").exists():
        nested = yaml.safe_load((folder / "config.yaml").read_text())
    else:  # without the command line
        nested = {
            "model": dict(pl_module.hparams),
            "data": dict(getattr(getattr(trainer, "datamodule", None), "hparams", {})),
        }
    return {name: value for name, value in flatten(nested).items() if value is not None}


def _tables(folder: Path) -> dict[str, Any]:
    """The tables and charts of what the test found."""
    import wandb

    columns: list[str | int] = ["class", "class_name", "training_samples", "group", "tail", "test_samples", "accuracy"]
    classes: list[list[Any]] = [
        [
            int(row["class"]),
            row["class_name"],
            int(row["training_samples"]),
            row["group"],
            row["tail"] == "1",
            int(row["test_samples"]),
            float(row["accuracy"]) if row["accuracy"] else None,
        ]
        for row in _rows(folder / "per_class.csv")
    ]
    names = [row[1] for row in classes]
    cells = [[int(row[key]) for key in ("target", "predicted", "count")] for row in _rows(folder / "confusion.csv")]
    cells = sorted(sorted(cells, key=lambda cell: -cell[2])[:MOST_CELLS])
    # the tail would be squeezed into a corner of a linear axis
    points = [[math.log10(row[2]), row[6], row[1], row[3]] for row in classes if row[2] and row[6] is not None]
    found = {
        "test/classes": wandb.Table(columns, classes),
        "test/accuracy_by_count": wandb.plot.scatter(
            wandb.Table(data=points, columns=["log10 training samples", "accuracy", "class_name", "group"]),
            "log10 training samples",
            "accuracy",
            title="test accuracy of each class against its training samples",
        ),
        "test/confusion_cells": wandb.Table(
            ["target", "predicted", "target_name", "predicted_name", "count"],
            [[target, predicted, names[target], names[predicted], count] for target, predicted, count in cells],
        ),
    }
    if len(names) ** 2 <= MOST_CELLS:
        pairs = [(target, predicted) for target, predicted, count in cells for _ in range(count)]
        targets, predicted = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        found["test/confusion"] = wandb.plot.confusion_matrix(
            y_true=targets, preds=predicted, class_names=names, title="test confusion matrix"
        )
    return found


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _checkpoints(trainer: Trainer) -> list[tuple[Path, str]]:
    """The best, then the last: W&B calls what was logged last `latest`."""
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    found = [(c.best_model_path, "best") for c in callbacks] + [(c.last_model_path, "last") for c in callbacks]
    return [(Path(path).absolute(), alias) for path, alias in found if path and Path(path).exists()]


@contextmanager
def _staged_in(folder: Path) -> Iterator[None]:
    """W&B copies tables to a folder of its own before it sends them; an offline run needs them until it is synced."""
    before = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_DATA_DIR"]
        else:
            os.environ["WANDB_DATA_DIR"] = before
