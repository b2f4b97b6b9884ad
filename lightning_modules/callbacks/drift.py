"""Drift: whether the rows of a prediction are still like the validation part, of which the checkpoint keeps scores."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from torch import Tensor

from imbsam.checks import check_interval
from imbsam.drift import Shift, bonferroni, score_shift, share_shift, smallest_distance, tail_shift
from imbsam.errors import SettingError
from lightning_modules.callbacks.decisions import class_names
from lightning_modules.callbacks.fitted_callback import FittedCallback

KEPT = 10_000
"""Scores of the reference; of more validation samples so many are drawn."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Drift(FittedCallback):
    """Compare what ``imbsam predict`` predicts with the validation part.

    When a training ends, the predictions of the validation part by its last weights are kept in the last checkpoint: at
    most 10,000 scores (of a classifier the probabilities of the predicted classes), and how often each class was
    predicted. ``imbsam predict`` then compares (:mod:`imbsam.drift`), prints one line, and writes the numbers to
    ``NAME.drift.json`` beside ``NAME.csv``:

    * of a detector the scores (Kolmogorov-Smirnov), and how many are above the highest 5 % of the validation part;
    * of a classifier the probabilities of the predicted classes (Kolmogorov-Smirnov), and the shares of the predicted
      classes (chi-square).

    A shift is reported as drift where it is significant, the p-values corrected for there being two of them, and
    material too. The model's own predictions are compared, before any calibration. It needs no labels, and does not see
    what changes these alone.

    Args:
        alpha: chance of reporting a shift where there is none, in (0, 1); null: nothing is kept and nothing compared.
        material: distance of the scores, or of the class shares, from which a shift matters: the share of the rows that
            have moved. Of the highest 5 % twice or half as many matter.

    Raises:
        SettingError: a setting is out of its range, or, at the start of a training, there is no validation part.
    """

    name = "drift"
    title = "comparison for drift"  # "no drift" would say that there is none

    def __init__(self, alpha: float | None = None, material: float = 0.1) -> None:
        super().__init__()
        if alpha is not None:
            check_interval("(0, 1)", alpha=alpha)
        check_interval("(0, 1]", material=material)
        self.alpha, self.material = alpha, material

    @property
    def settings(self) -> dict[str, Any]:
        """Level and effect."""
        return {} if self.alpha is None else {"alpha": self.alpha, "material": self.material}

    def check(self, trainer: Trainer, module: Any) -> None:
        """Every model will do."""

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Test samples are not compared: their classes are often balanced on purpose."""

    def fit(self, trainer: Trainer, module: Any, predictions: Tensor, labels: Tensor) -> dict[str, Any]:
        """Keep what new predictions are compared with.

        Returns:
            ``scores``, sorted, float32, at most 10,000; ``rows`` of the validation part; of a classifier ``counts``,
            how often each class was predicted, int64 (C,), and the ``names`` of the classes.
        """
        scores = _scores(predictions)
        if not scores.isfinite().all():
            raise SettingError("the scores of the validation part are not finite: training diverged")
        drawn = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))[:KEPT]
        found: dict[str, Any] = {"scores": scores[drawn].sort().values, "rows": len(scores)}
        if predictions.ndim == 2:
            found["counts"] = predictions.argmax(dim=1).bincount(minlength=predictions.shape[1])
            found["names"] = class_names(module)
        rank_zero_info(f"drift: predict will compare with these {len(scores):,} validation samples")
        return found

    def report(self, predictions: Tensor, path: Path) -> None:
        """Compare, print the line and write the file.

        Args:
            predictions: what the model predicts, on the CPU: probabilities (N, C) or scores (N,).
            path: the file of the predictions.
        """
        assert self.fitted is not None
        found, own = self.fitted, self.fitted["settings"]
        scores = _scores(predictions)
        known = scores.isfinite()
        file, line = path.with_name(f"{path.stem}.drift.json"), "no row has a finite score"
        if known.any():
            kept = predictions[known]
            facts = compared(found, kept, own["alpha"], own["material"])
            facts["rows_without_a_score"] = int((~known).sum())
            file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            line = f"{in_words(facts)} ({file})"
        Console().print(f"drift: {line}", soft_wrap=True, highlight=False)


def compared(reference: dict[str, Any], predictions: Tensor, alpha: float, material: float) -> dict[str, Any]:
    """The numbers of the file.

    Args:
        reference: see :meth:`Drift.fit`.
        predictions: finite probabilities (N, C) or scores (N,), N from 1.
        alpha: level of all tests together.
        material: see :class:`Drift`.
    """
    old, new = reference["scores"], _scores(predictions)
    shifts: list[Shift]
    more: dict[str, Any] = {}
    if predictions.ndim == 1:
        shifts = [score_shift(old, new, material), tail_shift(old, new)]
    else:
        counts = predictions.argmax(dim=1).bincount(minlength=predictions.shape[1])
        shifts = [
            score_shift(old, new, material, "probability of the predicted class"),
            share_shift(reference["counts"], counts, material),
        ]
        shares = ((n / n.sum()).tolist() for n in (reference["counts"].double(), counts.double()))
        rows = zip(reference["names"], *shares, strict=True)
        more["class_shares"] = {name: {"validation": _rounded(a), "now": _rounded(b)} for name, a, b in rows}
    corrected = bonferroni(shifts)
    tests = [
        {
            "quantity": shift.quantity,
            "test": shift.test,
            "effect": _rounded(shift.effect),
            "material": shift.material,
            "p_value": _rounded(shift.p_value),
            "corrected_p_value": _rounded(p),
            "significant": p <= alpha,
        }
        for shift, p in zip(shifts, corrected, strict=True)
    ]
    quantiles = zip(QUANTILES, *(np.quantile(part.numpy(), QUANTILES).tolist() for part in (old, new)), strict=True)
    return {
        "drift": any(test["significant"] and test["material"] for test in tests),
        "alpha": alpha,
        "material_distance": material,
        "rows": len(new),
        "validation_rows": reference["rows"],
        "distance_that_can_be_seen": _rounded(smallest_distance(len(old), len(new), alpha / len(tests))),
        "tests": tests,
        "quantiles": {f"{q:g}": {"validation": _rounded(a), "now": _rounded(b)} for q, a, b in quantiles},
        **more,
    }


def in_words(facts: dict[str, Any]) -> str:
    """The line on the screen."""
    moved = [test for test in facts["tests"] if test["significant"] and test["material"]]
    small = [test for test in facts["tests"] if test["significant"] and not test["material"]]
    if moved:
        return f"these {facts['rows']:,} rows are not like the validation part: {_listed(moved)}"
    if small:
        return f"none that matters; a small shift: {_listed(small)}"
    line = f"none found: {_listed(facts['tests'])}"
    if facts["distance_that_can_be_seen"] > facts["material_distance"]:
        few = min(("rows", "validation_rows"), key=lambda name: int(facts[name]))
        fewer = f"{facts[few]:,} {few.replace('_', ' ')}"
        line += f"; with {fewer}, no distance below {facts['distance_that_can_be_seen']:.2g} can be told from chance"
    return line


def drift_of(trainer: Trainer) -> Drift | None:
    """The Trainer's drift, where a reference is kept."""
    found = (c for c in trainer.callbacks if isinstance(c, Drift))  # type: ignore[attr-defined]
    return next((c for c in found if c.fitted is not None), None)


def _listed(tests: Sequence[dict[str, Any]]) -> str:
    """``scores moved by 0.31 (p 2e-09)``, or ``highest scores 3.1 times as many (p 0.001)``."""
    said = []
    for test in tests:
        ratio = test["quantity"] == "highest scores"
        effect = f"{test['effect']:.2g} times as many" if ratio else f"moved by {test['effect']:.2g}"
        said.append(f"{test['quantity']} {effect} (p {test['corrected_p_value']:.2g})")
    return ", ".join(said)


def _scores(predictions: Tensor) -> Tensor:
    """Scores, or probabilities of the predicted class, (N,), float32."""
    return (predictions if predictions.ndim == 1 else predictions.max(dim=1).values).float().cpu()


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
