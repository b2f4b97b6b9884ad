"""The web page: one file, which needs no network."""

import base64
import gzip
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from imbsam.messages import first_few
from imbsam.report.classes import same_classes
from imbsam.report.comparison import (
    Group,
    columns,
    data_difference,
    difference,
    differing_settings,
    logged,
    mean_and_deviation,
    paired,
    without_other_data,
)
from imbsam.report.exports import difference_cells, notes, number, table_cells
from imbsam.report.figures import (
    Figure,
    calibration_figures,
    class_figure,
    confusion_figures,
    curve_figures,
    sharpness_figures,
)
from imbsam.report.html import as_json, count, plots, section, table
from imbsam.report.measure_figures import (
    before_and_after,
    distribution_figure,
    frontier,
    trade_figure,
)
from imbsam.report.style import SYMBOLS, colour, symbol
from imbsam.report.task import CLASSIFIER, DETECTOR


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
    compared = without_other_data(groups)
    seeds = "Thin lines are runs, thick ones their mean." if any(len(group.runs) > 1 for group in groups) else ""
    body = [
        f"<h1>{count(sum(len(group.runs) for group in groups), 'run')}, {escape(_names(groups))}</h1>",
        f"<p>{escape(summary(groups))}</p>",
        *(f'<p class="quiet">{escape(line)}</p>' for line in facts(groups)),
        _skipped(skipped),
        _legend(groups),
        "<main>",
        _results(groups),
        _measures(groups),
        _runs(groups),
        _trade(compared, figures),
        _classes(groups, figures),
        _before_and_after(compared, figures),
        _distributions(compared, figures),
        plots("Learning curves", seeds, curve_figures(groups), figures),
        _sharpness(groups, figures),
        _confusion(groups, figures),
        _calibration(groups, figures),
        _settings(groups),
        _cost(groups),
        "</main>",
    ]
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
            f'<script type="application/json" id="figures">{as_json(figures)}</script>',
            f'<script type="text/plain" id="plotly">{plotly}</script>',
            f"<script>\n{(here / 'page.js').read_text()}</script>\n</body>\n</html>\n",
        ]
    )


def summary(groups: Sequence[Group]) -> str:
    """The main results in two or three sentences."""
    first, sentences = groups[0], []
    for column, what in first.task.highlights.items():
        means = {g.name: statistics.fmean(g.values(column)) for g in groups if not data_difference(g, first)}
        known = {name: mean for name, mean in means.items() if math.isfinite(mean)}
        if not known:
            continue
        best = next(group for group in groups if known.get(group.name) == max(known.values()))
        highest = "is highest with" if len(set(known.values())) > 1 else "reaches"
        sentence = f"{what} {best.name} {highest} {number(*mean_and_deviation(best.values(column)), digits=1)} %"
        if len(known) > 1 and highest == "reaches":
            sentence += ", like the others"
        elif best is not first and first.name in known:
            sentence += f", {number(*difference(best, first, column), digits=1)} points above {first.name}"
        sentences.append(f"{sentence}.")
    if len(groups) > 1 and any(len(group.runs) == 1 for group in groups):
        sentences.append("A single run cannot tell a difference from chance.")
    return " ".join(sentences)


def facts(groups: Sequence[Group]) -> list[str]:
    """The baseline, its data, the groups of classes, and which groups have other data; a line each."""
    first, run = groups[0], groups[0].runs[0]
    lines = [f"Baseline: {first.name} ({run.method.name})."] if len(groups) > 1 else []
    settings = [f"{key} {_plain(value)}" for key, value in run.data.items() if key != "data set" and value != []]
    data = str(run.data.get("data set", "")) + (f" ({', '.join(settings)})" if settings else "")
    sizes = {"training samples": run.training_samples, "test samples": run.test_samples, "classes": len(run.classes)}
    parts = [data, *(f"{n:,} {what}" for what, n in sizes.items() if n)]
    lines.append(f"Data: {', '.join(filter(None, parts))}.")
    many, few = (run.settings.get(key) for key in ("many", "few"))
    if many is not None and few is not None and run.classes:
        ratio = run.settings.get("groups_of_ratio")
        at = "" if ratio is None else f" at ratio {_plain(ratio)}"
        lines.append(f"Class groups: many (more than {many} training samples{at}), medium, few (fewer than {few}).")
    return [*lines, *notes(groups)]


