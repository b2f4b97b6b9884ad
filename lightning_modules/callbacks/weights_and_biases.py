"""What Weights & Biases gets beside what Lightning's WandbLogger logs."""

import math
import os
import shutil
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from imbsam.report.runs import flatten, read_csv

MOST_ROWS = 10_000
"""W&B truncates longer tables; the chart of a confusion matrix has a row for every pair of classes."""


class WandbResults(Callback):
    """Log the settings and the test's results to the run of a WandbLogger. Without one it does nothing.

    * The config has every setting by its name on the command line (``data.ratio``), as sweeps set them.
    * The run is named after its folder (``digits_lt/imbsam/version_0``) where the logger has the name of the folder's
      experiment, and its id is in ``hparams.yaml``, so that a resumed run continues it.
    * After the test: the tables ``test/classes`` (``per_class.csv``) and ``test/confusion_pairs`` (``confusion.csv``,
      the most frequent 10,000), and the charts ``test/accuracy_by_count`` and, up to 100 classes, ``test/confusion``.
      They come from the files of :class:`~lightning_modules.callbacks.evaluation_files.EvaluationFiles`.
    * An exception ends it as a failed run; before the first training step its local files are removed.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Name the run, and keep its id."""
        run = _run(trainer)
        for log in trainer.loggers if run else []:
            if isinstance(log, CSVLogger):
                if run.name == log.name:
                    run.name = os.path.relpath(log.log_dir, log.save_dir)
                log.log_hyperparams({"wandb_id": run.id})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the settings of a training."""
        _log_settings(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the settings of a test."""
        _log_settings(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the results of a test, from its files."""
        folder = Path(trainer.log_dir or "")  # every rank takes part in log_dir
        run = _run(trainer)
        if run and stage == "test" and (folder / "per_class.csv").exists():
            run.log({**_results(folder), "trainer/global_step": trainer.global_step})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the run; Lightning leaves that to the end of the program."""
        if not trainer.is_global_zero or not any(isinstance(log, WandbLogger) for log in trainer.loggers):
            return
        import wandb

        if (run := wandb.run) is not None:  # the logger's `experiment` would begin one
            run.finish(exit_code=1)
            if trainer.global_step == 0:
                shutil.rmtree(run.settings.sync_dir, ignore_errors=True)


def _run(trainer: Trainer) -> Any:
    """The W&B run, on rank 0 of a Trainer that has one."""
    loggers = [log for log in trainer.loggers if isinstance(log, WandbLogger)]
    return loggers[0].experiment if loggers and trainer.is_global_zero else None


def _log_settings(trainer: Trainer) -> None:
    path = Path(trainer.log_dir or "") / "config.yaml"  # every rank takes part in log_dir
    run = _run(trainer)
    if run and path.exists():
        settings = flatten(yaml.safe_load(path.read_text()))
        # what a sweep has set is locked, and W&B warns of an update even where it changes nothing
        left_out = {"trainer.logger", "trainer.callbacks", *run.config.keys()}
        run.config.update({k: v for k, v in settings.items() if v is not None and k not in left_out})


def _results(folder: Path) -> dict[str, Any]:
    """Tables and charts of a test."""
    import wandb

    classes = read_csv(folder / "per_class.csv")
    names = [row["class_name"] for row in classes]
    cells = [tuple(row.values()) for row in read_csv(folder / "confusion.csv")]  # target, predicted, count
    frequent = sorted(cells, key=lambda cell: -cell[2])[:MOST_ROWS]
    x = "log10 of training samples"  # a linear axis would squeeze the tail into a corner
    points = [
        [math.log10(row["training_samples"]), row["accuracy"], row["class_name"], row["group"]]
        for row in classes
        if row["training_samples"] and row["accuracy"] is not None
    ]
    accuracies = wandb.Table(columns=[x, "accuracy", "class_name", "group"], data=points)
    results = {
        "test/classes": wandb.Table(columns=list(classes[0]), data=[list(row.values()) for row in classes]),
        "test/accuracy_by_count": wandb.plot.scatter(accuracies, x, "accuracy", title="test accuracy of each class"),
        "test/confusion_pairs": wandb.Table(
            columns=["target", "predicted", "count"],
            data=[[names[target], names[predicted], count] for target, predicted, count in frequent],
        ),
    }
    if len(names) ** 2 <= MOST_ROWS:
        targets, predicted = zip(*[cell[:2] for cell in cells for _ in range(cell[2])], strict=True)
        results["test/confusion"] = wandb.plot.confusion_matrix(
            y_true=targets, preds=predicted, class_names=names, title="test confusion matrix"
        )
    return results
