"""The figures of what a method gives and takes: many against few, each class before and after, other test sets."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from imbsam.group_names import GROUP_COLOURS
from imbsam.report.classes import ClassAccuracy, by_class_count
from imbsam.report.comparison import Group
from imbsam.report.figures import LINE, PERCENT, Figure, class_text, make_trace, plain_text
from imbsam.report.runs import Run

GROUP_SYMBOLS = {"many": "circle", "medium": "square", "few": "triangle-up"}


def frontier(runs: Sequence[Run]) -> list[Run]:
    """The runs that no other one beats: none is as good on both many and few, and better on one.

    Returns:
        in rising order of "many", so in falling order of "few"; runs without one of the two are left out.
    """
    known = [run for run in runs if all(math.isfinite(value) for value in _many_and_few(run))]
    best = [
        run
        for run in known
        if not any(
            all(a >= b for a, b in zip(_many_and_few(other), _many_and_few(run), strict=True))
            and _many_and_few(other) != _many_and_few(run)
            for other in known
        )
    ]
    return sorted(best, key=_many_and_few)


def trade_figure(groups: Sequence[Group]) -> Figure | None:
    """The accuracy on many against that on few, a point for each run, with the frontier; None for fewer than two."""
    runs = [run for group in groups for run in group.runs]
    best = [_many_and_few(run) for run in frontier(runs)]
    if not best or len(runs) < 2:
        return None
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [many for many, _ in best],
            "y": [few for _, few in best],
            # down to the next point's "few", then right to its "many": what lies below is beaten
            "line": {"shape": "vh", "dash": "dot", "color": "#808080", "width": 1.5},
            "hoverinfo": "skip",
        }
    ]
    for i, group in enumerate(groups):
        if not group.runs:
            continue
        points = [_many_and_few(run) for run in group.runs]
        seeds = [f", seed {run.seeds[0]}" if run.seeds else "" for run in group.runs]
        names = [plain_text(f"{run.folder.name}{seed}") for run, seed in zip(group.runs, seeds, strict=True)]
        hover = f"{plain_text(group.name)}<br>%{{text}}<br>many %{{x:.1f}} %, few %{{y:.1f}} %<extra></extra>"
        many, few = zip(*points, strict=True)
        traces.append(make_trace(i, group, many, few, "markers", {"size": 10}, text=names, hovertemplate=hover))
    layout = {
        "xaxis": {"title": {"text": "test accuracy on many in %"}},
        "yaxis": {"title": {"text": "test accuracy on few in %"}},
    }
    return Figure("", traces, layout, height=400)


def before_and_after(groups: Sequence[Group]) -> list[Figure]:
    """The recall of each class of the first group against that of every other group, one figure for each of those.

    Args:
        groups: with the same classes; the first is the baseline.
    """
    first, before = groups[0], by_class_count(groups[0])
    figures = []
    for i, group in enumerate(groups[1:], 1):
        after = by_class_count(group)
        if not before or len(after) != len(before):
            continue
        traces = []
        for name, symbol in GROUP_SYMBOLS.items():
            pairs = [(a, b) for a, b in zip(before, after, strict=True) if a.group == name]
            if pairs:
                size = 9 if len(before) <= 100 else 5
                marker = {"size": size, "opacity": 0.75, "color": GROUP_COLOURS[name], "symbol": symbol}
                x, y = ([100 * entry.accuracy for entry in side] for side in zip(*pairs, strict=True))
                text = [class_text(entry) for entry, _ in pairs]
                hover = "%{text}<br>before %{x:.1f} %, after %{y:.1f} %<extra></extra>"
                traces.append(make_trace(i, group, x, y, "markers", marker, text=text, hovertemplate=hover))
        layout = {
            "xaxis": {"title": {"text": f"recall in %, {plain_text(first.name)}"}, "range": PERCENT},
            "yaxis": {"title": {"text": f"recall in %, {plain_text(group.name)}"}, "range": PERCENT},
            "shapes": [{**LINE, "x0": 0, "y0": 0, "x1": 100, "y1": 100}],
        }
        figures.append(Figure(_changes(group, before, after), traces, layout, option=group.name, height=440))
    return figures


def distribution_figure(groups: Sequence[Group]) -> Figure | None:
    """The accuracy over the class distributions of the test set, a thin line a run; None where no run logged it."""
    traces = []
    distributions = groups[0].task.distributions
    places = list(range(len(distributions)))
    for i, group in enumerate(groups):
        curves = [[100 * run.final.get(name, math.nan) for name in distributions] for run in group.runs]
        curves = [curve for curve in curves if curve and all(map(math.isfinite, curve))]
        for curve in curves if len(curves) > 1 else []:
            traces.append(make_trace(i, group, places, curve, width=1, opacity=0.35, hoverinfo="skip"))
        if curves:
            means = [statistics.fmean(values) for values in zip(*curves, strict=True)]
            hover = f"{plain_text(group.name)}<br>%{{text}}: %{{y:.1f}} %<extra></extra>"
            marker, text = {"size": 7}, list(distributions.values())
            traces.append(make_trace(i, group, places, means, "lines+markers", marker, text=text, hovertemplate=hover))
    if not traces:
        return None
    layout = {
        "xaxis": {
            "title": {"text": "test set, imbalance ratio"},
            "tickvals": places,
            "ticktext": list(distributions.values()),
        },
        "yaxis": {"title": {"text": "accuracy in %"}},
    }
    return Figure("", traces, layout, height=360)


def _many_and_few(run: Run) -> tuple[float, float]:
    return 100 * run.final.get("test/many", math.nan), 100 * run.final.get("test/few", math.nan)


def _changes(group: Group, before: Sequence[ClassAccuracy], after: Sequence[ClassAccuracy]) -> str:
    """How many classes are better and worse than before, in words."""
    changes = [b.accuracy - a.accuracy for a, b in zip(before, after, strict=True)]
    better, worse = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    return f"{group.name}: {better} of {len(changes)} classes better, {worse} worse"
