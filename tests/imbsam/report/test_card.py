"""The model card: its numbers against the run's files, and its limits against what the files show."""

import csv
import json
import sys

import numpy as np
import pytest
import yaml
from scipy.stats import beta, binom, norm, t
from sklearn.metrics import average_precision_score, roc_auc_score

from imbsam.intervals import auroc_interval, t_interval, wilson
from imbsam.report.command import main
from lightning_modules.cli.run import main as train
from tests.pieces import anomaly


def card(capsys, *args):
    main([*map(str, args), "--format", "card"])
    text = capsys.readouterr().out
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def table_row(body, first):
    line = next(line for line in body.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A detector with decisions, trained by the real command."""
    folder = tmp_path_factory.mktemp("detector")
    settings = ["--trainer.max_epochs=2", "--data.batches_per_epoch=5", "--decisions.recall=0.6", "--drift.alpha=0.01"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["imbsam", "fit", *anomaly("devnet", "sgd"), *settings])
        train()
    return folder / "logs/anomaly_table/devnet_sgd/version_0"


def test_a_detectors_card(detector, capsys):
    head, body = card(capsys, detector)
    with (detector / "metrics.csv").open() as file:
        logged = {k: float(v) for row in csv.DictReader(file) for k, v in row.items() if v}
    metrics = {m["name"]: m["value"] for m in head["model-index"][0]["results"][0]["metrics"]}
    assert metrics["AUROC"] == pytest.approx(logged["test/auroc"], abs=1e-4)
    hits = round(53 * logged["test/recall"])
    low = beta.ppf(0.025, hits, 53 - hits + 1)
    assert table_row(body, "recall at the threshold")[2].startswith(f"{100 * low:.1f} to ")
    facts = json.loads((detector / "facts.json").read_text())
    assert facts["samples"]["validation"] == {"normal": 227, "anomaly": 25}
    assert facts["samples"]["test"] == {"normal": 487, "anomaly": 53}
    assert table_row(body, "recall anomaly")[2].endswith("% of 53")
    assert (
        "was chosen on 25 positives and 227 negatives of the validation part; what it promises, with its 95 %" in body
    )
    assert "compares new rows with the 252 validation samples" in body
    assert "Drift is not watched" not in body
    assert "9.81 % are anomalies" in body
    assert f"torch {facts['versions']['torch']}" in body


def test_a_classifiers_card_over_seeds(three_groups, capsys):
    head, body = card(capsys, three_groups / "digits/sgd")
    runs = sorted((three_groups / "digits/sgd").glob("version_*"))
    values = []
    for run in runs:
        with (run / "metrics.csv").open() as file:
            values.append(next(float(row["test/few"]) for row in csv.DictReader(file) if row["test/few"]))
    few = table_row(body, "accuracy of the few-shot classes")
    assert few[1] == f"{50 * sum(values):.1f} %"
    low, high = t.interval(0.95, 1, np.mean(values), np.std(values, ddof=1) / 2**0.5)
    assert few[3] == f"{100 * max(low, 0):.1f} to {100 * min(high, 1):.1f} %"
    assert head["library_name"] == "imbsam"
    assert "<img" not in body
    assert "&lt;img src=x" in body
    assert "eel \\| ray" in body


def test_limits_are_those_of_the_files(write_run, tmp_path, capsys):
    """A class without a test sample, one with few of them, one without training samples, and no medium-shot class."""
    run = write_run(tmp_path, "own/sgd", counts=[120, 60, 6, 3, 0], names=["cat", "dog", "eel", "fox", "gnu"])
    rows = list(csv.DictReader((run / "per_class.csv").open()))
    rows[2] |= {"test_samples": "6", "accuracy": "0.8333333"}
    rows[3] |= {"test_samples": "0", "accuracy": "", "precision": "", "f1": ""}
    with (run / "per_class.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    _, body = card(capsys, run)
    assert "* No training sample: gnu." in body
    assert "* No test sample: fox." in body
    assert "* No class is in the medium-shot group, which has no accuracy." in body
    low, high = beta.ppf(0.025, 5, 2), beta.ppf(0.975, 6, 1)
    assert "Of 2 few-shot classes there are fewer than 30 test samples (eel, gnu)" in body
    assert f"That of eel, with 6, may be {100 * low:.1f} to {100 * high:.1f} %." in body
    assert "* One run: how much another seed would change is not known." in body
    assert "versions | not recorded" in body, "a run of before facts.json"


def test_a_balanced_test_part_is_a_limit(three_groups, capsys):
    _, body = card(capsys, three_groups / "digits/sgd")
    assert "The test part is balanced (ratio 1) and the training part is not (ratio 40)" in body


@pytest.mark.parametrize(
    ("content", "line"), [("{", "its facts.json cannot be read: half-written?"), ("[]", "its facts.json is no object")]
)
def test_a_truncated_file_is_one_line(content, line, write_run, tmp_path, capsys):
    run = write_run(tmp_path, "own/sgd")
    (run / "facts.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        main([str(run), "--format", "card"])
    assert stop.value.code == 2
    assert line in capsys.readouterr().err


def test_a_card_is_of_one_model(three_groups, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(three_groups), "--format", "card"])
    assert stop.value.code == 2
    assert "format is card, which is of one model, and these are 3: name the folder of " in capsys.readouterr().err


def test_intervals_hold_as_often_as_they_say():
    """Of 300 test parts; the true values by 400,000 rows. Wilson's is conservative for a mean over classes."""
    random, inside = np.random.default_rng(0), np.zeros(3)
    true_auroc = norm.cdf(1.5 / 2**0.5)
    scores = np.concatenate([random.normal(size=363_636), random.normal(1.5, size=36_364)])
    true_ap = average_precision_score(np.arange(400_000) >= 363_636, scores)
    recalls, tested = np.array([0.9, 0.7, 0.5, 0.2]), np.array([40, 20, 10, 5])
    labels = np.arange(440) >= 400
    for _ in range(300):
        scores = np.concatenate([random.normal(size=400), random.normal(1.5, size=40)])
        low, high = auroc_interval(roc_auc_score(labels, scores), 40, 400)
        inside[0] += low <= true_auroc <= high
        low, high = wilson(average_precision_score(labels, scores), 40)
        inside[1] += low <= true_ap <= high
        low, high = wilson((random.binomial(tested, recalls) / tested).mean(), 16 / (1 / tested).sum())
        inside[2] += low <= recalls.mean() <= high
    assert (inside >= binom.ppf(0.001, 300, 0.95)).all(), inside


def test_students_interval():
    values = [0.5, 0.6, 0.8]
    expected = t.interval(0.95, 2, np.mean(values), np.std(values, ddof=1) / 3**0.5)
    assert t_interval(values) == pytest.approx(expected)
