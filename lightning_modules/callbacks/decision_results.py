"""What decisions promise by the validation part, and what comes of it on the test samples."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import Tensor

from imbsam.conformal import ConformalSets
from imbsam.costs import cheapest_decision, realised_costs
from imbsam.intervals import Interval
from imbsam.thresholds import Threshold


def conformal_sets(found: Mapping[str, Any]) -> ConformalSets:
    """The sets of a fit that a checkpoint keeps."""
    return ConformalSets(found["coverage"], found["limits"], found["samples"])


def conformity_of(predictions: Tensor) -> Tensor:
    """How much each sample is like each class (N, C): probabilities, or a score and its negative."""
    return torch.stack([-predictions, predictions], dim=1) if predictions.ndim == 1 else predictions


def _threshold(saved: Mapping[str, Any]) -> Threshold:
    return Threshold(**{**saved, "precision_interval": tuple(saved["precision_interval"])})


def _share(value: float, interval: Interval, scale: float = 100.0, unit: str = " %") -> str:
    return f"{scale * value:.3g}{unit} [{scale * interval[0]:.3g}, {scale * interval[1]:.3g}]"


@rank_zero_only
def print_promises(found: Mapping[str, Any]) -> None:
    """Print what a fit promises."""
    confidence = f"{100 * found['confidence']:g} %"
    if found["kind"] == "costs":
        mean = _share(found["mean"], found["interval"], 1.0, "")
        Console().print(f"decisions by cost: {mean} a sample on the validation part ({confidence} interval)")
        return
    table = Table(title=f"decisions, by the validation part ({confidence} intervals)")
    if found["kind"] == "coverage":
        sets = conformal_sets(found)
        for column in ("class", "validation samples", "in the set from", "coverage on new samples"):
            table.add_column(column)
        for index, name in enumerate(found["names"]):
            low, high = sets.interval(index, found["confidence"])
            expected = f"≥ {100 * sets.coverage:g} % [{100 * low:.3g}, {100 * high:.3g}]"
            limit = f"{float(sets.limits[index]):.4g}"
            always = "always: too few samples" if limit == "-inf" else limit
            table.add_row(name, f"{int(sets.samples[index]):,}", always, expected)
    else:
        for column in ("class", "wanted", "alarm from", "recall", "precision", "false alarms per thousand"):
            table.add_column(column)
        for index, saved in found["thresholds"].items():
            t = _threshold(saved)
            cells = (
                _share(t.recall, t.recall_interval),
                _share(t.precision, t.precision_interval),
                _share(t.false_alarms_per_thousand, t.false_alarms_interval, 1.0, ""),
            )
            wanted = f"{t.wanted.replace('_', ' ')} {t.goal:g}"
            table.add_row(found["names"][index], wanted, f"{t.value:.4g}", *cells)
    Console().print(table)


def realised(
    found: Mapping[str, Any], predictions: Tensor, probabilities: Tensor, labels: Tensor
) -> Iterable[tuple[str, str, str, float]]:
    """What a fit does on test samples: what, the promise, what came of it in words, and as a number for the log."""
    names = found["names"]
    if found["kind"] == "costs":
        decided = cheapest_decision(probabilities, found["costs"], found["look_cost"])
        cost = float(realised_costs(decided, labels, found["costs"], found["look_cost"]).mean())
        yield "mean cost", _share(found["mean"], found["interval"], 1.0, ""), f"{cost:.3g}", cost
        looks = float((decided == len(names)).double().mean())
        yield "share of looks", "", f"{100 * looks:.3g} %", looks
    elif found["kind"] == "coverage":
        sets = conformal_sets(found)
        members = sets(conformity_of(predictions))
        for index, name in enumerate(names):
            inside = members[labels == index, index]
            low, high = sets.interval(index, found["confidence"])
            share = float(inside.double().mean()) if len(inside) else torch.nan
            said = f"{100 * share:.3g} % of {len(inside):,}"
            yield f"coverage {name}", f"≥ {100 * sets.coverage:g} % [{100 * low:.3g}, {100 * high:.3g}]", said, share
        looks = float((members.sum(dim=1) != 1).double().mean())
        yield "share of looks", "", f"{100 * looks:.3g} %", looks
    else:
        for index, saved in found["thresholds"].items():
            t, name = _threshold(saved), names[index]
            scores = predictions if predictions.ndim == 1 else probabilities[:, index]
            alarm, positive = scores >= t.value, labels == index
            hits, misfires = int((alarm & positive).sum()), int((alarm & ~positive).sum())
            positives, negatives = int(positive.sum()), int((~positive).sum())
            recall, precision = hits / max(1, positives), hits / max(1, hits + misfires)
            false = 1000 * misfires / max(1, negatives)
            alarms = hits + misfires
            yield (
                f"recall {name}",
                _share(t.recall, t.recall_interval),
                f"{100 * recall:.3g} % of {positives:,}",
                recall,
            )
            promised = _share(t.precision, t.precision_interval)
            yield f"precision {name}", promised, f"{100 * precision:.3g} % of {alarms:,} alarms", precision
            promised = _share(t.false_alarms_per_thousand, t.false_alarms_interval, 1.0, "")
            yield f"false alarms per thousand {name}", promised, f"{false:.3g} of {negatives:,}", false
