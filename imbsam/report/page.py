"""The web page: one file, which needs no network."""

import base64
import gzip
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from imbsam.group_names import GROUPS
from imbsam.report.classes import calibration, of_one_data_set
from imbsam.report.comparison import (
    Group,
    columns,
    difference,
    differing_settings,
    mean_and_deviation,
    other_data,
    paired,
)
from imbsam.report.exports import difference_cells, number, table_cells
from imbsam.report.figures import (
    Figure,
    calibration_figures,
    class_figure,
    confusion_figures,
    curve_figures,
    sharpness_figures,
)
from imbsam.report.style import MARKERS, colour, marker
from imbsam.report.task import CLASSIFIER


@dataclass
class Cell:
    """A cell of a table: its text, and a second, smaller line."""

    text: str
    below: str = ""


def page(groups: Sequence[Group], skipped: dict[Path, str]) -> str:
    """The HTML page that compares groups of runs.

    Args:
        groups: at least one, all of one task; the first is the baseline.
        skipped: folders that could not be reported, and why.

    Raises:
        ModuleNotFoundError: plotly is not installed.
    """
    from plotly.offline import get_plotlyjs

    figures: dict[str, Figure] = {}
    body = [
        f"<h1>{_count(sum(len(group.runs) for group in groups), 'run')}, {escape(_names(groups))}</h1>",
        f"<p>{escape(summary(groups))}</p>",
        *(f'<p class="quiet">{escape(line)}</p>' for line in facts(groups)),
        _skipped(skipped),
        _legend(groups),
        "<main>",
        _results(groups),
        _runs(groups),
        _classes(groups, figures),
        _plots("Learning curves", _seeds_note(groups), curve_figures(groups), figures),
        _sharpness(groups, figures),
        _confusion(groups, figures),
        _calibration(groups, figures),
        _settings(groups),
        _cost(groups),
        "</main>",
    ]
    drawn = {
        key: {"data": figure.data, "layout": figure.layout, "height": figure.height} for key, figure in figures.items()
    }
    here = files("imbsam.report")
    plotly = base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()  # a third of its size
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape(_names(groups))}</title>",
            f"<style>\n{(here / 'page.css').read_text()}</style>\n</head>\n<body>",
            *(part for part in body if part),
            "<noscript><p>The figures need JavaScript; the tables are complete.</p></noscript>",
            f'<script type="application/json" id="figures">{_json(drawn)}</script>',
            f'<script type="text/plain" id="plotly">{plotly}</script>',
            f"<script>\n{(here / 'page.js').read_text()}</script>\n</body>\n</html>\n",
        ]
    )


def summary(groups: Sequence[Group]) -> str:
    """What the table says, in two or three sentences."""
    first, highlights = groups[0], groups[0].task.highlights
    sentences = []
    for column, what in highlights.items():
        known = [g for g in groups if not other_data(g, first) and math.isfinite(statistics.fmean(g.values(column)))]
        if not known:
            continue
        best = max(known, key=lambda group: statistics.fmean(group.values(column)))
        value = number(*mean_and_deviation(best.values(column)), digits=1)
        sentence = f"{what} {best.name} {'is highest with' if len(known) > 1 else 'reaches'} {value} %"
        if best is not first and first in known:
            gap = number(*difference(best, first, column), digits=1)
            sentence += f", {gap} points above {first.name}"
        sentences.append(sentence + ".")
    if len(groups) == 1:
        return " ".join(sentences)
    if any(len(group.runs) == 1 for group in groups):
        sentences.append("One run alone does not tell a difference from chance.")
    return " ".join(sentences)


def facts(groups: Sequence[Group]) -> list[str]:
    """What the results are of: the baseline, its data, the groups of classes, and who has other data; a line each."""
    first, run = groups[0], groups[0].runs[0]
    lines = []
    if len(groups) > 1:
        lines.append(f"Baseline: {first.name} ({run.method.name}).")
    numbers = {"training": run.training_samples, "test": run.test_samples}
    sizes = [f"{n:,} {what} samples" for what, n in numbers.items() if n]
    if run.classes:
        sizes.append(f"{len(run.classes):,} classes")
    settings = ", ".join(
        f"{key} {_plain(value)}" for key, value in run.data.items() if key != "data set" and value != []
    )
    data = str(run.data.get("data set", "")) + (f" ({settings})" if settings else "")
    if data or sizes:
        lines.append(f"Data: {', '.join(part for part in (data, *sizes) if part)}.")
    many, few = (run.settings.get(key) for key in ("many", "few"))
    if many is not None and few is not None and run.classes:
        lines.append(f"Groups of classes: many (more than {many} training samples), medium, few (fewer than {few}).")
    lines += [
        f"{group.name} is of other data, so not compared: {reason}."
        for group in groups[1:]
        if (reason := other_data(group, first))
    ]
    return lines


