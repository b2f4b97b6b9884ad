"""Measures over all classes, many against few, before and after, other test distributions: table and figures."""

import csv
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from imbsam.group_names import TEST_DISTRIBUTIONS
from imbsam.report.command import main
from imbsam.report.comparison import baseline_first, group_runs, without_other_data
from imbsam.report.measure_figures import before_and_after, distribution_figure, frontier, trade_figure
from imbsam.report.page import page
from imbsam.report.runs import read_runs
from tests.imbsam.report.test_page import Tables, visible


@pytest.fixture(scope="module")
def groups(three_groups):
    return baseline_first(group_runs(read_runs([three_groups])[0]))


@pytest.fixture(scope="module")
def logs(groups):
    """The log of every run as the CSV module reads it."""
    return {
        run.folder: {
            k: float(v) for row in csv.DictReader((run.folder / "metrics.csv").open()) for k, v in row.items() if v
        }
        for group in groups
        for run in group.runs
    }


def run_of(many, few):
    return SimpleNamespace(final={"test/many": many, "test/few": few})


def test_the_frontier_has_the_runs_that_none_beats_on_both():
    points = [(0.9, 0.1), (0.8, 0.3), (0.8, 0.2), (0.7, 0.3), (0.5, 0.6), (0.5, 0.6), (0.99, math.nan), (0.4, 0.5)]
    runs = [run_of(*point) for point in points]
    assert [runs.index(run) for run in frontier(runs)] == [4, 4, 1, 0]  # two equal ones stay; `index` finds the first
    assert frontier([run_of(math.nan, 1.0)]) == []


def test_many_against_few_has_a_point_for_every_run(groups, logs):
    line, *traces = trade_figure(groups).data
    assert [trace["meta"] for trace in traces] == [0, 1, 2]
    for group, trace in zip(groups, traces, strict=True):
        for axis, name in (("x", "many"), ("y", "few")):
            wanted = [100 * logs[run.folder][f"test/{name}"] for run in group.runs]
            assert trace[axis] == pytest.approx(wanted, abs=1e-2)
    assert line["x"] == sorted(line["x"])
    assert line["y"] == sorted(line["y"], reverse=True)
    assert trade_figure(groups[:1]) is not None
    assert trade_figure([SimpleNamespace(runs=groups[0].runs[:1])]) is None


def test_before_and_after_are_the_classes_recalls(groups):
    figures = before_and_after(groups)
    assert [figure.option for figure in figures] == [group.name for group in groups[1:]]
    for figure, group in zip(figures, groups[1:], strict=True):
        points = {}
        for trace in figure.data:
            points |= {text: pair for text, *pair in zip(trace["text"], trace["x"], trace["y"], strict=True)}
        for row in groups[0].runs[0].classes:
            means = [
                100 * sum(r["accuracy"] for run in side.runs for r in run.classes if r["class"] == row["class"]) / 2
                for side in (groups[0], group)
            ]
            (text,) = [t for t in points if f": {row['training_samples']} training" in t]
            assert points[text] == pytest.approx(means, abs=1e-2)
        better = sum(y > x for x, y in points.values())
        assert f"{better} of 6 classes better" in figure.title


def test_accuracies_on_other_distributions_are_the_logs(groups, logs):
    figure = distribution_figure(groups)
    for i, group in enumerate(groups):
        *thin, mean = [trace for trace in figure.data if trace["meta"] == i]
        names = [*TEST_DISTRIBUTIONS[:5], "all", *TEST_DISTRIBUTIONS[5:]]
        runs = [[100 * logs[run.folder][f"test/{name}"] for name in names] for run in group.runs]
        for trace, values in zip(thin, runs, strict=True):
            assert trace["y"] == pytest.approx(values, abs=1e-2)
        assert mean["y"] == pytest.approx([sum(pair) / 2 for pair in zip(*runs, strict=True)], abs=1e-2)


