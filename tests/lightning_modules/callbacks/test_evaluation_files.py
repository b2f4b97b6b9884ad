"""The CSV files of a test, and what a training costs."""

import csv
import math
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torchmetrics.functional.classification import binary_calibration_error

from imbsam.group_names import TEST_DISTRIBUTIONS
from imbsam.metrics import ClassGroupAccuracy
from lightning_modules.callbacks.evaluation_files import _errors, calibration_bins, write_evaluation
from lightning_modules.cli.run import main


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two epochs on the digits, by the command line."""
    folder = tmp_path_factory.mktemp("run")
    arguments = [
        *("fit", "--config=configs/data/digits_lt.yaml", f"--trainer.logger.init_args.save_dir={folder}"),
        *("--trainer.max_epochs=2", "--model.lr_scheduler.init_args.T_max=2", "--trainer.enable_progress_bar=false"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["imbsam", *arguments])
        main()
    return folder / "digits_lt/imbsam/version_0"


def test_the_classes_accuracies_are_those_of_the_log(run):
    classes = read(run / "per_class.csv")
    assert [int(row["class"]) for row in classes] == list(range(10))
    assert sum(int(row["training_samples"]) for row in classes) == 336
    assert {row["group"] for row in classes} == {"many", "medium", "few"}
    assert all((row["tail"] == "1") == (int(row["training_samples"]) < 20) for row in classes)
    logged = next(row for row in read(run / "metrics.csv") if row["test/all"])
    for group in ("many", "medium", "few", "all"):
        accuracies = [float(row["accuracy"]) for row in classes if group in (row["group"], "all")]
        assert np.mean(accuracies) == pytest.approx(float(logged[f"test/{group}"]), abs=1e-5)
    confusion = read(run / "confusion.csv")
    for row in classes:
        hits = sum(int(c["count"]) for c in confusion if c["target"] == row["class"] == c["predicted"])
        assert hits / int(row["test_samples"]) == pytest.approx(float(row["accuracy"]), abs=1e-5)
    recalls, f1 = ([float(row[name]) for row in classes] for name in ("accuracy", "f1"))
    assert float(logged["test/lowest_recall"]) == pytest.approx(min(recalls), abs=1e-5)
    assert float(logged["test/macro_f1"]) == pytest.approx(np.mean(f1), abs=1e-5)
    assert float(logged["test/top5_all"]) >= float(logged["test/all"])
    order = sorted(range(10), key=lambda c: -int(classes[c]["training_samples"]))
    for name in TEST_DISTRIBUTIONS:
        direction, ratio = name.split("_")
        ranks = order if direction == "forward" else order[::-1]
        weights = [int(ratio) ** (-ranks.index(c) / 9) for c in range(10)]
        assert float(logged[f"test/{name}"]) == pytest.approx(np.average(recalls, weights=weights), abs=1e-5)
    calibration = read(run / "calibration.csv")
    assert sum(int(row["samples"]) for row in calibration if row["group"] == "all") == 540
    for group in ("many", "medium", "few", "all"):
        bins = [
            [float(row[k]) for k in ("samples", "confidence", "accuracy")]
            for row in calibration
            if row["group"] == group
        ]
        error = sum(n * abs(hit - mean) for n, mean, hit in bins) / sum(n for n, _, _ in bins)
        assert error == pytest.approx(float(logged[f"test/ece_{group}"]), abs=1e-5)


def test_seconds_and_device_are_logged(run):
    seconds = [float(row["train/seconds"]) for row in read(run / "metrics.csv") if row["train/seconds"]]
    assert len(seconds) == 2
    assert all(0 < s < 60 for s in seconds)
    assert "device: CPU" in (run / "hparams.yaml").read_text()


def fake_model(counts):
    accuracy = ClassGroupAccuracy(counts)
    settings = (20, None)
    names = [f"class {i}" for i in range(len(counts))]
    return SimpleNamespace(class_counts=counts, class_names=names, tail_settings=settings, test_accuracy=accuracy)


def test_confusion_is_scikit_learns_and_a_class_without_test_samples_has_no_accuracy(tmp_path):
    random = torch.Generator().manual_seed(0)
    target, predicted = torch.randint(0, 4, (2, 300), generator=random)
    write_evaluation(tmp_path, fake_model(torch.tensor([200, 50, 30, 9, 3])), target, predicted, torch.rand(300))
    found = np.zeros((5, 5), int)
    for row in read(tmp_path / "confusion.csv"):
        found[int(row["target"]), int(row["predicted"])] = int(row["count"])
        assert row["count"] != "0"
    assert (found == confusion_matrix(target, predicted, labels=range(5))).all()
    *others, last = read(tmp_path / "per_class.csv")
    assert (last["test_samples"], last["accuracy"], last["precision"], last["f1"]) == ("0", "", "", "")
    wanted = precision_recall_fscore_support(target, predicted)
    for name, values in zip(("precision", "accuracy", "f1"), wanted, strict=False):
        assert [float(row[name]) for row in others] == pytest.approx(values, abs=1e-5)


def test_calibration_bins_are_those_of_torchmetrics():
    random = torch.Generator().manual_seed(1)
    confidence, correct = torch.rand(400, generator=random), torch.rand(400, generator=random) < 0.7
    confidence[0] = 1.0
    bins = calibration_bins(confidence, correct)
    error = sum(n * abs(accuracy - mean) for _, n, mean, accuracy in bins) / 400
    assert error == pytest.approx(float(binary_calibration_error(confidence, correct.long(), n_bins=15)), abs=1e-6)
    assert calibration_bins(torch.tensor([float("nan")]), torch.tensor([True])) == []


def test_a_group_without_test_samples_has_no_calibration_error():
    model = fake_model(torch.tensor([200, 50, 3]))
    target, predicted = torch.tensor([0, 0, 2, 2]), torch.tensor([0, 1, 2, 0])
    errors = dict(_errors(model, target, predicted, torch.tensor([0.5, 0.5, math.nan, 0.75])))
    assert math.isnan(errors["medium"])
    assert {group: float(error) for group, error in errors.items() if group != "medium"} == pytest.approx(
        {"many": 0, "few": 0.75, "all": 0.25}
    )


def test_eight_thousand_classes_are_quick_and_small(tmp_path):
    """As many classes and test rows as iNaturalist 2018 has."""
    counts = torch.linspace(1000, 2, 8142).long()
    target = torch.arange(24426) % 8142
    start = time.process_time()
    write_evaluation(tmp_path, fake_model(counts), target, target.flip(0), torch.rand(24426))
    assert time.process_time() - start < 5
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 1e6
