"""The classes of a group of runs, from the most to the fewest training samples."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from imbsam.group_names import GROUPS
from imbsam.report.comparison import Group
from imbsam.report.runs import Run


@dataclass
class ClassAccuracy:
    """The accuracy at one place in the order of the class counts.

    Attributes:
        names: the classes at that place; more than one where the seed deals the counts to the classes.
        count: training samples of the first run's class.
        group: many, medium or few, of the first run's class.
        accuracies: of each run, in [0, 1].
    """

    names: list[str]
    count: int
    group: str
    accuracies: list[float]

    @property
    def accuracy(self) -> float:
        """The mean over the runs."""
        return statistics.fmean(self.accuracies)


def by_class_count(group: Group) -> list[ClassAccuracy]:
    """The accuracies of a group, by place in the order of the class counts.

    Runs are averaged place by place, so that the second most frequent class of one seed meets that of another. Only the
    runs that wrote ``per_class.csv`` with the first one's number of classes count; classes without test samples are
    left out.
    """
    ordered = [
        sorted((row for row in run.classes if row["accuracy"]), key=lambda row: -int(row["training_samples"]))
        for run in group.runs
        if run.classes
    ]
    ordered = [rows for rows in ordered if len(rows) == len(ordered[0])]
    return [
        ClassAccuracy(
            names=list(dict.fromkeys(row["class_name"] for row in place)),
            count=int(place[0]["training_samples"]),
            group=place[0]["group"],
            accuracies=[float(row["accuracy"]) for row in place],
        )
        for place in zip(*ordered, strict=True)
    ]


@dataclass
class TailConfusion:
    """What the tail classes were taken for.

    Attributes:
        labels: names of the tail classes shown, with their training samples, from the most to the fewest.
        cells: test samples of the row's class that were predicted as the column's, in the last column but one as a tail
            class that is not shown, in the last as a head class; summed over runs.
        left_out: tail classes that are not shown.
    """

    labels: list[str]
    cells: list[list[int]]
    left_out: int


def of_one_data_set(groups: Sequence[Group]) -> tuple[list[Group], list[str]]:
    """The groups, but what those of other classes than the first's know of their classes is left out, and their names.

    All of them stay, so that each keeps its colour.
    """
    known = [{row["class"]: row["class_name"] for run in group.runs for row in run.classes} for group in groups]
    first = next((names for names in known if names), {})
    others = [bool(names) and names != first for names in known]
    return [
        Group(group.name, [replace(run, classes=[], confusion=[]) for run in group.runs]) if other else group
        for group, other in zip(groups, others, strict=True)
    ], [group.name for group, other in zip(groups, others, strict=True) if other]


def tail_confusion(groups: Sequence[Group], most: int = 25) -> list[TailConfusion | None]:
    """Of every group, the confusion among the tail classes.

    The same classes for all groups: where there are more than ``most``, those with most errors over all runs. A run
    counts for the rows of its own tail classes. None for a group without ``confusion.csv``.
    """
    errors: Counter[str] = Counter()
    counts: dict[str, set[int]] = {}
    names: dict[str, str] = {}
    for run in (run for group in groups for run in group.runs if run.confusion):
        for row in run.classes:
            if row["tail"] == "1":
                errors[row["class"]] += 0
                counts.setdefault(row["class"], set()).add(int(row["training_samples"]))
                names[row["class"]] = row["class_name"]
        tail = tail_classes(run)
        for row in run.confusion:
            if row["target"] in tail and row["target"] != row["predicted"]:
                errors[row["target"]] += int(row["count"])
    shown = [c for c, _ in errors.most_common(most)]
    shown.sort(key=lambda c: (-max(counts[c]), int(c)))
    labels = [f"{names[c]} ({'–'.join(str(n) for n in sorted({min(counts[c]), max(counts[c])}))})" for c in shown]
    found: list[TailConfusion | None] = []
    for group in groups:
        runs = [run for run in group.runs if run.confusion and run.classes]
        cells = [[0] * (len(shown) + 2) for _ in shown]
        index = {c: i for i, c in enumerate(shown)}
        for run in runs:
            tail = tail_classes(run)
            for row in run.confusion:
                if row["target"] in tail and row["target"] in index:
                    predicted = row["predicted"]
                    column = index.get(predicted, -2) if predicted in tail else -1
                    cells[index[row["target"]]][column] += int(row["count"])
        found.append(TailConfusion(labels, cells, len(errors) - len(shown)) if runs and shown else None)
    return found


def tail_classes(run: Run) -> set[str]:
    """The run's tail classes, by index."""
    return {row["class"] for row in run.classes if row["tail"] == "1"}


@dataclass
class Calibration:
    """Confidence against accuracy of one class group, over the runs of a group.

    Attributes:
        bins: (samples, mean confidence, accuracy) of each bin of the confidence that has samples, runs pooled.
        errors: the expected calibration error of each run, in [0, 1].
    """

    bins: list[tuple[int, float, float]]
    errors: list[float]


def calibration(group: Group) -> dict[str, Calibration]:
    """The calibration of each class group, over the runs that wrote ``calibration.csv``; empty where none did."""
    found: dict[str, Calibration] = {}
    for name in GROUPS:
        pooled: dict[int, list[tuple[int, float, float]]] = {}
        errors = []
        for run in group.runs:
            rows = [
                (int(row["samples"]), float(row["confidence"]), float(row["accuracy"]), int(row["bin"]))
                for row in run.calibration
                if row["group"] == name
            ]
            for samples, confidence, accuracy, b in rows:
                pooled.setdefault(b, []).append((samples, confidence, accuracy))
            if rows:
                errors.append(_expected_error([row[:3] for row in rows]))
        if errors:
            found[name] = Calibration([_pool(pooled[b]) for b in sorted(pooled)], errors)
    return found


def _expected_error(bins: Sequence[tuple[int, float, float]]) -> float:
    """Guo et al., ICML 2017, equation 3: the gap of confidence and accuracy, weighted by the bins' samples."""
    return sum(n * abs(accuracy - confidence) for n, confidence, accuracy in bins) / sum(n for n, _, _ in bins)


def _pool(bins: Sequence[tuple[int, float, float]]) -> tuple[int, float, float]:
    samples = sum(n for n, _, _ in bins)
    return samples, sum(n * c for n, c, _ in bins) / samples, sum(n * a for n, _, a in bins) / samples