def _runs(groups: Sequence[Group]) -> str:
    rows = []
    for group in groups:
        run, runs = group.runs[0], group.runs
        dates = sorted({r.date for r in runs})
        eta = (
            "–"
            if group.task is DETECTOR
            else "named classes"
            if run.settings.get("sam.tail_classes")
            else _plain(run.method.eta)
        )
        seeds = _distinct(r.seeds[0] for r in runs if r.seeds)
        epochs = _distinct(max(epoch for epoch, _ in r.curves[group.task.loss]) for r in runs)
        date = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        folders = _distinct(r.folder.parent for r in runs)
        rows.append([group.name, run.method.name, _plain(run.method.rho), eta, seeds or "–", epochs, date, folders])
    head = ["run", "method", "rho", "eta", "seeds", "epochs", "date", "folder"]
    tail = "labelled anomalies" if groups[0].task is DETECTOR else "classes with fewer than eta training samples"
    return section("Runs", f"The tail: {tail}.", table(head, rows, "words"))


def _plain(value: Any) -> str:
    """A setting as a reader writes it."""
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _distinct(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values))


def _results(groups: Sequence[Group]) -> str:
    first, compared = groups[0], [group for group in groups[1:] if not data_difference(group, groups[0])]
    note = f"{first.task.title[0].upper()}{first.task.title[1:]} at the end of training"
    note += "; a group's accuracy is the mean over its classes." if first.task is CLASSIFIER else "."
    if any(len(group.runs) > 1 for group in groups):
        note += " Several runs: mean ± standard deviation."
    if compared:
        note += f" Below: difference to {first.name}"
        if any(min(len(group.runs), len(first.runs)) > 1 for group in compared):
            by_seed = all(paired(group, first) for group in compared)
            note += " ± its standard error" + (", compared seed by seed" if by_seed else "")
        note += "."
    return section("Results", note, _compared_table(groups, columns(groups)))


def _compared_table(groups: Sequence[Group], shown: Mapping[str, str]) -> str:
    """Logged quantities of every group, and below each its difference to the first group's."""
    first, rows = groups[0], []
    for group in groups:
        cells, name = table_cells(group, shown), f"{group.name}\n{count(len(group.runs), 'run')}"
        if group is not first and not data_difference(group, first):
            gaps = difference_cells(group, first, shown)
            cells = [f"{cell}\n{gap}" for cell, gap in zip(cells, gaps, strict=True)]
        elif len(groups) > 1:
            name += ", baseline" if group is first else ", other data"
        rows.append([name, *cells])
    return table(["run", *shown.values()], rows)


def _measures(groups: Sequence[Group]) -> str:
    shown = logged(groups, {**groups[0].task.measures, **groups[0].task.details})
    note = "In %. A recall of 0 makes both means 0; of the calibration error less is better."
    return section("Measures over all classes", note, _compared_table(groups, shown)) if shown else ""


def _trade(groups: Sequence[Group], figures: dict[str, Figure]) -> str:
    figure = trade_figure(groups)
    if figure is None:
        return ""
    best = {run.folder for run in frontier([run for group in groups for run in group.runs])}
    on_it = {group.name: sum(run.folder in best for run in group.runs) for group in groups}
    names = ", ".join(f"{name} ({n})" if n > 1 else name for name, n in on_it.items() if n)
    note = f"A point for each run. Dotted: the frontier, of the runs that none beats on both: {names}."
    return plots("Many against few", note, [figure], figures)


def _before_and_after(groups: Sequence[Group], figures: dict[str, Figure]) -> str:
    shown = before_and_after(same_classes(groups)[0])
    note = (
        f"A point for each class: its recall with {groups[0].name} and with another run. Above the diagonal it is "
        "better than before. ● many, ■ medium, ▲ few."
    )
    if any(len(group.runs) > 1 for group in groups):
        note += " Several runs are averaged rank by rank, as above."
    return plots("Recall of each class, before and after", note, shown, figures)


def _distributions(groups: Sequence[Group], figures: dict[str, Figure]) -> str:
    figure = distribution_figure(groups)
    if figure is None:
        return ""
    note = (
        "Accuracy on long-tailed test sets of these imbalance ratios: forward as in training, backward with the rarest "
        "class of the training the most frequent. Computed exactly from the classes' recalls, without resampling."
    )
    distributions = groups[0].task.distributions
    rows = [[group.name, *table_cells(group, distributions)] for group in groups if group.runs]
    below = table(["run", *distributions.values()], rows)
    return plots("Other test distributions", note, [figure], figures, below)


def _classes(groups: Sequence[Group], figures: dict[str, Figure]) -> str:
    if groups[0].task is not CLASSIFIER:
        return ""
    without = [run.folder for group in groups for run in group.runs if not run.classes]
    missing = f"Not shown, without per_class.csv: {first_few(without, 3)}." if without else ""
    groups, others = same_classes(groups)
    figure = class_figure(groups)
    if figure is None:
        return section("Accuracy per class", missing)
    note = "From the class with the most training samples to that with the fewest. Hover over a point for its name."
    if any(len(group.runs) > 1 for group in groups):
        note += " Several runs are averaged rank by rank in this order."
    if others:
        note += f" Not shown, since the classes differ: {', '.join(others)}."
    return plots("Accuracy per class", f"{note} {missing}", [figure], figures)


