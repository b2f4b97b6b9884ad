"""Tables of a test's results."""

import math
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.table import Table

GROUPS = ("many", "medium", "few", "all")


class AccuracyTable(Callback):
    """Print many / medium / few / all after a test: of which weights, and where the checkpoint and the log lie.

    The second row is the expected calibration error of each group, where it was logged
    (:class:`~lightning_modules.callbacks.evaluation_files.EvaluationFiles`).
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the checkpoint of an earlier test."""
        if not trainer.ckpt_path:
            self._loaded = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember of which epoch the weights are."""
        self._loaded = {name: checkpoint.get(name) for name in ("epoch", "callbacks", "interruption")}

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table of the test that has just ended."""
        metrics, log_dir = trainer.callback_metrics, trainer.log_dir  # every rank takes part in log_dir
        if not trainer.is_global_zero or not all(f"test/{group}" in metrics for group in GROUPS):
            return
        accuracy: Any = pl_module.test_accuracy
        sizes = dict(zip(accuracy.group_names, accuracy.groups.sum(dim=1).tolist(), strict=True))
        table = Table(title="test accuracy in %, the mean over the classes of each group")
        table.add_column("method")
        for group in GROUPS:
            table.add_column(f"{group}\n({sizes[group]} classes)", justify="right")
        names = [pl_module.hparams.get("stage"), getattr(pl_module, "method", None)]
        table.add_row(", ".join(str(name) for name in names if name), *_percent(metrics, "test/"))
        if "test/ece_all" in metrics:
            table.add_row("calibration error", *_percent(metrics, "test/ece_"))
        best = None if trainer.ckpt_path else _best(trainer, log_dir)
        _print(table, trainer, log_dir, {"weights": self._weights(trainer, pl_module), "best on validation": best})

    def _weights(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        """Which weights were tested, in words."""
        tau = getattr(pl_module, "tau_applied", None)
        if tau is not None:
            return f"of the first stage, tau-normalised (tau {tau:g})"
        if self._loaded is None:
            return f"of the last epoch ({trainer.current_epoch})" if trainer.current_epoch else None
        position = self._loaded["interruption"]
        if position:
            amid = f" and {position['batch']} batches" if position["batch"] else ""
            return f"after epoch {position['epoch']}{amid}"
        name = Path(str(trainer.ckpt_path)).name
        for state in (self._loaded["callbacks"] or {}).values():
            if Path(state.get("best_model_path") or "").name == name and state.get("monitor"):
                score = float(state["current_score"])
                return f"of epoch {self._loaded['epoch'] + 1}, the best by {state['monitor']} ({score:.4g})"
        return f"of epoch {self._loaded['epoch'] + 1}"


def _percent(metrics: Any, prefix: str) -> list[str]:
    """A row of the table; a group without test samples has no number."""
    values = [100 * float(metrics[prefix + group]) for group in GROUPS]
    return [f"{value:.1f}" if math.isfinite(value) else "-" for value in values]


def _best(trainer: Trainer, log_dir: str | None) -> str | None:
    """The best epoch by the validation set, and how to test it."""
    for checkpoint in trainer.checkpoint_callbacks:
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.monitor and checkpoint.best_model_path:
            epoch = getattr(checkpoint, "best_epoch", None)
            which = f"epoch {epoch}, " if epoch else ""
            config = Path(log_dir or "") / "config.yaml"
            command = f"imbsam test --config {config} " if config.exists() else ""
            score = float(checkpoint.best_model_score or math.nan)
            return f"{which}{checkpoint.monitor} {score:.4g}: {command}--ckpt_path {_short(checkpoint.best_model_path)}"
    return None


def _short(path: str) -> str:
    """Relative to the current folder where it lies inside."""
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else path


class AnomalyTable(Callback):
    """Print how well anomalies were found after a test, and where the checkpoint and the log lie."""

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
                table.add_row(title, f"{100 * float(metrics[f'test/{name}']):.1f}")
        _print(table, trainer, log_dir)


def _print(table: Table, trainer: Trainer, log_dir: str | None, more: dict[str, str | None] | None = None) -> None:
    """The table, where the run's files lie, and more lines."""
    console = Console()
    console.print(table)
    for name, line in {**(more or {}), "checkpoint": _checkpoint(trainer), "log": log_dir}.items():
        if line:
            console.print(f"{name}: {line}", soft_wrap=True, highlight=False)


def _checkpoint(trainer: Trainer) -> str | None:
    if trainer.ckpt_path:
        return str(trainer.ckpt_path)
    paths = [
        c.last_model_path or c.best_model_path for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)
    ]
    return next((path for path in paths if path), None)
