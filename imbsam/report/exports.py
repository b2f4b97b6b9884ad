"""The comparison on the terminal, as Markdown, as CSV and as a picture; the first group is the baseline."""

import csv
import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from imbsam.report.classes import ClassAccuracy, by_class_count
from imbsam.report.comparison import (
    Group,
    columns,
    data_difference,
    difference,
    differing_settings,
    logged,
    mean_and_deviation,
)
from imbsam.report.style import colour

BAR = "\\|"
NAMED = 25
"""Up to this many classes are named on an axis."""


def table_cells(group: Group, shown: Iterable[str]) -> list[str]:
    """Mean ± standard deviation of some columns."""
    return [number(*mean_and_deviation(group.values(column)), digits=digits(column)) for column in shown]


def difference_cells(group: Group, first: Group, shown: Iterable[str]) -> list[str]:
    """Difference to the first group ± its standard error, of some columns."""
    return [number(*difference(group, first, column), digits=digits(column), sign="+") for column in shown]


def digits(column: str) -> int:
    """Decimals: one for percentages."""
    return 1 if column.startswith("test/") else 3


def number(value: float, error: float | None, digits: int, sign: str = "") -> str:
    """``86.5`` or ``86.5 ± 1.2``; a dash where there is no number."""
    if not math.isfinite(value):
        return "–"
    value = round(value, digits) + 0.0  # no -0.0
    return f"{value:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def tables(groups: Sequence[Group]) -> list[list[list[str]]]:
    """Rows of cells, the heading first: results, their differences to the first group, the measures of all classes."""
    first, shown, measures = groups[0], columns(groups), logged(groups, groups[0].task.measures)
    runs = {group.name: f" ({len(group.runs)} runs)" if len(group.runs) > 1 else "" for group in groups}
    found = [[["run", *shown.values()], *([g.name + runs[g.name], *table_cells(g, shown)] for g in groups)]]
    compared = [group for group in groups[1:] if not data_difference(group, first)]
    if compared:
        differences = [[group.name, *difference_cells(group, first, shown)] for group in compared]
        found.append([[f"difference to {first.name}", *shown.values()], *differences])
    if measures:
        rows = [[group.name, *table_cells(group, measures)] for group in groups]
        found.append([["all classes, in %", *measures.values()], *rows])
    return found


def notes(groups: Sequence[Group]) -> list[str]:
    """Which groups are not compared with the first one, and why."""
    first = groups[0]
    return [
        f"{group.name} has other data than {first.name}, so it is not compared: {reason}."
        for group in groups[1:]
        if (reason := data_difference(group, first))
    ]


def markdown(groups: Sequence[Group]) -> str:
    """The tables and notes as Markdown."""
    blocks = []
    for head, *rows in tables(groups):
        lines = [f"| {' | '.join(cell.replace('|', BAR) for cell in row)} |" for row in (head, *rows)]
        blocks.append("\n".join([lines[0], f"| :-- |{' --: |' * (len(head) - 1)}", *lines[1:]]))
    return "\n\n".join([*blocks, *notes(groups)]) + "\n"


def print_tables(groups: Sequence[Group]) -> None:
    """Print the tables and notes; a long name is folded and not cut."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for i, (head, *rows) in enumerate(tables(groups)):
        title = head[0] if i else f"{groups[0].task.title}, end of training"
        table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        table.add_column("run", overflow="fold")
        for name in head[1:]:
            table.add_column(name, justify="right", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
    for note in notes(groups):
        console.print(note, soft_wrap=True, highlight=False, markup=False)


def comma_separated(groups: Sequence[Group]) -> str:
    """One row per run: group, folder, the last logged values as they are in the log, and the settings that differ."""
    settings = differing_settings([run for group in groups for run in group.runs])
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    task = groups[0].task
    shown = columns(groups) | logged(groups, {**task.measures, **task.details, **task.distributions})
    writer.writerow(["group", "folder", *shown, *settings])
    for group in groups:
        for run in group.runs:
            values = [run.final.get(column) for column in shown]
            writer.writerow([group.name, run.folder, *values, *(run.settings.get(key) for key in settings)])
    return out.getvalue()


def picture(groups: Sequence[Group], path: Path) -> None:
    """Draw the test results, and the accuracy per class where the runs wrote it, into a PNG file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    classes = [by_class_count(group) for group in groups]
    figure = Figure(figsize=(9, 3.4) if any(classes) else (4.5, 3.4), layout="constrained")
    axes = figure.subplots(1, 2 if any(classes) else 1, squeeze=False)[0]
    width, task = 0.8 / len(groups), groups[0].task
    for i, group in enumerate(groups):
        means, deviations = zip(*(mean_and_deviation(group.values(name)) for name in task.results), strict=True)
        places = [j + (i - (len(groups) - 1) / 2) * width for j in range(len(task.results))]
        error = [deviation or 0 for deviation in deviations] if len(group.runs) > 1 else None
        label = group.name + (f" ({len(group.runs)} runs)" if len(group.runs) > 1 else "")
        axes[0].bar(places, means, width, yerr=error, label=label, color=colour(i), error_kw={"linewidth": 1})
        if classes[i]:
            line = [100 * entry.accuracy for entry in classes[i]]
            axes[1].plot(range(len(line)), line, "-o" if len(line) <= 50 else ".", color=colour(i), markersize=4)
    axes[0].set_xticks(range(len(task.results)), [textwrap.fill(title, 12) for title in task.results.values()])
    axes[0].set_ylabel(task.title)
    if longest := max(classes, key=len):
        step = 1 if len(longest) <= NAMED else -(-len(longest) // 10)
        labels, named = axis_labels(longest[::step])
        turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if named else {}
        axes[1].set_xticks(range(0, len(longest), step), labels, **turned)
        axes[1].set_xlabel("class (training samples)" if named else "training samples of the class")
    for ax in axes:
        ax.set_ylim(0, 100)
        ax.grid(axis="y", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=min(len(groups), 3), frameon=False)
    figure.savefig(path, dpi=110)


def axis_labels(entries: Sequence[ClassAccuracy]) -> tuple[list[str], bool]:
    """The tick labels of some classes, and whether they are names.

    Where the seed deals the counts to the classes, a rank has several classes and only its count is shown.
    """
    named = all(len(entry.names) == 1 for entry in entries)
    if not named:
        return [str(entry.count) for entry in entries], False
    names = [entry.names[0] for entry in entries]
    short = [name if len(name) <= 20 else f"{name[:19]}…" for name in names]
    return [f"{name} ({entry.count})" for name, entry in zip(short, entries, strict=True)], True
