"""The figures of the page, as plain dictionaries in plotly's format; the page adds the colours of light and dark."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from imbsam.group_names import GROUPS
from imbsam.messages import first_few
from imbsam.report.classes import (
    Bin,
    ClassAccuracy,
    TailConfusion,
    by_class_count,
    calibration_bins,
    tail_confusion,
)
from imbsam.report.comparison import Group
from imbsam.report.exports import NAMED, axis_labels
from imbsam.report.style import colour, dash, symbol
from imbsam.report.task import CLASSIFIER

Trace = dict[str, Any]

MANY_POINTS = 5000
"""A figure with more points is drawn by WebGL, which keeps a page with 8,000 classes fast."""

CALIBRATION_BINS = 15
"""Those of ``calibration.csv``."""

LINE = {"type": "line", "line": {"dash": "dot"}}
PERCENT = [-3, 103]
"""The range of an axis in percent, with room for the markers."""


@dataclass
class Figure:
    """One plotly figure.

    Attributes:
        title: its heading, plain text.
        data: plotly traces; ``meta`` is the group of runs that a trace belongs to.
        layout: plotly layout without colours.
        option: its entry in the list that chooses among figures in one place on the page.
        height: in CSS pixels.
    """

    title: str
    data: list[Trace]
    layout: dict[str, Any]
    option: str = ""
    height: int = 320


def class_figure(groups: Sequence[Group]) -> Figure | None:
    """The accuracy of every class, from the most to the fewest training samples; None where no run wrote it."""
    classes = [by_class_count(group) for group in groups]
    longest = max(classes, key=len)
    if not longest:
        return None
    few = len(longest) <= 60
    traces = []
    for i, (group, entries) in enumerate(zip(groups, classes, strict=True)):
        if entries:
            places, values = range(len(entries)), [100 * entry.accuracy for entry in entries]
            hover = f"%{{text}}<br>{plain_text(group.name)}: %{{y:.1f}} %<extra></extra>"
            names = [class_text(entry) for entry in entries]
            mode, marker = ("lines+markers", {"size": 8}) if few else ("markers", {"size": 5, "opacity": 0.6})
            traces.append(make_trace(i, group, places, values, mode, marker, text=names, hovertemplate=hover))
            if not few:
                half = max(len(entries) // 40, 1)
                means = [statistics.fmean(values[max(j - half, 0) : j + half + 1]) for j in range(len(entries))]
                traces.append(make_trace(i, group, places, means, hoverinfo="skip"))
    if len(longest) * len(groups) > MANY_POINTS:
        traces = [{**trace, "type": "scattergl"} for trace in traces]
    ticks = range(0, len(longest), 1 if len(longest) <= NAMED else -(-len(longest) // 10))
    labels, named = axis_labels([longest[t] for t in ticks])
    spans = [(name, [i for i, _ in members]) for name, members in groupby(enumerate(longest), lambda e: e[1].group)]
    layout = {
        "xaxis": {
            "title": {"text": "class (training samples)" if named else "training samples of the class"},
            "tickvals": list(ticks),
            "ticktext": [plain_text(label) for label in labels],
            **({"tickangle": -40} if named else {}),
            "range": [-0.5, len(longest) - 0.5],
        },
        "yaxis": {"title": {"text": "test accuracy in %"}, "range": PERCENT},
        "shapes": [
            {**LINE, "x0": i[-1] + 0.5, "x1": i[-1] + 0.5, "y0": 0, "y1": 1, "yref": "paper"} for _, i in spans[:-1]
        ],
        "annotations": [
            {"text": name, "x": (i[0] + i[-1]) / 2, "y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False}
            for name, i in spans
        ],
    }
    return Figure("", traces, layout, height=400)


def curve_figures(groups: Sequence[Group]) -> list[Figure]:
    """What was logged over the epochs: a thin line for each run, a thick one for the mean of a group."""
    figures = []
    task = groups[0].task
    losses = {task.loss: "training loss", "val/loss": "validation loss"}
    for column, title in {**losses, **task.curves}.items():
        factor = 1 if column in losses else 100
        traces = []
        for i, group in enumerate(groups):
            logged = [run.curves[column] for run in group.runs if column in run.curves]
            traces += _lines(i, group, [[(epoch, factor * value) for epoch, value in curve] for curve in logged])
        if traces:
            whole = task is CLASSIFIER and column not in losses  # ranking metrics differ in the last percent
            axis = {"range": PERCENT} if whole else _values(traces, log=column in losses)
            layout = {"xaxis": _epochs(traces), "yaxis": axis}
            figures.append(Figure(title, traces, layout))
    return figures


def sharpness_figures(groups: Sequence[Group]) -> list[Figure]:
    """Each sharpness measure over the epochs, one figure for each class group, split and set of settings."""
    wanted: dict[tuple[str, ...], list[Trace]] = defaultdict(list)
    for i, group in enumerate(groups):
        curves: dict[tuple[str, ...], dict[Path, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
        for run in group.runs:
            for row in run.sharpness:  # the last measurement of an epoch counts
                key: tuple[str, ...] = (row["measure"], row["group"], row.get("split", ""), row.get("settings", ""))
                curves[key][run.folder][row["epoch"]] = math.nan if row["value"] is None else row["value"]
        for key, by_run in curves.items():
            wanted[key] += _lines(i, group, [list(curve.items()) for curve in by_run.values()])
    several = len({key[2:] for key in wanted}) > 1
    return [
        Figure(
            ", ".join(filter(None, key if several else key[:2])),
            traces,
            {"xaxis": _epochs(traces), "yaxis": _values(traces)},
        )
        for key, traces in wanted.items()
    ]


def confusion_figures(groups: Sequence[Group]) -> tuple[list[Figure], int]:
    """A heat map of the tail's confusion for each group of runs; and how many tail classes are not shown."""
    shown = [(group, c) for group, c in zip(groups, tail_confusion(groups), strict=True) if c is not None]
    return [_confusion(*pair) for pair in shown], max((confusion.left_out for _, confusion in shown), default=0)