def _runs(groups: Sequence[Group]) -> str:
    rows = []
    for group in groups:
        run, task = group.runs[0], group.task
        epochs = dict.fromkeys(str(max(epoch for epoch, _ in r.curves[task.loss])) for r in group.runs)
        seeds = dict.fromkeys(_plain(r.seeds[0]) for r in group.runs if r.seeds)
        dates = sorted({r.date for r in group.runs})
        folders = dict.fromkeys(str(r.folder.parent) for r in group.runs)
        named = run.settings.get("tail_classes") or run.settings.get("sam.tail_classes")
        eta = "named classes" if named else _plain(run.method.eta)
        cells = [run.method.name, _plain(run.method.rho), eta, ", ".join(seeds) or "–", ", ".join(epochs)]
        cells += [" to ".join(dict.fromkeys((dates[0], dates[-1]))), ", ".join(folders)]
        rows.append([Cell(group.name), *map(Cell, cells)])
    head = ["run", "method", "rho", "eta", "seeds", "epochs", "date", "folder"]
    return _section("Runs", "eta: classes with fewer training samples are the tail.", _table(head, rows, "words"))


def _plain(value: Any) -> str:
    """A setting as a reader writes it."""
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _results(groups: Sequence[Group]) -> str:
    first, shown = groups[0], columns(groups)
    compared = [group for group in groups[1:] if not other_data(group, first)]
    rows = []
    for group in groups:
        below = difference_cells(group, first, shown) if group in compared else [""] * len(shown)
        words = [_count(len(group.runs), "run"), *(["baseline"] if group is first and len(groups) > 1 else [])]
        words += [] if group is first or group in compared else ["other data"]
        rows.append([Cell(group.name, ", ".join(words)), *map(Cell, table_cells(group, shown), below)])
    note = f"{first.task.title[0].upper()}{first.task.title[1:]} at the end of the training"
    note += "; a group's accuracy is the mean of its classes'." if first.task is CLASSIFIER else "."
    if any(len(group.runs) > 1 for group in groups):
        note += " Several runs: mean ± standard deviation."
    if compared:
        note += f" Below, the difference to {first.name}"
        if any(min(len(group.runs), len(first.runs)) > 1 for group in compared):
            by_seed = all(paired(group, first) for group in compared)
            note += " ± its standard error" + (", compared seed by seed" if by_seed else "")
        note += "."
    return _section("Results", note, _table(["run", *shown.values()], rows))


def _classes(groups: Sequence[Group], figures: dict[str, Figure]) -> str:
    if groups[0].task is not CLASSIFIER:
        return ""
    groups, others = of_one_data_set(groups)
    figure = class_figure(groups)
    if figure is None:
        return _section("Accuracy per class", _missing(groups, "classes", "per_class.csv"))
    note = "From the class with the most training samples to that with the fewest. Touch a point for its class."
    if any(len(group.runs) > 1 for group in groups):
        note += " Several runs are averaged place by place in this order."
    if others:
        note += f" Of other classes, so not shown: {', '.join(others)}."
    missing = "" if others else _missing(groups, "classes", "per_class.csv")
    return _plots("Accuracy per class", f"{note} {missing}", [figure], figures)


def _sharpness(groups: Sequence[Group], figures: dict[str, Figure]) -> str:
    note = "By SharpnessOfGroups or imbsam sharpness."
    found = sharpness_figures(groups)
    if any(len(set(trace["x"])) > 1 for figure in found for trace in figure.data):
        return _plots("Sharpness", note, found, figures)
    if not found:
        return ""
    # measured once: a table of the groups' means says it better than dots
    rows = []
    for figure in found:
        of_group = {trace["meta"]: trace["y"][0] for trace in figure.data}  # the mean comes last
        values = [of_group.get(i) for i in range(len(groups))]
        rows.append([Cell(figure.title), *(Cell("–" if value is None else f"{value:.3g}") for value in values)])
    return _section("Sharpness", note, _table(["measure, classes", *(group.name for group in groups)], rows))


def _confusion(groups: Sequence[Group], figures: dict[str, Figure]) -> str:
    found, left_out = confusion_figures(of_one_data_set(groups)[0])
    if not found:
        return ""
    note = "What the test samples of each tail class (training samples in brackets) were taken for, in %."
    if left_out:
        note += f" The {left_out} tail classes with the fewest errors are not shown."
    return _plots("Confusion among the tail classes", note, found, figures)


def _calibration(groups: Sequence[Group], figures: dict[str, Figure]) -> str:
    found = calibration_figures(groups)
    if not found:
        return ""
    rows = []
    for group in groups:
        by_class_group = calibration(group)
        if by_class_group:
            errors = [by_class_group[name].errors if name in by_class_group else [] for name in GROUPS]
            rows.append([Cell(group.name), *(Cell(_mean([100 * error for error in of], 1)) for of in errors)])
    note = "Confidence is the probability of the predicted class; below the diagonal a model is surer than it is right."
    table = "<h3>expected calibration error, in percentage points</h3>" + _table(["run", *GROUPS], rows)
    return _plots("Calibration", note, found, figures, table)


