"""Decisions by thresholds, costs or conformal sets: fitted on the validation part, kept in the checkpoint."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from rich.table import Table
from torch import Tensor

from imbsam.checks import check_interval, check_numbers
from imbsam.conformal import fit_conformal
from imbsam.costs import cheapest_decision, check_costs, realised_costs
from imbsam.errors import SettingError
from imbsam.intervals import mean_interval
from imbsam.messages import first_few
from imbsam.thresholds import choose_threshold, decide
from lightning_modules.callbacks.calibration import Calibration, calibration_of
from lightning_modules.callbacks.decision_results import conformal_sets, conformity_of, print_promises, realised
from lightning_modules.callbacks.fitted_callback import FittedCallback
from lightning_modules.epoch_log import log_epoch

Goal = float | dict[str, float] | None
LOOK = "look"
"""The decision that somebody is to look."""


class Decisions(FittedCallback):
    """Turn scores into decisions.

    When a training ends, thresholds or conformal sets are fitted on the validation part by the weights that it ends
    with, after :class:`~lightning_modules.callbacks.calibration.Calibration`, which must come before it among the
    Trainer's callbacks. What they promise is printed with intervals, and kept in the last checkpoint; a test prints and
    logs what they do on the test part. ``imbsam predict`` then writes

    * with thresholds, of a detector ``alarm`` (1 or 0, in place of the one of the best F1), of a classifier
      ``decision`` (:func:`imbsam.thresholds.decide`) and ``alarm NAME`` for every class with a threshold, which the
      promises are of;
    * with costs ``decision`` and ``expected_cost``, by calibrated probabilities;
    * with a coverage ``decision`` (the class where the set has a single one, else "look") and ``set``, by the model's
      own probabilities or scores, so that a calibration on the same samples does not weaken the promise.

    Args:
        recall: thresholds for these recalls: a number for a detector, ``{class name: number}`` for a classifier.
        precision: thresholds for these precisions.
        false_alarms: thresholds for these false alarms per thousand negatives.
        costs: a row for each true class, a column for each decision.
        look_cost: what a look costs; a sample whose cheapest decision is expected to cost more has the decision "look".
        coverage: conformal sets that hold the true class with this probability, for every class by itself.
        confidence: of the printed intervals.

    Raises:
        SettingError: a setting is out of its range, more than one of thresholds, costs and coverage are set, or, at the
            start of a training, there is no validation part, or a class is unknown.
    """

    name = "decisions"

    def __init__(
        self,
        recall: Goal = None,
        precision: Goal = None,
        false_alarms: Goal = None,
        costs: list[list[float]] | None = None,
        look_cost: float | None = None,
        coverage: float | None = None,
        confidence: float = 0.95,
    ) -> None:
        super().__init__()
        goals = {"recall": recall, "precision": precision, "false_alarms": false_alarms}
        self.goals: dict[str, float | dict[str, float]] = {n: goal for n, goal in goals.items() if goal is not None}
        self.costs, self.look_cost, self.coverage, self.confidence = costs, look_cost, coverage, confidence
        kinds = [*self.goals, *(n for n, v in (("costs", costs), ("coverage", coverage)) if v is not None)]
        self.kind = None if not kinds else "thresholds" if self.goals else kinds[0]
        if len(kinds) > 1 and kinds != list(self.goals):
            raise SettingError(f"decisions has {' and '.join(kinds)}: set thresholds, costs or a coverage, one of them")
        if look_cost is not None:
            check_numbers(look_cost=look_cost)
            if costs is None:
                raise SettingError(
                    f"decisions.look_cost is {look_cost:g} and decisions.costs is null: set the costs too"
                )
        if coverage is not None:
            check_interval("(0, 1)", coverage=coverage)
        check_interval("(0, 1)", confidence=confidence)
        self._realised: list[tuple[str, str, str]] = []

    @property
    def settings(self) -> dict[str, Any]:
        """What is set."""
        if self.kind is None:
            return {}
        others = {"costs": self.costs, "look_cost": self.look_cost, "coverage": self.coverage}
        chosen = {name: value for name, value in others.items() if value is not None}
        return {**self.goals, **chosen, "confidence": self.confidence}

    def check(self, trainer: Trainer, module: Any) -> None:
        """Compare goals, costs and their order with the classes and the other callbacks."""
        names, scores = class_names(module), not hasattr(module, "test_accuracy")
        self._wanted(names, scores)
        if self.kind == "costs":
            check_costs(self.costs, len(names))  # type: ignore[arg-type]
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        before = [c for c in callbacks[: callbacks.index(self)] if isinstance(c, Calibration)]
        if scores and self.kind == "costs" and not any(c.method for c in before):
            raise SettingError(
                "decisions.costs needs probabilities, which a detector has none of: set calibration.method"
            )
        if any(isinstance(c, Calibration) for c in callbacks[callbacks.index(self) :]):
            raise SettingError("decisions comes before calibration among the callbacks: put it after")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A detector's alarms are by this threshold."""
        super().on_predict_start(trainer, pl_module)
        self._set_threshold(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A detector's alarms are by this threshold."""
        super().on_test_start(trainer, pl_module)
        self._set_threshold(pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the decisions do."""
        self._realised, tested = [], self.tested()
        if self.fitted is None or tested is None:
            return
        found, labels = tested
        rows = list(realised(self.fitted, found, _calibrated(trainer, found), labels))
        self._realised = [(what, promised, said) for what, promised, said, _ in rows]
        log_epoch(pl_module, {f"test/{what.replace(' ', '_')}": value for what, _, _, value in rows})

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print it beside the promise."""
        if self._realised and trainer.is_global_zero:
            table = Table(title="decisions: what the validation part promised, and the test samples")
            for column in ("", "promised", "test"):
                table.add_column(column)
            for row in self._realised:
                table.add_row(*row)
            Console().print(table)

    def facts(self) -> dict[str, Any] | None:
        """What was fitted and, after a test, what it did, as plain data for a model card; None without a fit.

        ``kind``, ``settings``, ``confidence``; ``thresholds`` with ``class``, ``wanted``, ``goal``, ``alarm_from``, and
        the ``positives`` and ``negatives`` that each was chosen on; ``results``: what, promised, test.
        """
        if self.fitted is None:
            return None
        names = self.fitted["names"]
        thresholds = [
            {
                "class": names[c],
                "alarm_from": t["value"],
                **{k: t[k] for k in ("wanted", "goal", "positives", "negatives")},
            }
            for c, t in self.fitted.get("thresholds", {}).items()
        ]
        results = [dict(zip(("what", "promised", "test"), row, strict=True)) for row in self._realised]
        own = {name: self.fitted[name] for name in ("kind", "confidence", "settings")}
        return {**own, "thresholds": thresholds, "results": results}

    def columns(self, predictions: Tensor, probabilities: Tensor) -> dict[str, Sequence[Any]]:
        """The columns of the predictions' file, by their names.

        Args:
            predictions: what the model predicts: probabilities (N, C) or scores (N,).
            probabilities: calibrated (N, C); where nothing is calibrated, the predictions.
        """
        found = self.fitted
        if found is None or (found["kind"] == "thresholds" and predictions.ndim == 1):
            return {}  # the model writes the alarms, by this threshold
        names = [*found["names"], LOOK]
        if found["kind"] == "thresholds":
            alarms = {
                f"alarm {names[c]}": (probabilities[:, c] >= t["value"]).int().tolist()
                for c, t in found["thresholds"].items()
            }
            return {"decision": [names[d] for d in decide(probabilities, _limits(found)).tolist()], **alarms}
        if found["kind"] == "costs":
            decided = cheapest_decision(probabilities, found["costs"], found["look_cost"])
            expected = _expected(probabilities, decided, found)
            return {
                "decision": [names[d] for d in decided.tolist()],
                "expected_cost": [f"{e:.6g}" for e in expected.tolist()],
            }
        sets = conformal_sets(found)(conformity_of(predictions)).tolist()
        members = [[names[c] for c, inside in enumerate(row) if inside] for row in sets]
        return {
            "decision": [row[0] if len(row) == 1 else LOOK for row in members],
            "set": ["|".join(row) for row in members],
        }

    def _set_threshold(self, module: Any) -> None:
        if self.fitted is not None and self.fitted["kind"] == "thresholds" and hasattr(module, "threshold"):
            module.threshold.fill_(self.fitted["thresholds"][1]["value"])

    def _wanted(self, names: Sequence[str], scores: bool) -> dict[int, tuple[str, float]]:
        """Goal by class."""
        found: dict[int, tuple[str, float]] = {}
        for wanted, goal in self.goals.items():
            own = f"decisions.{wanted} is {goal}"
            if scores == isinstance(goal, Mapping):
                fix = "give a number" if scores else f"name its classes, as in {{{names[-1]}: {goal}}}"
                raise SettingError(f"{own}: {fix}")
            for name, value in goal.items() if isinstance(goal, Mapping) else [(names[1], goal)]:
                if str(name) not in names:
                    raise SettingError(f"{own}: there is no class {name}: choose of {first_few(names, 10)}")
                index = names.index(str(name))
                if index in found:
                    raise SettingError(f"{own}: {name} has a {found[index][0]} already: set one goal for a class")
                check_interval("[0, 1000]" if wanted == "false_alarms" else "(0, 1]", **{wanted: value})
                found[index] = wanted, float(value)
        return found

    def fit(self, trainer: Trainer, module: Any, predictions: Tensor, labels: Tensor) -> dict[str, Any]:
        """Fit, and print what it promises.

        Returns:
            ``kind`` (thresholds, costs or coverage), ``names`` of the classes, ``confidence``, and what the kind has.
        """
        names, probabilities = class_names(module), _calibrated(trainer, predictions)
        if self.kind == "costs":
            fitted = self._expected_costs(probabilities, labels)
        elif self.kind == "coverage":
            assert self.coverage is not None
            fitted = dataclasses.asdict(fit_conformal(conformity_of(predictions), labels, self.coverage))
        else:
            fitted = {"thresholds": self._thresholds(names, predictions, probabilities, labels)}
        fitted = {"kind": self.kind, "names": names, "confidence": self.confidence, **fitted}
        print_promises(fitted)
        return fitted

    def _expected_costs(self, probabilities: Tensor, labels: Tensor) -> dict[str, Any]:
        if probabilities.ndim == 1:
            raise SettingError("decisions.costs needs probabilities, and the calibration failed")
        costs = check_costs(self.costs, probabilities.shape[1])  # type: ignore[arg-type]
        decided = cheapest_decision(probabilities, costs, self.look_cost)
        paid = realised_costs(decided, labels, costs, self.look_cost)
        interval = mean_interval(paid, self.confidence)
        return {"costs": costs, "look_cost": self.look_cost, "mean": float(paid.mean()), "interval": interval}

    def _thresholds(
        self, names: list[str], predictions: Tensor, probabilities: Tensor, labels: Tensor
    ) -> dict[int, dict[str, Any]]:
        thresholds: dict[int, Any] = {}
        unmet: list[str] = []
        for index, (wanted, goal) in self._wanted(names, predictions.ndim == 1).items():
            scores = predictions if predictions.ndim == 1 else probabilities[:, index]
            try:
                chosen = choose_threshold(scores, labels == index, wanted, goal, self.confidence)  # type: ignore[arg-type]
            except SettingError as error:
                unmet.append(f"no threshold for {names[index]}: {error}")
                continue
            thresholds[index] = dataclasses.asdict(chosen)
        if not thresholds:
            raise SettingError("; ".join(unmet))
        for line in unmet:
            rank_zero_warn(line)
        return thresholds


def decisions_of(trainer: Trainer) -> Decisions | None:
    """The Trainer's decisions, where they are fitted."""
    found = (c for c in trainer.callbacks if isinstance(c, Decisions))  # type: ignore[attr-defined]
    return next((c for c in found if c.fitted is not None), None)


def class_names(module: Any) -> list[str]:
    """The classes of a classifier; "normal" and "anomaly" of a detector."""
    names = getattr(module, "class_names", None) if hasattr(module, "test_accuracy") else None
    return [str(name) for name in names or ("normal", "anomaly")]


def _calibrated(trainer: Trainer, predictions: Tensor) -> Tensor:
    calibration = calibration_of(trainer)
    return predictions if calibration is None else calibration.apply(predictions)


def _limits(found: Mapping[str, Any]) -> Tensor:
    limits = torch.full((len(found["names"]),), torch.nan, dtype=torch.float64)
    for index, threshold in found["thresholds"].items():
        limits[index] = threshold["value"]
    return limits


def _expected(probabilities: Tensor, decided: Tensor, found: Mapping[str, Any]) -> Tensor:
    """The expected cost of each decision; that of a look is known."""
    costs = found["costs"].to(probabilities.device)
    looks = torch.full((len(costs), 1), found["look_cost"] or 0.0).to(costs)
    expected: Tensor = probabilities.double() @ torch.cat([costs, looks], dim=1)
    return expected.gather(1, decided[:, None]).squeeze(1)