def calibration_figures(groups: Sequence[Group]) -> list[Figure]:
    """Confidence against accuracy before and after calibration, above the samples of each bin, for each class group."""
    calibrations = [(calibration_bins(group), calibration_bins(group, calibrated=True)) for group in groups]
    present = {name: None for pair in calibrations for bins in pair for name in bins}
    figures = []
    for name in sorted(present, key=lambda name: GROUPS.index(name) if name in GROUPS else -1):
        traces = []
        for i, (group, pair) in enumerate(zip(groups, calibrations, strict=True)):
            for calibrated, by_class_group in enumerate(pair):
                if bins := by_class_group.get(name):
                    traces += _reliability(i, group, bins, bool(calibrated))
        most = max(n for pair in calibrations for by_class_group in pair for _, n, *_ in by_class_group.get(name, []))
        samples = {"type": "log", "range": [math.log10(0.5), math.log10(2 * most)], "dtick": 1}
        layout = {
            "xaxis": {"title": {"text": "confidence in %"}, "range": PERCENT, "anchor": "y2"},
            "yaxis": {"title": {"text": "accuracy in %"}, "range": PERCENT, "domain": [0.34, 1]},
            "yaxis2": {"title": {"text": "samples"}, "domain": [0, 0.26], **samples},
            "shapes": [{**LINE, "x0": 0, "y0": 0, "x1": 100, "y1": 100}],
        }
        figures.append(Figure(name, traces, layout, height=420))
    return figures


def _reliability(i: int, group: Group, bins: Sequence[Bin], calibrated: bool) -> list[Trace]:
    """The accuracy in each bin, and its samples; dashed and hollow after calibration."""
    places, samples, confidence, accuracy = zip(*bins, strict=True)
    said = plain_text(group.name) + (", calibrated" if calibrated else "")
    style: dict[str, Any] = {"line": {"color": colour(i), "dash": "dash", "width": 2}} if calibrated else {}
    marker = {"symbol": f"{symbol(i)}-open"} if calibrated else {}
    numbers = "confidence %{x:.1f} %, accuracy %{y:.1f} %<br>%{text} test samples<extra></extra>"
    above = make_trace(
        i,
        group,
        [100 * c for c in confidence],
        [100 * a for a in accuracy],
        "lines+markers",
        {"size": [4 + 8 * math.sqrt(n / max(samples)) for n in samples], "line": {"width": 2 * calibrated}, **marker},
        text=list(map(str, samples)),
        hovertemplate=f"{said}<br>{numbers}",
        **style,
    )
    by_bin = dict(zip(places, samples, strict=True))
    below = make_trace(
        i,
        group,
        [100 * (b + 0.5) / CALIBRATION_BINS for b in range(CALIBRATION_BINS)],
        [by_bin.get(b, math.nan) for b in range(CALIBRATION_BINS)],
        "lines+markers",
        {"size": 5, **marker},
        yaxis="y2",
        hovertemplate=f"{said}<br>confidence about %{{x:.0f}} %: %{{y}} test samples<extra></extra>",
        **style,
    )
    return [above, below]


