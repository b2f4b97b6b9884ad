"""Tables of a test's results."""

import math
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.table import Table

from imbsam.group_names import CLASS_MEASURES, GROUPS, TEST_RATIOS

GROUP_ROWS = {
    "accuracy": "",
    "mean average precision": "map_",
    "mean average precision, not averaged": "plain_map_",
    "accuracy, not averaged": "plain_",
    "top-5 accuracy": "top5_",
    "calibration error": "ece_",
}
"""Rows that have a number for every group, and what its name in the log begins with."""

ALL_ROWS = {title: name for name, title in CLASS_MEASURES.items()} | {
    f"{direction} long tail, ratio {TEST_RATIOS[-1]}": f"{direction}_{TEST_RATIOS[-1]}"
    for direction in ("forward", "backward")
}
"""Rows that have one number, of all classes, and its name in the log."""


class AccuracyTable(Callback):
    """Print many / medium / few / all after a test: of which weights, and where the checkpoint and the log are.

    Below come the other measures that were logged (docs/measures.md): those of the groups, then those of all classes.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the checkpoint of an earlier test."""
        if not trainer.ckpt_path:
            self._loaded = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember which epoch the weights are of."""
        self._loaded = {name: checkpoint.get(name) for name in ("epoch", "callbacks", "interruption")}

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table of the test that has just ended."""
        metrics, log_dir = trainer.callback_metrics, trainer.log_dir  # every rank takes part in log_dir
        multi_label = "test/map_all" in metrics
        if not trainer.is_global_zero or not (multi_label or all(f"test/{group}" in metrics for group in GROUPS)):
            return
        masks: Any = pl_module.test_accuracy.masks  # type: ignore[union-attr]
        method = ", ".join(filter(None, (pl_module.hparams.get("stage"), getattr(pl_module, "method", None))))
        what = "results" if multi_label else "accuracy"
        table = Table(title=f"{method}: test {what} in %, mean of the group's classes")
        table.add_column()
        for group in GROUPS:
            table.add_column(group, justify="right")
        table.add_row("classes", *(f"{int(masks[group].sum()):,}" for group in GROUPS), end_section=True)
        for title, prefix in GROUP_ROWS.items():
            if f"test/{prefix}all" in metrics:
                table.add_row(title, *(_percent(metrics[f"test/{prefix}{group}"]) for group in GROUPS))
        table.add_section()
        for title, name in ALL_ROWS.items():
            if f"test/{name}" in metrics:
                table.add_row(title, "", "", "", _percent(metrics[f"test/{name}"]))
        best = None if trainer.ckpt_path else _best(trainer, log_dir)
        weights = self._weights(trainer, pl_module)
        if weights and ("test/plain_all" in metrics or "test/plain_map_all" in metrics):
            weights += ", averaged"
        _print(table, trainer, log_dir, {"weights": weights, "best on validation": best})

    def _weights(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        """Which weights were tested, in words."""
        tau = getattr(pl_module, "tau_applied", None)
        if tau is not None:
            return f"of the first stage, tau-normalised (tau {tau:g})"
        if self._loaded is None:
            return f"of the last epoch ({trainer.current_epoch})" if trainer.current_epoch else None
        if position := self._loaded["interruption"]:
            batches = f" and {position['batch']} batches" if position["batch"] else ""
            return f"after epoch {position['epoch']}{batches}"
        epoch = f"of epoch {self._loaded['epoch'] + 1}"
        name = Path(str(trainer.ckpt_path)).name
        for state in (self._loaded["callbacks"] or {}).values():
            if Path(state.get("best_model_path") or "").name == name and state.get("monitor"):
                return f"{epoch}, the best by {state['monitor']} ({float(state['current_score']):.4g})"
        return epoch


class AnomalyTable(Callback):
    """Print how well anomalies were detected after a test, and where the checkpoint and the log are."""

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table of the test that has just ended."""
        metrics, log_dir = trainer.callback_metrics, trainer.log_dir  # every rank takes part in log_dir
        if not trainer.is_global_zero or "test/average_precision" not in metrics:
            return
        hparams: Any = pl_module.hparams
        budget = hparams.get("budget")
        share = f"{100 * budget:g} % of the rows" if budget and budget < 1 else f"{budget or 0:g} rows"
        alarms = "as many alarms as anomalies" if budget is None else f"alarms for {share}"
        names = {
            "AUROC": "auroc",
            "average precision": "average_precision",
            f"precision, {alarms}": "budget_precision",
            f"recall, {alarms}": "budget_recall",
            "precision, threshold from validation": "precision",
            "recall, threshold from validation": "recall",
            "F1, threshold from validation": "f1",
        }
        table = Table()
        table.add_column(f"test rows, {getattr(pl_module, 'detector_name', '')}, {getattr(pl_module, 'method', '')}")
        table.add_column("%", justify="right")
        for title, name in names.items():
            if f"test/{name}" in metrics:  # the last three only where a threshold was chosen
                table.add_row(title, _percent(metrics[f"test/{name}"]))
        _print(table, trainer, log_dir, {})


def _print(table: Table, trainer: Trainer, log_dir: str | None, lines: dict[str, str | None]) -> None:
    """The table, more lines, and where the run's files are."""
    checkpoint = trainer.ckpt_path or next(
        filter(None, (c.last_model_path or c.best_model_path for c in _saved(trainer))), None
    )
    console = Console()
    console.print(table)
    for name, line in {**lines, "checkpoint": checkpoint, "log": log_dir}.items():
        if line:
            console.print(f"{name}: {line}", soft_wrap=True, highlight=False)


def _percent(value: Any) -> str:
    return f"{100 * float(value):.1f}" if math.isfinite(value) else "–"


def _saved(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _best(trainer: Trainer, log_dir: str | None) -> str | None:
    """The best epoch by the validation set, and how to test it."""
    for callback in _saved(trainer):
        if callback.monitor and callback.best_model_path:
            epoch = getattr(callback, "best_epoch", None)
            config, path = Path(log_dir or "") / "config.yaml", Path(callback.best_model_path)
            command = f"imbsam test --config {config} " if config.exists() else ""
            if path.is_relative_to(Path.cwd()):
                path = Path(os.path.relpath(path))
            which, score = f"epoch {epoch}, " if epoch else "", float(callback.best_model_score or math.nan)
            return f"{which}{callback.monitor} {score:.4g}: {command}--ckpt_path {path}"
    return None
