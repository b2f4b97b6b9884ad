"""The measures of a model card, each with its interval over the test samples and over the seeds."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from imbsam.group_names import GROUPS
from imbsam.intervals import Interval, auroc_interval, clopper_pearson, t_interval, wilson
from imbsam.report.comparison import Group
from imbsam.report.runs import Row, Run
from imbsam.report.task import CLASSIFIER


@dataclass(frozen=True)
class Measure:
    """One measure of a group of runs.

    Attributes:
        key: the logged quantity.
        name: what it is.
        value: in [0, 1], the mean over the runs.
        samples: its interval over test samples like these, None where no formula gives one.
        seeds: Student's interval of the mean over the seeds, None for a single run.
    """

    key: str
    name: str
    value: float
    samples: Interval | None
    seeds: Interval | None


def measures(group: Group) -> list[Measure]:
    """The measures that every run of a group has logged; groups of classes without test samples have none."""
    task = group.task
    names = {**task.results, **task.optional, **task.measures, **task.details}
    if task is CLASSIFIER:
        grouped = {"many": "the many-shot", "medium": "the medium-shot", "few": "the few-shot", "all": "all"}
        names |= {f"test/{name}": f"accuracy of {grouped[name]} classes" for name in GROUPS}
        names.pop("test/ece_all", None)  # in the section on calibration
    else:
        alarms = "within the budget" if group.runs[0].settings.get("budget") else "as many alarms as anomalies"
        names |= {f"test/budget_{name}": f"{name}, {alarms}" for name in ("precision", "recall")}
        names |= {"test/precision": "precision at the threshold", "test/recall": "recall at the threshold"}
    found = []
    for key, name in names.items():
        values = [run.final.get(key, math.nan) for run in group.runs]
        if all(map(math.isfinite, values)):
            mean = statistics.fmean(values)
            over_seeds = _clipped(t_interval(values)) if len(values) > 1 else None
            found.append(Measure(key, name, mean, _over_samples(group.runs[0], key, mean), over_seeds))
    return found


def recall_interval(row: Row) -> Interval:
    """Clopper-Pearson's interval of a class's recall."""
    return clopper_pearson(round(row["accuracy"] * row["test_samples"]), row["test_samples"])


def classes_with_tests(run: Run, name: str) -> list[Row]:
    """The rows of ``per_class.csv`` with test samples, of a group of classes or all."""
    return [row for row in run.classes if row["test_samples"] and name in ("all", row["group"])]


def samples_tested(run: Run) -> dict[str, int]:
    """Test samples of each class, by name; empty where no file tells."""
    if run.classes:
        return {row["class_name"]: row["test_samples"] for row in run.classes}
    counts: dict[str, int] = run.facts.get("samples", {}).get("test", {})
    return counts


def _over_samples(run: Run, key: str, value: float) -> Interval | None:
    name, counts = key.removeprefix("test/"), list(samples_tested(run).values())
    if name in GROUPS:
        rows = classes_with_tests(run, name)
        return wilson(value, len(rows) ** 2 / sum(1 / row["test_samples"] for row in rows)) if rows else None
    if run.task is CLASSIFIER or len(counts) != 2:
        return None
    normal, anomalies = counts
    if name == "auroc":
        return auroc_interval(value, anomalies, normal)
    if name == "average_precision":
        return wilson(value, anomalies)
    if name in ("recall", "budget_recall"):
        return clopper_pearson(round(value * anomalies), anomalies)
    if name in ("precision", "budget_precision"):
        recall = run.final.get(f"test/{name.replace('precision', 'recall')}", math.nan)
        hits = round(recall * anomalies) if math.isfinite(recall) else 0
        return clopper_pearson(hits, max(hits, round(hits / value))) if hits and value else None
    return None


def percent(share: float | None, digits: int = 1) -> str:
    """``86.5 %``; a dash where there is no number."""
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f} %"


def percents(interval: Interval | None) -> str:
    """``81.2 to 90.4 %``, or a dash."""
    return "–" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def counted(numbers: Iterable[int]) -> str:
    """``1,234``, or ``2 to 1,234`` where they differ."""
    known: Sequence[int] = sorted(numbers)
    if not known:
        return "–"
    return f"{known[0]:,}" if known[0] == known[-1] else f"{known[0]:,} to {known[-1]:,}"


def _clipped(interval: Interval) -> Interval:
    return max(0.0, interval[0]), min(1.0, interval[1])
