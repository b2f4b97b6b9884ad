"""The classes of a group of runs: accuracy, confusion among the tail, calibration."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from imbsam.report.comparison import Group
from imbsam.report.runs import Row, Run


@dataclass
class ClassAccuracy:
    """The accuracy at one rank in the order of the class counts.

    Attributes:
        names: the classes of that rank; more than one where the seed deals the counts to the classes.
        count: training samples of the first run's class.
        group: many, medium or few, of the first run's class.
        accuracy: in [0, 1], the mean over the runs.
    """

    names: list[str]
    count: int
    group: str
    accuracy: float


def by_class_count(group: Group) -> list[ClassAccuracy]:
    """The accuracies of a group, from the class with the most training samples to that with the fewest.

    Runs are averaged rank by rank, so that the second most frequent class of one seed meets that of another. Only runs
    with ``per_class.csv`` and the first one's number of classes count; classes without test samples are left out.
    """
    ordered = [
        sorted((row for row in run.classes if row["accuracy"] is not None), key=lambda row: -row["training_samples"])
        for run in group.runs
        if run.classes
    ]
    ordered = [rows for rows in ordered if len(rows) == len(ordered[0])]
    return [
        ClassAccuracy(
            names=list(dict.fromkeys(row["class_name"] for row in rows)),
            count=rows[0]["training_samples"],
            group=rows[0]["group"],
            accuracy=statistics.fmean(row["accuracy"] for row in rows),
        )
        for rows in zip(*ordered, strict=True)
    ]


def same_classes(groups: Sequence[Group]) -> tuple[list[Group], list[str]]:
    """The groups, without the per-class results of those whose classes are not the first's, and the names of those.

    All groups stay, so that each keeps its colour.
    """
    names = [{row["class"]: row["class_name"] for run in group.runs for row in run.classes} for group in groups]
    first = next(filter(None, names), {})
    kept, others = [], []
    for group, own in zip(groups, names, strict=True):
        if own and own != first:
            others.append(group.name)
            group = Group(group.name, [replace(run, classes=[], confusion=[]) for run in group.runs])
        kept.append(group)
    return kept, others


@dataclass
class TailConfusion:
    """How the test samples of the tail classes were classified.

    Attributes:
        labels: names of the tail classes shown, with their training samples, from the most to the fewest.
        cells: test samples of the row's class that were predicted as the column's, summed over runs; the last two
            columns are the tail classes that are not shown and the head classes.
        left_out: number of tail classes that are not shown.
    """

    labels: list[str]
    cells: list[list[int]]
    left_out: int


def tail_confusion(groups: Sequence[Group], most: int = 25) -> list[TailConfusion | None]:
    """The confusion among the tail classes of every group.

    The same classes for all groups: where there are more than ``most``, those with the most errors over all runs. A run
    counts for its own tail classes. None for a group without ``confusion.csv``.
    """
    errors: Counter[int] = Counter()
    counts: dict[int, set[int]] = defaultdict(set)
    names: dict[int, str] = {}
    for run in (run for group in groups for run in group.runs if run.confusion):
        tail = _tail_classes(run)
        for c, row in tail.items():
            errors[c] += 0
            counts[c].add(row["training_samples"])
            names[c] = row["class_name"]
        for cell in run.confusion:
            if cell["target"] in tail and cell["target"] != cell["predicted"]:
                errors[cell["target"]] += cell["count"]
    shown = sorted((c for c, _ in errors.most_common(most)), key=lambda c: (-max(counts[c]), c))
    labels = [f"{names[c]} ({'–'.join(str(n) for n in sorted({min(counts[c]), max(counts[c])}))})" for c in shown]
    index = {c: i for i, c in enumerate(shown)}
    confusions: list[TailConfusion | None] = []
    for group in groups:
        runs = [run for run in group.runs if run.confusion and run.classes]
        cells = [[0] * (len(shown) + 2) for _ in shown]
        for run in runs:
            tail = _tail_classes(run)
            for cell in run.confusion:
                if cell["target"] in tail and cell["target"] in index:
                    column = index.get(cell["predicted"], -2) if cell["predicted"] in tail else -1
                    cells[index[cell["target"]]][column] += cell["count"]
        confusions.append(TailConfusion(labels, cells, len(errors) - len(shown)) if runs and shown else None)
    return confusions


def _tail_classes(run: Run) -> dict[int, Row]:
    return {row["class"]: row for row in run.classes if row["tail"]}


Bin = tuple[int, int, float, float]
"""Number of the bin, samples, mean confidence, accuracy."""


def calibration_bins(group: Group, calibrated: bool = False) -> dict[str, list[Bin]]:
    """For each class group the bins of the confidence with a sample, runs pooled.

    Args:
        group: the runs.
        calibrated: of the calibrated probabilities, in place of the model's own.
    """
    pooled: dict[str, dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in (row for run in group.runs for row in (run.calibrated if calibrated else run.calibration)):
        pooled[row["group"]][row["bin"]].append(row)
    return {name: [(b, *_pool(bins[b])) for b in sorted(bins)] for name, bins in pooled.items()}


def _pool(rows: Sequence[Row]) -> tuple[int, float, float]:
    samples = sum(row["samples"] for row in rows)
    confidence, accuracy = (sum(row["samples"] * row[name] for row in rows) for name in ("confidence", "accuracy"))
    return samples, confidence / samples, accuracy / samples