def test_the_page_has_the_measures_with_their_differences(groups, logs):
    tables = Tables(page(groups, {})).tables
    table = next(table for table in tables if "lowest recall" in table[0])
    heads = ["lowest recall", "harmonic mean recall", "geometric mean recall", "macro-F1"]
    assert table[0] == ["run", *heads, "top-5 accuracy", "calibration error"]
    names = [
        f"test/{name}"
        for name in ("lowest_recall", "harmonic_mean", "geometric_mean", "macro_f1", "top5_all", "ece_all")
    ]
    means = [[sum(100 * logs[run.folder][name] for run in group.runs) / 2 for name in names] for group in groups]
    for row, values, group in zip(table[1:], means, groups, strict=True):
        assert row[0].startswith(f"{group.name}\n")
        assert [float(cell.split(" ±")[0]) for cell in row[1:]] == pytest.approx(values, abs=0.051)
    gaps = [float(cell.split("\n")[1].split(" ±")[0]) for cell in table[2][1:]]
    assert gaps == pytest.approx([b - a for a, b in zip(means[0], means[1], strict=True)], abs=0.051)
    spread = next(table for table in tables if "balanced" in table[0])
    assert spread[0] == ["run", *(n.replace("_", " ") for n in TEST_DISTRIBUTIONS[:5]), "balanced", *spread[0][7:]]
    assert len(spread) == 4


def test_runs_of_other_data_are_in_none_of_the_figures_and_colours_stay(tmp_path, write_run):
    write_run(tmp_path, "d/plain")
    write_run(tmp_path, "d/other", method="imbsam", data={"ratio": 10.0})
    write_run(tmp_path, "d/same", method="imbsam", skill=0.5)
    groups = without_other_data(baseline_first(group_runs(read_runs([tmp_path])[0])))
    assert [group.name for group in groups] == ["d/plain", "d/other", "d/same"]
    _, *points = trade_figure(groups).data
    assert [trace["meta"] for trace in points] == [0, 2]
    assert [trace["meta"] for trace in distribution_figure(groups).data] == [0, 2]
    assert [figure.option for figure in before_and_after(groups)] == ["d/same"]
    text = visible(page(baseline_first(group_runs(read_runs([tmp_path])[0])), {}))
    assert "Many against few" in text


def test_without_the_measures_the_page_has_no_such_sections(tmp_path, write_run):
    """Runs of before they were logged."""
    for name in ("plain", "imbsam"):
        run = write_run(tmp_path, f"d/{name}", method=name.replace("plain", "sgd"))
        rows = list(csv.DictReader((run / "metrics.csv").open()))
        kept = [name for name in rows[0] if name in ("epoch", "step", "train/loss_epoch")]
        kept += [f"test/{group}" for group in ("many", "medium", "few", "all")]
        with (run / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, kept, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    text = visible(page(group_runs(read_runs([tmp_path])[0]), {}))
    assert "Many against few" in text
    assert "Measures over all classes" not in text
    assert "Other test distributions" not in text


def test_groups_of_another_ratio_are_named(tmp_path, write_run):
    run = write_run(tmp_path, "d/plain", groups_of_ratio=100.0)
    text = visible(page(group_runs(read_runs([run])[0]), {}))
    assert "many (more than 50 training samples at ratio 100), medium, few (fewer than 10)" in text


@pytest.mark.parametrize("columns", [80, 120])
def test_the_terminal_shows_the_measures_within_its_width(three_groups, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    main([str(three_groups)])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    assert "all classes, in %" in out
    assert all(word in out for word in ("lowest", "harmonic", "geometric", "macro-F1"))
    assert "…" not in out
    assert not re.search(r"± *$|±  ", out.split("all classes, in %")[1], re.MULTILINE)  # no number is folded


def test_the_csv_has_every_measure(three_groups, tmp_path, logs):
    main([str(three_groups), "--output", str(tmp_path / "table.csv")])
    for row in csv.DictReader((tmp_path / "table.csv").open()):
        for name in ("test/lowest_recall", "test/macro_f1", "test/top5_all", "test/forward_50", "test/backward_2"):
            assert float(row[name]) == logs[Path(row["folder"])][name]
