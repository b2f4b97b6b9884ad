"""What a model card needs of a test and the other files do not say: samples of each part, decisions, versions."""

import datetime
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules.callbacks.calibration import calibration_of
from lightning_modules.callbacks.decisions import class_names, decisions_of
from lightning_modules.callbacks.drift import drift_of
from lightning_modules.callbacks.fitted_callback import FittedCallback


class RunFacts(Callback):
    """Write ``facts.json`` to the run's folder after a test, for ``imbsam report --format card``.

    * ``samples``: training, validation and test samples of each class, by name, as far as they are known: of a detector
      the training's are unlabelled rows and labelled anomalies; the validation's are known where something was fitted
      on it.
    * ``calibration``, ``decisions`` and ``drift``: what was fitted, null for nothing. ``decisions`` has ``thresholds``,
      and as ``results`` what was promised beside what the test samples gave.
    * ``versions`` and ``date`` of the test.
    """

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last test."""
        self._test_counts: list[int] | None = None

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count a detector's test samples, before it forgets them."""
        metrics: Any = getattr(pl_module, "test_metrics", None)
        labels = getattr(metrics, "labels", None)
        if labels:
            self._test_counts = torch.cat(labels).bincount(minlength=2).tolist()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        log_dir = trainer.log_dir  # every rank takes part
        if not trainer.is_global_zero or not trainer.loggers or log_dir is None:
            return
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        facts = json.dumps(self._facts(trainer, pl_module), indent=1, ensure_ascii=False)
        (Path(log_dir) / "facts.json").write_text(facts + "\n", encoding="utf-8")

    def _facts(self, trainer: Trainer, module: Any) -> dict[str, Any]:
        names, calibration, decisions, drift = (
            class_names(module),
            calibration_of(trainer),
            decisions_of(trainer),
            drift_of(trainer),
        )
        samples: dict[str, Any] = {}
        if getattr(module, "class_counts", None) is not None:
            trained = names if hasattr(module, "test_accuracy") else ["unlabelled", "labelled anomaly"]
            samples["training"] = dict(zip(trained, torch.as_tensor(module.class_counts).tolist(), strict=True))
        fits: list[FittedCallback] = [c for c in (calibration, decisions, drift) if c is not None]
        if fits and fits[0].fitted and "validation_counts" in fits[0].fitted:
            samples["validation"] = dict(zip(names, fits[0].fitted["validation_counts"], strict=True))
        if self._test_counts is not None:
            samples["test"] = dict(zip(names, self._test_counts, strict=True))
        return {
            "date": datetime.date.today().isoformat(),
            "versions": versions(),
            "samples": samples,
            "calibration": calibration and calibration.fitted and calibration.fitted["settings"],
            "decisions": decisions and decisions.facts(),
            "drift": drift and drift.fitted and drift.fitted["settings"],
        }


def versions() -> dict[str, str]:
    """Of Python and the libraries that training depends on."""
    found = {"Python": platform.python_version()}
    for name in ("imbsam", "torch", "lightning", "scikit-learn", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