def _settings(groups: Sequence[Group]) -> str:
    runs = [group.runs[0] for group in groups]
    keys = differing_settings(runs)
    if not keys:
        return _section("Settings that differ", "None." if len(groups) > 1 else "There is one group of settings.")
    rows = [
        [Cell(key), *(Cell(str(run.settings[key]) if key in run.settings else "–") for run in runs)] for key in keys
    ]
    return _section("Settings that differ", "", _table(["setting", *(g.name for g in groups)], rows, "words"))


def _cost(groups: Sequence[Group]) -> str:
    rows = []
    for group in groups:
        runs = [run for run in group.runs if "train/seconds" in run.curves]
        epochs = [statistics.median(value for _, value in run.curves["train/seconds"]) for run in runs]
        totals = [sum(value for _, value in run.curves["train/seconds"]) / 60 for run in runs]
        tail = [
            statistics.fmean(v for _, v in run.curves["train/tail_rows"]) for run in group.runs if _tail(run.curves)
        ]
        hardware = dict.fromkeys(f"{run.hardware.get('device', '–')}" for run in group.runs)
        processes = dict.fromkeys(str(run.hardware.get("processes", "–")) for run in group.runs)
        cells = [_mean(epochs, 2), _mean(totals, 1), _mean(tail, 1), ", ".join(hardware), ", ".join(processes)]
        rows.append([Cell(group.name), *map(Cell, cells)])
    head = ["run", "seconds an epoch", "minutes in all", "tail rows a step", "device", "processes"]
    note = "The median epoch with its validation; rows of tail classes in a step's batch, where it was logged."
    return _section("Cost", note, _table(head, rows))


def _tail(curves: dict[str, Any]) -> bool:
    return bool(curves.get("train/tail_rows"))


def _mean(values: Sequence[float], digits: int) -> str:
    return number(*mean_and_deviation(values), digits=digits) if values else "–"


def _plots(title: str, note: str, found: Sequence[Figure], figures: dict[str, Figure], table: str = "") -> str:
    """A section of figures; those with an option share one place, and a list chooses between them."""
    if not found:
        return ""
    places: list[str] = []
    options: list[str] = []
    for figure in found:
        key = f"figure{len(figures)}"
        figures[key] = figure
        heading = f"<h3>{escape(figure.title)}</h3>" if figure.title else ""
        hidden = " hidden" if figure.option and options else ""
        places.append(f'<div{hidden}>{heading}<div class="plot" id="{key}"></div></div>')
        if figure.option:
            options.append(f'<option value="{key}">{escape(figure.option)}</option>')
    choice = f'<p><select aria-label="run">{"".join(options)}</select></p>' if len(options) > 1 else ""
    return _section(title, note, f'{choice}<div class="figures">{"".join(places)}</div>{table}')


def _legend(groups: Sequence[Group]) -> str:
    baseline = " (baseline)" if len(groups) > 1 else ""
    keys = [
        f'<label><input type="checkbox" checked value="{i}"><span class="key" style="color:{colour(i)}">'
        f"{MARKERS[marker(i)]}</span>{escape(group.name)}{baseline if i == 0 else ''}</label>"
        for i, group in enumerate(groups)
    ]
    return f'<div class="groups">{"".join(keys)}</div>'


def _skipped(skipped: dict[Path, str]) -> str:
    if not skipped:
        return ""
    items = "".join(f"<li>{escape(str(folder))}: {escape(reason)}</li>" for folder, reason in skipped.items())
    return f"<details><summary>{_count(len(skipped), 'folder')} left out</summary><ul>{items}</ul></details>"


def _missing(groups: Sequence[Group], attribute: str, file: str) -> str:
    without = [run for group in groups for run in group.runs if not getattr(run, attribute)]
    if not without:
        return ""
    named = ", ".join(str(run.folder) for run in without[:3]) + (" and others" if len(without) > 3 else "")
    return f"Without {file}, so not shown: {named}."


def _seeds_note(groups: Sequence[Group]) -> str:
    return "Thin lines are runs, thick ones their mean." if any(len(group.runs) > 1 for group in groups) else ""


def _section(title: str, note: str, content: str = "") -> str:
    paragraph = f'<p class="quiet">{escape(note.strip())}</p>' if note.strip() else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{paragraph}{content}\n</section>"


def _table(head: Sequence[str], rows: Iterable[Sequence[Cell]], kind: str = "numbers") -> str:
    def cell(tag: str, content: Cell) -> str:
        below = f"<small>{escape(content.below)}</small>" if content.below else ""
        return f"<{tag}>{escape(content.text)}{below}</{tag}>"

    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = [f"<tr>{cell('th', row[0])}{''.join(cell('td', c) for c in row[1:])}</tr>" for row in rows]
    return (
        '<p class="swipe quiet" hidden>Wider than the screen: scroll it sideways →</p>'
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>\n{chr(10).join(body)}\n</tbody></table></div>"
    )


def _names(groups: Sequence[Group]) -> str:
    names = [group.name for group in groups]
    return ", ".join(names) if len(names) <= 3 else f"{_count(len(names), 'group')} of settings"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _json(value: Any) -> str:
    """JSON that ends no script element: HTML's marks as escapes, which mean the same in JSON."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
