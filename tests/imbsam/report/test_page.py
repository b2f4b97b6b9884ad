"""The page, the exports and the command, without a browser."""

import csv
import datetime
import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import plotly.graph_objects as go
import pytest

from imbsam.report.classes import by_class_count, calibration_bins, tail_confusion
from imbsam.report.command import main
from imbsam.report.comparison import baseline_first, group_runs
from imbsam.report.figures import class_figure, curve_figures, sharpness_figures
from imbsam.report.page import page
from imbsam.report.runs import read_runs
from imbsam.report.style import COLOURS

REPOSITORY = Path(__file__).resolve().parents[3]


class Tables(HTMLParser):
    """The cells of every table, the names of all elements, and where they lead."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.elements: list[str] = []
        self.links: list[str] = []
        self.open = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        self.open = tag in ("td", "th") or (tag == "small" and self.open)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "small":
            self.tables[-1][-1][-1] += "\n"

    def handle_endtag(self, tag):
        self.open = self.open and tag not in ("td", "th")

    def handle_data(self, data):
        if self.open:
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def groups(three_groups):
    return group_runs(read_runs([three_groups / "digits/sgd", three_groups])[0])


@pytest.fixture(scope="module")
def html(groups):
    return page(groups, {Path("<b>half"): "cut off"})


def figures(html):
    return json.loads(re.search(r'id="figures">(.*?)</script>', html).group(1))


def test_the_tables_numbers_are_the_logs(html, groups, three_groups):
    def logged(method, column):
        values = []
        for run in sorted((three_groups / "digits" / method).glob("version_*")):
            rows = list(csv.DictReader((run / "metrics.csv").open()))
            values.append(100 * float(next(row[column] for row in rows if row[column])))
        return values

    table = Tables(html).tables[0]
    assert table[0] == ["run", "many", "medium", "few", "all", "training loss"]
    sgd, imbsam = (next(row for row in table if row[0].startswith(f"digits/{m}\n")) for m in ("sgd", "imbsam"))
    for column, name in enumerate(("many", "medium", "few", "all"), start=1):
        first, other = logged("sgd", f"test/{name}"), logged("imbsam", f"test/{name}")
        spread = abs(first[0] - first[1]) / 2**0.5
        assert sgd[column] == f"{sum(first) / 2:.1f} ± {spread:.1f}"
        gaps = [b - a for a, b in zip(first, other, strict=True)]
        assert imbsam[column].split("\n")[1] == f"{sum(gaps) / 2:+.1f} ± {abs(gaps[0] - gaps[1]) / 2:.1f}"


def test_nothing_of_a_run_becomes_html_and_nothing_is_fetched(html):
    elements = Tables(html).elements
    assert {"img", "b", "i"}.isdisjoint(elements)
    assert elements.count("script") == 3
    assert html.count("</script>") == 3
    assert all(link.startswith("data:") for link in Tables(html).links)
    text = re.sub(r'<script type="text/plain".*?</script>', "", html, flags=re.DOTALL)
    assert not re.findall(r"url\(|https?://", text)
    for figure in figures(html).values():
        for trace in figure["data"]:
            assert "<img" not in json.dumps(trace)
            assert "<b>" not in json.dumps(trace)


def test_plotly_accepts_every_figure(html):
    found = figures(html)
    # many against few, classes, before and after, distributions, loss, sharpness of two groups, confusion, calibration
    assert len(found) == 1 + 1 + 2 + 1 + 1 + 2 + 3 + 4
    for figure in found.values():
        go.Figure(data=figure["data"], layout=figure["layout"])


def test_classes_are_sorted_by_count_and_say_their_name_and_count(html, groups):
    trace = next(t for f in figures(html).values() for t in f["data"] if "class cat" in str(t.get("text")))
    counts = [int(re.search(r"(\d+) training", text).group(1)) for text in trace["text"]]
    assert counts == [120, 60, 20, 12, 6, 3]
    assert trace["text"][0] == "class cat: 120 training samples (many)"
    assert trace["text"][2].startswith("class &lt;img")
    entries = by_class_count(groups[0])
    few = [entry.accuracy for entry in entries if entry.group == "few"]
    mean = sum(run.final["test/few"] for run in groups[0].runs) / len(groups[0].runs)
    assert sum(few) / len(few) == pytest.approx(mean, abs=1e-5)


def test_confusion_counts_every_test_sample_of_a_tail_class(groups):
    first = tail_confusion(groups)[0]
    assert [label.rpartition(" ")[2] for label in first.labels] == ["(12)", "(6)", "(3)"]  # eta is 20
    assert [sum(row) for row in first.cells] == [40, 40, 40]  # 20 test samples, two runs
    assert first.cells[0][2] == 0  # wrong predictions are the next class
    assert first.cells[2][-1] == 40 - first.cells[2][2]  # after the last class comes the first, a head class
    most = tail_confusion(groups, most=2)[0]
    assert (len(most.labels), most.left_out) == (2, 1)
    assert [sum(row) for row in most.cells] == [40, 40]


def test_the_calibration_error_is_that_of_the_log_and_of_the_bins(html, groups):
    bins = calibration_bins(groups[0])
    assert set(bins) == {"many", "medium", "few", "all"}
    assert sum(n for _, n, _, _ in bins["all"]) == 240
    table = next(table for table in Tables(html).tables if table[0] == ["run", "many", "medium", "few", "all"])
    found = [(group.name, [run.calibration for run in group.runs]) for group in groups]
    after = next(i for i, group in enumerate(groups) if group.runs[0].calibrated)
    found.insert(after + 1, (f"{groups[after].name}, calibrated", [run.calibrated for run in groups[after].runs]))
    for (name, runs), row in zip(found, table[1:], strict=True):
        errors = [
            sum(r["samples"] * abs(r["accuracy"] - r["confidence"]) for r in rows if r["group"] == "few") / 40
            for rows in runs
        ]
        assert row[0] == name
        assert row[3].split(" ± ")[0] == f"{100 * sum(errors) / 2:.1f}"


def test_reliability_before_and_after_with_the_samples_of_every_bin(html, groups):
    few = next(f for f in figures(html).values() if f["title"] == "few" and "yaxis2" in f["layout"])
    after = next(i for i, group in enumerate(groups) if group.runs[0].calibrated)
    kinds = [(t["meta"], t.get("yaxis", "y"), t["line"]["dash"]) for t in few["data"]]
    assert sorted(kinds) == sorted(
        [(i, y, "solid") for i in range(3) for y in ("y", "y2")] + [(after, y, "dash") for y in ("y", "y2")]
    )
    assert [sum(n or 0 for n in t["y"]) for t in few["data"] if t.get("yaxis") == "y2"] == [2 * 2 * 20] * 4
    rows = [row for run in groups[after].runs for row in run.calibrated if row["group"] == "few"]
    dashed = next(t for t in few["data"] if t["line"]["dash"] == "dash" and "yaxis" not in t)
    weighted = sum(int(n) * y for n, y in zip(dashed["text"], dashed["y"], strict=True))
    assert weighted == pytest.approx(100 * sum(row["samples"] * row["accuracy"] for row in rows), rel=1e-3)


def test_one_run_and_runs_without_files(tmp_path, write_run):
    run = write_run(tmp_path, "a/sgd", files=False)
    html = page(group_runs(read_runs([run])[0]), {})
    assert "Not shown, without per_class.csv: " in html
    assert len(figures(html)) == 1
    assert "± " not in re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)


@pytest.mark.parametrize("kind", ["html", "md", "csv", "png"])
def test_without_few_shot_classes_their_accuracy_is_nan(tmp_path, write_run, kind):
    """CIFAR-100-LT at ratio 10: the smallest class has 50 samples."""
    for name in ("sgd", "imbsam"):
        for seed in (0, 1):
            write_run(tmp_path, f"data/{name}", seed=seed, counts=[120, 110, 90, 70, 60, 55])
    main([str(tmp_path), "--output", str(tmp_path / f"report.{kind}")])
    assert (tmp_path / f"report.{kind}").stat().st_size > 0


def test_runs_of_other_classes_stay_out_of_the_figures_of_classes(tmp_path, write_run):
    write_run(tmp_path, "data/first")
    write_run(tmp_path, "data/other", names=["car", "bus", "van", "bike", "tram", "ship"])
    groups = group_runs(read_runs([tmp_path])[0])
    text = page(groups, {})
    assert "Not shown, since the classes differ: data/other." in text
    assert "car (" not in text
    assert "ship (" not in text


def test_sharpness_of_other_splits_and_settings_is_drawn_apart(tmp_path, write_run):
    run = write_run(tmp_path, "data/first")
    rows = ["1,train,few,loss,1.0,rho=0.05", "1,test,few,loss,3.0,rho=0.05", "1,train,few,loss,11.0,rho=0.5"]
    rows.append("1,train,few,loss,2.0,rho=0.05")  # measured again: the last one counts
    (run / "sharpness.csv").write_text("\n".join(["epoch,split,group,measure,value,settings", *rows]) + "\n")
    found = sharpness_figures(group_runs(read_runs([run])[0]))
    assert {figure.title: list(figure.data[-1]["y"]) for figure in found} == {
        "loss, few, train, rho=0.05": [2.0],
        "loss, few, test, rho=0.05": [3.0],
        "loss, few, train, rho=0.5": [11.0],
    }
    text = page(group_runs(read_runs([run])[0]), {})  # measured at one epoch: a table, not dots
    assert ["loss, few, test, rho=0.05", "3"] in [row for table in Tables(text).tables for row in table]


def test_exports(three_groups, tmp_path, capsys):
    main([str(three_groups), "--format", "md"])
    table = capsys.readouterr().out
    assert "| run | many | medium | few | all | training loss |" in table
    assert "| digits/sgd (2 runs) |" in table
    main([str(three_groups), "--output", str(tmp_path / "t.csv")])
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert len(rows) == 6
    for row in rows:
        logged = list(csv.DictReader((Path(row["folder"]) / "metrics.csv").open()))
        assert float(row["test/few"]) == float(next(r["test/few"] for r in logged if r["test/few"]))
    main([str(three_groups), "--output", str(tmp_path / "t.png")])
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["nowhere"], "no run to report"),
        (["RUNS", "--output", "report.pdf"], "output is report.pdf: end it with .html, .md, .csv or .png"),
        (["RUNS", "--format", "html"], "format is html: name the file with --output report.html"),
        (["RUNS", "--output", "no/such/folder.md"], "output is no/such/folder.md: No such file or directory"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(three_groups, capsys, monkeypatch, tmp_path, args, line):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([str(three_groups) if arg == "RUNS" else arg for arg in args])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"imbsam: error: {line}")


def test_a_missing_library_is_named(three_groups, tmp_path, capsys, monkeypatch):
    for library, form in (("plotly.offline", "html"), ("matplotlib.figure", "png")):
        monkeypatch.setitem(sys.modules, library.partition(".")[0], None)
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(SystemExit):
            main([str(three_groups), "--output", str(tmp_path / f"r.{form}")])
        name = library.partition(".")[0]
        assert f"{form} needs {name}: pip install {name}\n" in capsys.readouterr().err


def test_on_a_narrow_terminal_no_name_is_cut(three_groups, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    main([str(three_groups)])
    out = capsys.readouterr().out
    names = "".join(line.strip().split("  ")[0] for line in out.splitlines()).replace(" ", "")
    assert "digits/sgd(2runs)" in names
    assert "digits/imbsam(2runs)" in names
    assert max(map(len, out.splitlines())) <= 60
    assert "…" not in out


def test_a_tie_has_no_winner(tmp_path, write_run):
    for name, method in (("plain", "sgd"), ("imbsam", "imbsam")):
        write_run(tmp_path, f"d/{name}", method=method)
    text = visible(page(baseline_first(group_runs(read_runs([tmp_path])[0])), {}))
    assert re.search(r"On the few-shot classes d/plain reaches \d+\.\d %, like the others\.", text)


def test_fifty_runs_of_200_epochs_in_under_10_seconds(tmp_path, write_run):
    """The command as a user starts it, and that it does not import torch or Lightning."""
    first = write_run(
        tmp_path, "many/sgd", epochs=200, counts=list(range(100, 0, -1)), names=[f"c{i}" for i in range(100)]
    )
    for i in range(1, 50):
        run = first.with_name(f"version_{i}")
        run.mkdir()
        for file in first.iterdir():
            (run / file.name).write_bytes(file.read_bytes())
        config = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(config.replace("seed: 0", f"seed: {i}").replace("50.0", f"{i % 10}.0"))
    code = (
        "import resource, sys; from imbsam.command import main; main();"
        "assert not {'torch', 'lightning'} & set(sys.modules);"
        "usage = resource.getrusage(resource.RUSAGE_SELF); print(usage.ru_utime + usage.ru_stime)"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, "report", str(tmp_path), "--output", str(tmp_path / "r.html")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "50 runs" in (tmp_path / "r.html").read_text()
    processor_seconds = float(done.stdout.splitlines()[-1])
    assert processor_seconds < 10, (
        f"{time.monotonic() - start:.1f} s on the clock"
    )  # the clock depends on who shares the machine


def test_colours_stand_out_on_the_light_and_the_dark_page():
    """WCAG 2.2, contrast of graphics: 3."""

    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    css = (REPOSITORY / "imbsam/report/page.css").read_text()
    for background in re.findall(r"--page: (#\w+)", css):
        for colour in COLOURS:
            dark, light = sorted((luminance(colour), luminance(background)))
            assert (light + 0.05) / (dark + 0.05) >= 3, (colour, background)


def visible(html):
    """The page's text without scripts and styles, on one line."""
    text = re.sub(r"<(script|style).*?</\1>", "", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", text).split())


def test_it_says_what_was_compared_on_which_data(tmp_path, write_run):
    for name, method in (("imbsam", "imbsam"), ("sgd", "sgd")):
        for seed in (0, 1):
            write_run(tmp_path, f"digits/{name}", seed, method=method, rho=0.07, eta=30)
    html = page(baseline_first(group_runs(read_runs([tmp_path])[0])), {})
    text = visible(html)
    assert "Baseline: digits/sgd (plain training)." in text
    assert "Data: DigitsLTDataModule (ratio 50), 221 training samples, 120 test samples, 6 classes." in text
    assert "many (more than 50 training samples), medium, few (fewer than 10)" in text
    tables = Tables(html).tables
    assert tables[0][1][0] == "digits/sgd\n2 runs, baseline"
    runs = next(table for table in tables if "rho" in table[0])
    assert runs[0] == ["run", "method", "rho", "eta", "seeds", "epochs", "date", "folder"]
    today = datetime.date.today().isoformat()
    folder = str(tmp_path / "digits/imbsam")
    assert runs[2] == ["digits/imbsam", "ImbSAM", "0.07", "30", "0, 1", "3", today, folder]
    assert runs[1][1:4] == ["plain training", "–", "–"]


def test_classes_are_named_on_the_axis_and_epochs_count_from_1(html, groups):
    drawn = list(figures(html).values())
    axis = drawn[1]["layout"]["xaxis"]
    assert axis["ticktext"][0] == "cat (120)"
    assert len(axis["ticktext"]) == 6
    assert drawn[5]["data"][0]["x"] == [1, 2, 3]


def test_a_long_name_is_cut_on_the_axis(tmp_path, write_run):
    run = write_run(tmp_path, "d/a", counts=[100, 3], names=["Tyrannosaurus_rex_northern", "short name"])
    figure = class_figure(group_runs(read_runs([run])[0]))
    assert figure.layout["xaxis"]["ticktext"] == ["Tyrannosaurus_rex_n… (100)", "short name (3)"]


def test_where_the_seed_deals_the_counts_a_place_has_no_single_name(tmp_path, write_run):
    write_run(tmp_path, "d/a", 0, counts=[100, 50, 3], names=["x", "y", "z"])
    write_run(tmp_path, "d/a", 1, counts=[3, 50, 100], names=["x", "y", "z"])
    figure = class_figure(group_runs(read_runs([tmp_path])[0]))
    assert figure.layout["xaxis"]["ticktext"] == ["100", "50", "3"]


@pytest.mark.parametrize(("value", "expected"), [(0.0, [0, 1]), (0.003, [0, 0.006]), (-2.0, [-4, 0])])
def test_a_constant_is_not_drawn_on_an_axis_of_its_own(tmp_path, write_run, value, expected):
    """Of zeros alone plotly draws a chart from -1 to 1."""
    run = write_run(tmp_path, "d/a")
    rows = [f"{epoch},train,few,trace,{value}," for epoch in (1, 2)]
    (run / "sharpness.csv").write_text("\n".join(["epoch,split,group,measure,value,settings", *rows]) + "\n")
    (figure,) = sharpness_figures(group_runs(read_runs([run])[0]))
    assert figure.layout["yaxis"]["range"] == pytest.approx(expected)
    log = (run / "metrics.csv").read_text().splitlines()
    at = log[0].split(",").index("train/loss_epoch")
    zeros = [
        ",".join("0.0" if i == at and cell else cell for i, cell in enumerate(line.split(","))) for line in log[1:]
    ]
    (run / "metrics.csv").write_text("\n".join([log[0], *zeros]) + "\n")
    (loss,) = curve_figures(group_runs(read_runs([run])[0]))
    assert loss.layout["yaxis"] == {"range": [0, 1]}


def test_runs_of_other_data_are_marked_and_not_compared(tmp_path, write_run, capsys):
    write_run(tmp_path, "d/plain")
    write_run(tmp_path, "d/other", method="imbsam", data={"ratio": 10.0})
    write_run(tmp_path, "d/same", method="imbsam")
    reason = "ratio 10.0, not 50.0"
    main([str(tmp_path), "--format", "md"])
    out, err = capsys.readouterr()
    assert f"d/other has other data than d/plain, so it is not compared: {reason}." in out
    assert err == ""
    main([str(tmp_path), "--format", "csv"])
    assert f"d/other has other data than d/plain, so it is not compared: {reason}." in capsys.readouterr().err
    differences = out.split("difference to d/plain")[1].split("\n\n")[0]
    assert "| d/same |" in differences
    assert "| d/other |" not in differences
    html = page(baseline_first(group_runs(read_runs([tmp_path])[0])), {})
    rows = {row[0].split("\n")[0]: row for row in Tables(html).tables[0]}
    assert rows["d/other"][0].endswith("1 run, other data")
    assert "\n" not in rows["d/other"][1]
    assert "\n" in rows["d/same"][1]
    assert f"d/other has other data than d/plain, so it is not compared: {reason}." in visible(html)


def test_anomaly_detectors_are_compared_by_their_rankings(detectors, tmp_path, capsys):
    main([str(detectors), "--format", "md"])
    out = capsys.readouterr().out
    head = "average precision | AUROC | precision of the alarms | recall of the alarms | F1 at the threshold"
    assert f"| run | {head} | training loss |" in out
    assert "| difference to anomaly_table/devnet_sgd |" in out
    runs, skipped = read_runs([detectors / "anomaly_table/devnet_sgd"])
    assert skipped == {}
    mean = sum(100 * run.final["test/average_precision"] for run in runs) / 2
    assert f"| anomaly_table/devnet_sgd (2 runs) | {mean:.1f} ± " in out
    for kind in ("html", "png", "csv"):
        main([str(detectors), "--output", str(tmp_path / f"r.{kind}")])
    html = (tmp_path / "r.html").read_text()
    assert len(figures(html)) == 4  # training loss; validation loss, average precision and AUROC
    assert figures(html)["figure0"]["data"][0]["x"] == [1, 2, 3]
    text = visible(html)
    assert "By average precision" in text
    assert "Data: AnomalyDataModule" in text
    assert "per_class.csv" not in text


def test_classifiers_and_detectors_are_reported_apart(detectors, three_groups, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(three_groups), str(detectors)])
    assert stop.value.code == 2
    assert "report them separately" in capsys.readouterr().err.splitlines()[-1]
