"""Calibrated probabilities: fitted on the validation part after training, kept in the checkpoint, used by predict."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.table import Table
from torch import Tensor

from imbsam.calibration import (
    Isotonic,
    Temperature,
    VectorScaling,
    fit_isotonic,
    fit_temperature,
    fit_vector_scaling,
)
from imbsam.calibration_metrics import calibration_by_group
from imbsam.checks import check_choice
from imbsam.errors import SettingError
from imbsam.losses import LogitAdjusted
from imbsam.losses import VectorScaling as VectorScalingLoss
from imbsam.prior_correction import class_prior, move_prior, prior_shift
from lightning_modules.callbacks.evaluation_files import write_calibration
from lightning_modules.callbacks.fitted_callback import FittedCallback
from lightning_modules.epoch_log import log_epoch

Method = Literal["prior", "temperature", "vector", "isotonic"]
_MAPS: dict[str, type] = {"temperature": Temperature, "vector": VectorScaling, "isotonic": Isotonic}
_TINY = torch.finfo(torch.float32).tiny


class Calibration(FittedCallback):
    """Calibrate the probabilities of ``imbsam predict``.

    When a training ends, the method is fitted on the validation part by the weights that it ends with. The fit is in
    the last checkpoint, whose predictions are calibrated wherever this callback is among the Trainer's: the command
    always has it. A test logs expected calibration error and log-loss of each class group before and after
    (``test/log_loss_*``, ``test/calibrated_log_loss_*``, ``test/calibrated_ece_*``), prints them as a table, and writes
    ``calibrated.csv`` to the run's folder, the calibrated twin of ``calibration.csv``
    (:class:`~lightning_modules.callbacks.evaluation_files.EvaluationFiles`), of a detector's two classes too.

    Before anything is fitted, what training did to the class priors is undone exactly: loss weights, the sampling of
    the batches, and the shift of ``LogitAdjusted`` and ``VectorScaling`` (:mod:`imbsam.prior_correction`). For other
    losses that are no cross-entropy (LDAM, Focal) there is no such formula: choose vector.

    Args:
        method: prior (that correction alone), temperature, vector (a scale and a bias per class), or isotonic (two
            classes, and detectors, whose scores are no probabilities without it); null: no calibration.
        prior: class shares that the probabilities are to be for: validation (those of the validation part), training,
            balanced, or a share for each class.
        penalty: of temperature and vector scaling, see :func:`imbsam.calibration.fit_temperature`.

    Raises:
        SettingError: at the start of a training: there is no validation part, or the method is not for this model.
    """

    name = "calibration"

    def __init__(
        self, method: Method | None = None, prior: str | list[float] = "validation", penalty: float = 1.0
    ) -> None:
        if method is not None:
            check_choice(Method, method=method)
        super().__init__()
        self.method, self.prior, self.penalty = method, prior, penalty
        self._measured: tuple[dict[str, Any] | None, dict[str, Any]] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Method, prior and penalty."""
        return {"method": self.method, "prior": self.prior, "penalty": self.penalty} if self.method else {}

    def check(self, trainer: Trainer, module: Any) -> None:
        """Compare method and prior with the classes."""
        counts, scores = module.class_counts, not hasattr(module, "test_accuracy")
        if self.prior != "validation":
            class_prior(self.prior, counts)
        if scores and self.prior == "training":
            raise SettingError(
                "calibration.prior is training: a detector's training labels are not the shares of anomalies: set it "
                "to validation, or give both shares"
            )
        if scores and self.method != "isotonic":
            raise SettingError(
                f"calibration.method is {self.method}: a detector's scores are no logits: set it to isotonic"
            )
        if self.method == "isotonic" and len(counts) != 2:
            raise SettingError(
                f"calibration.method is isotonic: it is for two classes and these are {len(counts)}: set it to vector"
            )

    def apply(self, predictions: Tensor) -> Tensor:
        """Calibrated probabilities, float64 (N, C), of what the model predicts: probabilities (N, C) or scores (N,)."""
        assert self.fitted is not None
        found = self.fitted
        source, target = found["source"].to(predictions.device), found["target"].to(predictions.device)
        logs = _mapped(found, _logits(predictions, found["scale"], found["shift"]))
        return move_prior(logs, source, target).exp()

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log calibration error and log-loss, before and after."""
        self._measured, tested = None, self.tested()
        if tested is None:
            return
        (predictions, labels), masks = tested, _class_masks(pl_module)
        after = calibration_by_group(self.apply(predictions), labels, masks)
        before = calibration_by_group(predictions, labels, masks) if predictions.ndim == 2 else None
        self._measured = before, after
        log_epoch(pl_module, {f"test/calibrated_{name}_{g}": v for g, m in after.items() for name, v in m.items()})
        if before is not None:  # the calibration errors before are EvaluationFiles'
            log_epoch(pl_module, {f"test/log_loss_{g}": m["log_loss"] for g, m in before.items()})

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print them, and write the file."""
        tested, log_dir = self.tested(), trainer.log_dir  # every rank takes part in both
        if self._measured is None or tested is None or not trainer.is_global_zero:
            return
        assert self.fitted is not None
        if trainer.loggers and log_dir is not None:
            Path(log_dir).mkdir(parents=True, exist_ok=True)
            confidence, predicted = self.apply(tested[0]).max(dim=1)
            masks = _class_masks(pl_module)
            write_calibration(Path(log_dir) / "calibrated.csv", confidence, predicted == tested[1], tested[1], masks)
        before, after = self._measured
        table = Table(title=f"test samples before and after calibration ({self.fitted['method']})")
        for column in ("classes", "calibration error", "after", "log-loss", "after"):
            table.add_column(column, justify="left" if column == "classes" else "right")
        for group, now in after.items():
            then = {"ece": "", "log_loss": ""} if before is None else _shown(before[group])
            own = _shown(now)
            table.add_row(group, then["ece"], own["ece"], then["log_loss"], own["log_loss"])
        Console().print(table)

    def fit(self, trainer: Trainer, module: Any, predictions: Tensor, labels: Tensor) -> dict[str, Any]:
        """Fit the map.

        Returns:
            ``method``, ``map`` (the fields of the map), ``scale`` and ``shift`` of the logits (C,), and the priors
            ``source`` and ``target`` (C,).
        """
        counts = torch.as_tensor(module.class_counts).cpu()
        classes = len(counts)
        there = labels.bincount(minlength=classes).double().clamp(min=0.5)  # an absent class is half a sample
        source = there / there.sum()
        scale, shift = torch.ones(classes, dtype=torch.float64), torch.zeros(classes, dtype=torch.float64)
        if predictions.ndim == 2:
            scale, shift = _as_trained(module, counts, source)
        target = source if self.prior == "validation" else class_prior(self.prior, counts)
        found: dict[str, Any] = {
            "method": self.method,
            "map": {},
            "scale": scale,
            "shift": shift,
            "source": source,
            "target": target,
        }
        logits = _logits(predictions, scale, shift)
        if self.method == "temperature":
            found["map"] = dataclasses.asdict(fit_temperature(logits, labels, self.penalty))
        elif self.method == "vector":
            names = [str(name) for name in module.class_names]
            found["map"] = dataclasses.asdict(fit_vector_scaling(logits, labels, self.penalty, names))
        elif self.method == "isotonic":
            found["map"] = dataclasses.asdict(fit_isotonic(_margin(logits), labels))
        said = f", temperature {found['map']['temperature']:.4g}" if self.method == "temperature" else ""
        rank_zero_info(f"calibration: {self.method}, fitted on {len(labels):,} validation samples{said}")
        return found