def class_text(entry: ClassAccuracy) -> str:
    """Name, training samples and group of a class, or of the classes of a rank, for plotly."""
    classes = "class" if len(entry.names) == 1 else "classes"
    return f"{classes} {plain_text(first_few(entry.names))}: {entry.count} training samples ({entry.group})"


def _lines(i: int, group: Group, curves: Sequence[Sequence[tuple[int, float]]]) -> list[Trace]:
    """A thin line for each of several runs, and a thick one for their mean, a point where there is one epoch."""
    traces = []
    for curve in curves if len(curves) > 1 else []:
        epochs, values = zip(*curve, strict=True)
        traces.append(make_trace(i, group, epochs, values, width=1, opacity=0.35, hoverinfo="skip"))
    by_epoch: dict[int, list[float]] = defaultdict(list)
    for curve in curves:
        for epoch, value in curve:
            by_epoch[epoch].append(value)
    if by_epoch:
        means = [statistics.fmean(by_epoch[epoch]) for epoch in sorted(by_epoch)]
        hover = f"{plain_text(group.name)}<br>epoch %{{x}}: %{{y:.4g}}<extra></extra>"
        mode = "lines" if len(by_epoch) > 1 else "markers"
        traces.append(make_trace(i, group, sorted(by_epoch), means, mode, hovertemplate=hover))
    return traces


def _epochs(traces: Sequence[Trace]) -> dict[str, Any]:
    last = max(max(trace["x"]) for trace in traces)
    return {"title": {"text": "epoch"}, **({"dtick": 1} if last <= 10 else {})}  # no half epochs


def _values(traces: Sequence[Trace], log: bool = False) -> dict[str, Any]:
    """The axis of the values: logarithmic where asked for and possible.

    Around a single value plotly would draw an axis from one below to one above: for zeros, from -1 to 1.
    """
    values = [y for trace in traces for y in trace["y"] if y is not None]
    low, high = min(values, default=0.0), max(values, default=0.0)
    if log and low > 0:
        return {"type": "log"} if low < high else {"type": "log", "range": [math.log10(low / 2), math.log10(2 * low)]}
    if low == high:
        return {"range": sorted([0, 2 * high]) if high else [0, 1]}
    return {}


def _confusion(group: Group, confusion: TailConfusion) -> Figure:
    columns = [plain_text(label) for label in confusion.labels] + ["other tail classes", "head classes"]
    keep = [j for j in range(len(columns)) if j != len(columns) - 2 or confusion.left_out]
    shares = [[100 * n / max(sum(row), 1) for n in row] for row in confusion.cells]
    small = len(columns) <= 12
    trace: Trace = {
        "type": "heatmap",
        "x": [columns[j] for j in keep],
        "y": columns[: len(confusion.labels)],
        "z": [[round(row[j], 2) for j in keep] for row in shares],
        "customdata": [[row[j] for j in keep] for row in confusion.cells],
        "zmin": 0,
        "zmax": 100,
        "hovertemplate": "%{y} predicted as %{x}: %{z:.1f} % (%{customdata})<extra></extra>",
        "colorbar": {"title": {"text": "%"}, "thickness": 10},
        **({"texttemplate": "%{z:.0f}"} if small else {}),
    }
    layout = {
        "xaxis": {"title": {"text": "predicted"}, "tickangle": -45, "type": "category"},
        "yaxis": {"autorange": "reversed", "type": "category"},
    }
    height = 200 + 26 * len(confusion.labels)
    return Figure("", [trace], layout, option=group.name, height=height)


def make_trace(
    i: int,
    group: Group,
    x: Iterable[float],
    y: Iterable[float],
    mode: str = "lines",
    marker: Mapping[str, Any] | None = None,
    width: int = 2,
    **more: Any,
) -> Trace:
    """A plotly trace of the i-th group of runs, in its colour, dashes and symbol, which `marker` and `more` add to."""
    return {
        "type": "scatter",
        "name": plain_text(group.name),
        "meta": i,
        "x": list(x),
        "y": [_number(value) for value in y],
        "mode": mode,
        "line": {"color": colour(i), "dash": dash(i), "width": width},
        "marker": {"color": colour(i), "symbol": symbol(i), **(marker or {})},
        **more,
    }


def _number(value: float) -> float | None:
    """Five digits are enough for a screen and keep the page small; what is not finite is a gap."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def plain_text(text: str) -> str:
    """Plotly reads some HTML in its texts."""
    return escape(text, quote=False).replace("%{", "%&#123;")
