"""Runs of the same settings as one group: means over seeds, and differences to the baseline."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from imbsam.report.method import PLAIN
from imbsam.report.runs import Run
from imbsam.report.task import Task


@dataclass
class Group:
    """Runs that differ in their seeds only.

    Attributes:
        name: their folder's name, with the settings in which groups of one folder differ.
        runs: at least one, but for :func:`without_other_data`.
    """

    name: str
    runs: list[Run]

    @property
    def task(self) -> Task:
        """What its models do."""
        return self.runs[0].task

    def values(self, column: str) -> list[float]:
        """The runs' last values of a logged quantity, those of the test in percent; nan where one did not log it."""
        factor = 100 if column.startswith("test/") else 1
        return [factor * run.final.get(column, math.nan) for run in self.runs]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """One group for the runs of one place with the same settings, in the order of their first runs."""
    by_settings: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_settings[f"{run.folder.resolve().parent} {_text(run.settings)}"].append(run)
    groups = list(by_settings.values())
    names = [_name(group[0], [other[0] for other in groups]) for group in groups]
    return [
        Group(name if names.count(name) == 1 else f"{name} ({group[0].folder})", group)
        for name, group in zip(names, groups, strict=True)
    ]


def columns(groups: Sequence[Group]) -> dict[str, str]:
    """The table's columns, logged quantity to heading; the optional ones where some run has them."""
    task = groups[0].task
    optional = logged(groups, task.optional)
    return {name: title for name, title in task.columns.items() if name not in task.optional or name in optional}


def logged(groups: Sequence[Group], names: Mapping[str, str]) -> dict[str, str]:
    """Those of some quantities, with their headings, that a run has logged."""
    found = {name for group in groups for run in group.runs for name in run.final}
    return {name: title for name, title in names.items() if name in found}


def baseline_first(groups: Sequence[Group], name: str | None = None) -> list[Group]:
    """The groups, the baseline first.

    Args:
        groups: at least one.
        name: name of the baseline; None is plain training (rather without a weight on the tail's loss), or the first
            group where there is none.

    Raises:
        ValueError: no group has that name; one line.
    """
    named = [group for group in groups if group.name == name]
    if name is not None and not named:
        raise ValueError(f"baseline is {name}: name one of {', '.join(group.name for group in groups)}")
    plain = [group for group in groups if group.runs[0].method.name == PLAIN]
    plain.sort(key=lambda group: group.runs[0].settings.get("sam.tail_weight", 1) != 1)
    baseline = (named or plain or list(groups))[0]
    return [baseline, *(group for group in groups if group is not baseline)]


def data_difference(group: Group, baseline: Group) -> str:
    """How a group's data differ from the baseline's, in words; empty if no difference is known.

    Compared are the data settings that both have, and the test samples of each class.
    """
    run, first = group.runs[0], baseline.runs[0]
    differing = [
        f"{key} {value}, not {first.data[key]}"
        for key, value in run.data.items()
        if key in first.data and value != first.data[key]
    ]
    if differing:
        return ", ".join(differing)
    tested = [{row["class_name"]: row["test_samples"] for row in run.classes} for run in (run, first)]
    if all(tested) and tested[0] != tested[1]:
        if tested[0].keys() != tested[1].keys():
            return "other classes"
        return f"{run.test_samples:,} test samples, not {first.test_samples:,}, or other numbers of some classes"
    return ""


def without_other_data(groups: Sequence[Group]) -> list[Group]:
    """The groups, without the runs of those whose data are not the first's; all stay, so that each keeps its colour."""
    return [Group(group.name, [] if data_difference(group, groups[0]) else group.runs) for group in groups]


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """The settings, by their dotted names, in which the runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return [key for key in keys if len({_text(run.settings.get(key)) for run in runs}) > 1]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation; the latter is None for a single value."""
    return statistics.fmean(values), _deviation(values) if len(values) > 1 else None


def difference(group: Group, first: Group, column: str) -> tuple[float, float | None]:
    """Difference of a group's mean to the first group's, and its standard error.

    Where both groups have the same seeds, one run each, the runs are compared seed by seed: s / sqrt(n) with s the
    standard deviation of the n differences. Otherwise sqrt(s1^2 / n1 + s2^2 / n2). None where a group has a single run.
    """
    here, there = group.values(column), first.values(column)
    mean = statistics.fmean(here) - statistics.fmean(there)
    if min(len(here), len(there)) < 2:
        return mean, None
    if paired(group, first):
        by_seed = {run.seeds: value for run, value in zip(first.runs, there, strict=True)}
        differences = [value - by_seed[run.seeds] for run, value in zip(group.runs, here, strict=True)]
        return mean, _deviation(differences) / math.sqrt(len(differences))
    return mean, math.sqrt(_deviation(here) ** 2 / len(here) + _deviation(there) ** 2 / len(there))


def _deviation(values: Sequence[float]) -> float:
    """The standard deviation; nan where a value is nan, which `statistics` does not take."""
    return statistics.stdev(values) if all(math.isfinite(v) for v in values) else math.nan


def paired(group: Group, first: Group) -> bool:
    """Whether two groups have the same seeds, one run each."""
    seeds, others = [run.seeds for run in group.runs], [run.seeds for run in first.runs]
    return len(set(seeds)) == len(seeds) == len(others) and set(seeds) == set(others)


def _name(run: Run, all_runs: Sequence[Run]) -> str:
    neighbours = [other for other in all_runs if other.place == run.place]
    differing = differing_settings(neighbours)
    short = [key.rpartition(".")[2] for key in differing]
    labels = [
        f"{name if short.count(name) == 1 else key}={run.settings.get(key)}"
        for key, name in zip(differing, short, strict=True)
    ]
    return " ".join([run.place, *labels])


def _text(settings: Any) -> str:
    return json.dumps(settings, sort_keys=True, default=str)
