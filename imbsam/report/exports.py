"""The comparison as Markdown, as CSV and as a picture."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from imbsam.report.classes import by_class_count
from imbsam.report.comparison import COLUMNS, Group, difference, differing_settings, mean_and_deviation
from imbsam.report.runs import GROUPS
from imbsam.report.style import colour


def table_cells(group: Group) -> list[str]:
    """Mean ± standard deviation of every column."""
    return [number(*mean_and_deviation(group.values(column)), digits=digits(column)) for column in COLUMNS]


def difference_cells(group: Group, first: Group) -> list[str]:
    """Difference to the first group ± its standard error, of every column."""
    return [number(*difference(group, first, column), digits=digits(column), sign="+") for column in COLUMNS]


def digits(column: str) -> int:
    """Decimals: one for percentages."""
    return 1 if column.startswith("test/") else 3


def number(value: float, error: float | None, digits: int, sign: str = "") -> str:
    """``86.5`` or ``86.5 ± 1.2``."""
    value = round(value, digits) + 0.0  # no -0.0
    return f"{value:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def markdown(groups: Sequence[Group]) -> str:
    """The table of the groups, and under it that of their differences to the first one."""
    head = f"| {' | '.join(COLUMNS.values())} |\n| :-- |{' --: |' * len(COLUMNS)}"
    lines = [f"| run {head}"]
    for group in groups:
        runs = f" ({len(group.runs)} runs)" if len(group.runs) > 1 else ""
        lines.append(f"| {_cell(group.name)}{runs} | {' | '.join(table_cells(group))} |")
    if len(groups) > 1:
        lines += ["", f"| difference to {_cell(groups[0].name)} {head}"]
        lines += [f"| {_cell(g.name)} | {' | '.join(difference_cells(g, groups[0]))} |" for g in groups[1:]]
    return "\n".join(lines) + "\n"


def comma_separated(groups: Sequence[Group]) -> str:
    """One row a run: group, folder, the last logged values as they are in the log, and the settings that differ."""
    settings = differing_settings([run for group in groups for run in group.runs])
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["group", "folder", *COLUMNS, *settings])
    for group in groups:
        for run in group.runs:
            values = [run.final.get(column) for column in COLUMNS]
            writer.writerow([group.name, run.folder, *values, *(run.settings.get(key) for key in settings)])
    return out.getvalue()


def picture(groups: Sequence[Group], path: Path) -> None:
    """Draw the accuracy per group of classes, and per class where the runs wrote it, into a PNG file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    classes = [by_class_count(group) for group in groups]
    figure = Figure(figsize=(9, 3.4) if any(classes) else (4.5, 3.4), layout="constrained")
    axes = figure.subplots(1, 2 if any(classes) else 1, squeeze=False)[0]
    width = 0.8 / len(groups)
    for i, group in enumerate(groups):
        means, deviations = zip(*(mean_and_deviation(group.values(f"test/{name}")) for name in GROUPS), strict=True)
        places = [j + (i - (len(groups) - 1) / 2) * width for j in range(len(GROUPS))]
        error = [deviation or 0 for deviation in deviations] if len(group.runs) > 1 else None
        label = group.name + (f" ({len(group.runs)} runs)" if len(group.runs) > 1 else "")
        axes[0].bar(places, means, width, yerr=error, label=label, color=colour(i), error_kw={"linewidth": 1})
        if classes[i]:
            line = [100 * entry.accuracy for entry in classes[i]]
            axes[1].plot(range(len(line)), line, "-o" if len(line) <= 50 else ".", color=colour(i), markersize=4)
    axes[0].set_xticks(range(len(GROUPS)), GROUPS)
    axes[0].set_ylabel("test accuracy in %")
    if longest := max(classes, key=len):
        step = -(-len(longest) // 10)
        axes[1].set_xticks(range(0, len(longest), step), [entry.count for entry in longest[::step]])
        axes[1].set_xlabel("training samples of the class")
    for ax in axes:
        ax.set_ylim(0, 100)
        ax.grid(axis="y", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=min(len(groups), 3), frameon=False)
    figure.savefig(path, dpi=110)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