def calibration_of(trainer: Trainer) -> Calibration | None:
    """The Trainer's calibration, where one is fitted."""
    found = (c for c in trainer.callbacks if isinstance(c, Calibration))  # type: ignore[attr-defined]
    return next((c for c in found if c.fitted is not None), None)


def _class_masks(module: Any) -> dict[str, Tensor]:
    """The class groups of a classifier; of a detector its two classes and both."""
    if hasattr(module, "test_accuracy"):
        masks: dict[str, Tensor] = module.test_accuracy.masks
        return masks
    anomaly = torch.tensor([False, True])
    return {"normal": ~anomaly, "anomaly": anomaly, "all": anomaly | ~anomaly}


def _as_trained(module: Any, counts: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift that make of the logits those of the posterior under ``prior``."""
    loss, scale, tau = getattr(module, "loss", None), torch.ones(len(counts), dtype=torch.float64), 0.0
    if isinstance(loss, (LogitAdjusted, VectorScalingLoss)):
        tau = loss.tau
    if isinstance(loss, VectorScalingLoss):
        positive = counts.clamp(min=1).double()
        scale = (positive / positive.max()) ** loss.gamma
    weight, shares = module.training_weights
    return scale, prior_shift(counts, prior, drawn_shares=shares, class_weight=weight, tau=tau)


def _logits(predictions: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Logits of probabilities (N, C), float64; scores (N,) stay as they are."""
    if predictions.ndim == 1:
        return predictions.double()
    logs = predictions.double().clamp(min=_TINY).log()
    return scale.to(logs) * logs + shift.to(logs)


def _margin(logits: Tensor) -> Tensor:
    return logits[:, 1] - logits[:, 0] if logits.ndim == 2 else logits


def _mapped(found: dict[str, Any], logits: Tensor) -> Tensor:
    """Log-probabilities (N, C) under the prior of the validation part."""
    if found["method"] == "prior":
        return logits.log_softmax(dim=1)
    mapped: Tensor = _MAPS[found["method"]](**found["map"])(
        _margin(logits) if found["method"] == "isotonic" else logits
    )
    return mapped


def _shown(measures: dict[str, float]) -> dict[str, str]:
    return {"ece": f"{100 * measures['ece']:.1f} %", "log_loss": f"{measures['log_loss']:.3f}"}