def _sharpness(groups: Sequence[Group], figures: dict[str, Figure]) -> str:
    note = "Measured by GroupSharpness or imbsam sharpness."
    measured = sharpness_figures(groups)
    if not measured or any(len(set(trace["x"])) > 1 for figure in measured for trace in figure.data):
        return plots("Sharpness", note, measured, figures)
    # measured once: a table of the groups' means is clearer than dots
    rows = []
    for figure in measured:
        by_group = {trace["meta"]: trace["y"][0] for trace in figure.data}  # the mean comes last
        values = [by_group.get(i) for i in range(len(groups))]
        rows.append([figure.title, *("–" if value is None else f"{value:.3g}" for value in values)])
    return section("Sharpness", note, table(["measure, classes", *(group.name for group in groups)], rows))


def _confusion(groups: Sequence[Group], figures: dict[str, Figure]) -> str:
    shown, left_out = confusion_figures(same_classes(groups)[0])
    note = "How the test samples of each tail class (training samples in brackets) were classified, in %."
    if left_out:
        note += f" The {left_out} tail classes with the fewest errors are not shown."
    return plots("Confusion among the tail classes", note, shown, figures)


def _calibration(groups: Sequence[Group], figures: dict[str, Figure]) -> str:
    shown = calibration_figures(groups)
    names, rows = [figure.title for figure in shown], []
    for group in groups:
        for suffix, prefix in (("", "test/ece"), (", calibrated", "test/calibrated_ece")):
            columns_of = [f"{prefix}_{name}" for name in names]
            if any(column in run.final for run in group.runs for column in columns_of):
                rows.append([f"{group.name}{suffix}", *table_cells(group, columns_of)])
    note = "Confidence is the probability of the predicted class; below the diagonal a model is overconfident."
    if any(run.calibrated for group in groups for run in group.runs):
        note += " Dashed and hollow: after calibration. Below each: test samples in the bin, on a logarithmic axis."
    else:
        note += " Below each: test samples in the bin, on a logarithmic axis."
    errors = "<h3>expected calibration error, in percentage points</h3>" + table(["run", *names], rows)
    return plots("Calibration", note, shown, figures, errors)


def _settings(groups: Sequence[Group]) -> str:
    runs = [group.runs[0] for group in groups]
    keys = differing_settings(runs)
    if not keys:
        return section("Settings that differ", "None." if len(groups) > 1 else "There is one group of settings.")
    rows = [[key, *(str(run.settings.get(key, "–")) for run in runs)] for key in keys]
    return section("Settings that differ", "", table(["setting", *(g.name for g in groups)], rows, "words"))


def _cost(groups: Sequence[Group]) -> str:
    rows = []
    for group in groups:
        seconds, tail = (
            [[value for _, value in run.curves[column]] for run in group.runs if column in run.curves]
            for column in ("train/seconds", "train/tail_rows")
        )
        cells = [
            _mean([statistics.median(values) for values in seconds], 2),
            _mean([sum(values) / 60 for values in seconds], 1),
            _mean([statistics.fmean(values) for values in tail], 1),
            *(_distinct(run.hardware.get(key, "–") for run in group.runs) for key in ("device", "processes")),
        ]
        rows.append([group.name, *cells])
    head = ["run", "seconds per epoch", "total minutes", "tail samples per step", "device", "processes"]
    note = "The median epoch with its validation; tail samples in a step's batch, where they were logged."
    return section("Cost", note, table(head, rows))


def _mean(values: Sequence[float], digits: int) -> str:
    return number(*mean_and_deviation(values), digits=digits) if values else "–"


def _legend(groups: Sequence[Group]) -> str:
    baseline = " (baseline)" if len(groups) > 1 else ""
    keys = [
        f'<label><input type="checkbox" checked value="{i}"><span class="key" style="color:{colour(i)}">'
        f"{SYMBOLS[symbol(i)]}</span>{escape(group.name)}{baseline if i == 0 else ''}</label>"
        for i, group in enumerate(groups)
    ]
    return f'<div class="groups">{"".join(keys)}</div>'


def _skipped(skipped: dict[Path, str]) -> str:
    if not skipped:
        return ""
    items = "".join(f"<li>{escape(str(folder))}: {escape(reason)}</li>" for folder, reason in skipped.items())
    return f"<details><summary>{count(len(skipped), 'folder')} skipped</summary><ul>{items}</ul></details>"


def _names(groups: Sequence[Group]) -> str:
    names = [group.name for group in groups]
    return ", ".join(names) if len(names) <= 3 else f"{count(len(names), 'group')} of settings"
