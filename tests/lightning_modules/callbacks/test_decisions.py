"""Decisions through the command: chosen after training, kept in the checkpoint, written by predict."""

import csv
import re
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from datamodules import AnomalyDataModule, DigitsLTDataModule
from imbsam import Plain, SettingError
from lightning_modules import AnomalyDetector, LongTailedClassifier
from lightning_modules.backbones.small_cnn import SmallCNN
from lightning_modules.callbacks.calibration import Calibration
from lightning_modules.callbacks.decisions import Decisions
from lightning_modules.callbacks.predictions import PredictionsCSV
from lightning_modules.resuming.resumable_checkpoint import ResumableCheckpoint
from tests.pieces import anomaly

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
FEW = ["--trainer.max_epochs=2", "--data.batches_per_epoch=5"]


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def column(found, name):
    return np.array([float(row[name]) for row in found])


def digits():
    return DigitsLTDataModule(ratio=10, val_share=0.3)


def classifier():
    return LongTailedClassifier(SmallCNN, sam=Plain, optimizer=partial(torch.optim.Adam, lr=0.01))


def fit(folder, *callbacks, model=None, data=None):
    seed_everything(0)
    checkpoint = ResumableCheckpoint(dirpath=folder, every_seconds=1e9)
    trainer = Trainer(max_epochs=3, callbacks=[*callbacks, checkpoint], **QUIET)
    model, data = model or classifier(), data or digits()
    trainer.fit(model, datamodule=data)
    return trainer, model, data


def predict(folder, model=None, data=None):
    """From the checkpoint alone."""
    writer = PredictionsCSV(str(folder / "p.csv"))
    trainer = Trainer(callbacks=[Calibration(), Decisions(), writer], **QUIET)
    trainer.predict(model or classifier(), datamodule=data or digits(), ckpt_path=folder / "last.ckpt")
    return rows(folder / "p.csv")


def validation(model, data):
    with torch.no_grad():
        loader = data.val_dataloader()
        loader = loader[0] if isinstance(loader, list) else loader
        pairs = [(model.eval().predict_step(x, 0), y) for x, y in loader]
    p, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return p.double().numpy(), y.numpy()


def test_a_detectors_alarms_are_for_the_wanted_recall(imbsam, tmp_path):
    """By the command with a user's defaults: the promise is printed, predict and test follow from the checkpoint."""
    code, out, err = imbsam("fit", *anomaly("devnet", "sgd"), *FEW, "--decisions.recall=0.6")
    assert code == 0, err
    last = tmp_path / "logs/anomaly_table/devnet_sgd/version_0/checkpoints/last.ckpt"
    fitted = torch.load(last, weights_only=True)["callbacks"]["Decisions"]["fitted"]["thresholds"][1]
    assert fitted["true_alarms"] == 15, "0.6 of 25"
    assert "recall 0.6" in out
    assert re.search(r"60 % \[38.7,\s", out), "Clopper-Pearson of 15 in 25 is 38.7 to 78.9 %"

    code, _, err = imbsam("predict", "--ckpt_path", last, "--predictions.path=p.csv")
    assert code == 0, err
    found = rows("p.csv")
    assert list(found[0]) == ["row", "score", "alarm"]
    score, alarm = column(found, "score"), column(found, "alarm")
    assert score[alarm == 1].min() == pytest.approx(fitted["value"], rel=1e-3)
    assert score[alarm == 0].max() < fitted["value"]

    code, out, err = imbsam("test", "--ckpt_path", last)
    assert code == 0, err
    tested = rows(tmp_path / "logs/anomaly_table/devnet_sgd/test_0/metrics.csv")[0]
    assert float(tested["test/recall_anomaly"]) == pytest.approx(float(tested["test/recall"])), "one threshold"
    assert f"{100 * float(tested['test/recall']):.3g} % of 53" in out


def test_a_threshold_for_each_of_two_classes(tmp_path):
    goals = {"recall": {"7": 0.75}, "false_alarms": {"5": 100}}
    _, model, data = fit(tmp_path, Calibration("temperature"), decisions := Decisions(**goals))
    found = predict(tmp_path)
    assert list(found[0])[:5] == ["row", "predicted", "decision", "alarm 7", "alarm 5"]
    for index, saved in decisions.fitted["thresholds"].items():
        p = column(found, str(index))
        clear = np.abs(p - saved["value"]) > 1e-5  # the file has six digits
        np.testing.assert_array_equal(column(found, f"alarm {index}")[clear], (p >= saved["value"])[clear])
    for row in found:
        alarmed = [name for name in ("7", "5") if row[f"alarm {name}"] == "1"]
        if len(alarmed) == 1:
            assert row["decision"] == alarmed[0]
        elif not alarmed:
            assert row["decision"] == max((c for c in "01234689"), key=lambda c: float(row[c]))
    calibration = Calibration("temperature")
    calibration.fitted = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["Calibration"]["fitted"]
    p, y = validation(model, data)
    own = calibration.apply(torch.from_numpy(p))[:, 7].numpy()
    assert (own[y == 7] >= decisions.fitted["thresholds"][7]["value"] - 1e-7).mean() >= 0.75


def test_decisions_by_cost_with_a_look(tmp_path):
    costs = (1 - np.eye(10)).tolist()
    costs[7] = [20.0 if c != 7 else 0.0 for c in range(10)]
    trainer, model, data = fit(tmp_path, Calibration("temperature"), Decisions(costs=costs, look_cost=0.4))
    found = predict(tmp_path)
    p = np.array([[float(row[str(c)]) for c in range(10)] for row in found])
    expected = p @ np.array(costs)
    for row, own in zip(found, expected, strict=True):
        if abs(own.min() - 0.4) > 1e-4:
            assert row["decision"] == ("look" if own.min() > 0.4 else str(own.argmin()))
            assert float(row["expected_cost"]) == pytest.approx(min(0.4, own.min()), abs=1e-4)
    tested = trainer.test(model, datamodule=data, verbose=False)[0]
    labels = torch.cat([y for _, y in data.test_dataloader()]).tolist()
    paid = [
        0.4 if row["decision"] == "look" else costs[y][int(row["decision"])]
        for row, y in zip(found, labels, strict=True)
    ]
    assert tested["test/mean_cost"] == pytest.approx(np.mean(paid), rel=1e-4)


def test_conformal_sets_of_a_detector_and_of_a_classifier(tmp_path):
    _, model, data = fit(tmp_path, Decisions(coverage=0.8))
    found = predict(tmp_path)
    p, y = validation(model, data)
    for c in range(10):
        own = np.sort(p[y == c, c])
        k = int(0.2 * (len(own) + 1) + 1e-9)
        limit = own[k - 1] if k else -1.0
        shown = column(found, str(c))
        clear = np.abs(shown - limit) > 1e-5 * max(limit, 1e-5)
        inside = np.array([str(c) in row["set"].split("|") for row in found])
        np.testing.assert_array_equal(inside[clear], (shown >= limit)[clear])
    assert all((row["decision"] == "look") == (row["set"].count("|") > 0 or not row["set"]) for row in found)

    data = AnomalyDataModule(val_share=0.2, sampling="balanced", batch_size=256, batches_per_epoch=5)
    fit(tmp_path / "detector", Decisions(coverage=0.9), model=AnomalyDetector(sam=Plain), data=data)
    found = predict(tmp_path / "detector", AnomalyDetector(sam=Plain), AnomalyDataModule())
    assert {row["set"] for row in found} <= {"normal", "anomaly", "normal|anomaly", ""}
    assert list(found[0]) == ["row", "score", "alarm", "decision", "set"]


def test_a_goal_that_cannot_be_met_is_one_line_and_the_checkpoint_stays(tmp_path):
    """All scores are equal: no precision of 1 for one class, and the other keeps its threshold."""

    class Useless(LongTailedClassifier):
        def forward(self, images):
            return 0 * super().forward(images)

    model = Useless(SmallCNN, sam=Plain)
    with pytest.warns(UserWarning, match=r"no threshold for 7: precision is 1: the best on the validation part is 0.0"):
        fit(tmp_path, decisions := Decisions(precision={"7": 1.0}, recall={"5": 0.5}), model=model)
    assert list(decisions.fitted["thresholds"]) == [5]
    with pytest.warns(UserWarning, match="no decisions: no threshold for 7: precision is 1: the best"):
        fit(tmp_path / "none", Decisions(precision={"7": 1.0}), model=Useless(SmallCNN, sam=Plain))
    assert (tmp_path / "none/last.ckpt").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recall": 0.9, "coverage": 0.9}, "decisions has recall and coverage: set thresholds, costs or a coverage"),
        ({"look_cost": 1.0}, "decisions.look_cost is 1 and decisions.costs is null"),
        ({"costs": [[0, 1], [1, 0]], "look_cost": -1}, "look_cost is -1"),
        ({"coverage": 90}, "coverage is 90"),
        ({"recall": 0.9, "confidence": 95}, "confidence is 95"),
    ],
)
def test_wrong_settings_are_one_line(settings, message):
    with pytest.raises(SettingError, match=message):
        Decisions(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recall": 0.9}, r"decisions.recall is 0.9: name its classes, as in \{9: 0.9\}"),
        ({"recall": {"cat": 0.9}}, r"decisions.recall is \{'cat': 0.9\}: there is no class cat: choose of 0, 1"),
        ({"recall": {"7": 0.9}, "precision": {"7": 0.9}}, "7 has a recall already"),
        ({"precision": {"7": 2}}, "precision is 2"),
        ({"costs": [[0, 1], [1, 0]]}, r"costs is \[\[0, 1\], \[1, 0\]\]: give 10 rows \(true class\)"),
    ],
)
def test_what_does_not_suit_the_classes_is_refused_before_the_training(settings, message, tmp_path):
    with pytest.raises(SettingError, match=message):
        fit(tmp_path, Decisions(**settings))


def test_the_order_of_the_callbacks(tmp_path):
    with pytest.raises(SettingError, match="decisions comes before calibration among the callbacks: put it after"):
        fit(tmp_path, Decisions(recall={"7": 0.9}), Calibration("temperature"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--decisions.recall={anomaly: 0.9}"], "give a number"),
        (["--decisions.costs=[[0, 1], [20, 0]]"], "needs probabilities, which a detector has none of"),
        (["--decisions.recall=0.9", "--data.val_share=0"], "data.val_share is 0, and decisions is fitted"),
    ],
)
def test_what_does_not_suit_a_detector_is_one_line(settings, message, imbsam):
    code, _, err = imbsam("fit", *anomaly("devnet", "sgd"), *FEW, *settings)
    assert code == 2
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("imbsam: error")]) == 1


def test_predicting_with_another_goal_than_the_checkpoints_is_refused(tmp_path):
    fit(tmp_path, Decisions(recall={"7": 0.5}))
    trainer = Trainer(callbacks=[Decisions(recall={"7": 0.9}), PredictionsCSV(str(tmp_path / "p.csv"))], **QUIET)
    with pytest.raises(SettingError, match=r"decisions.recall is \{'7': 0.9\}, and the checkpoint has .*0.5"):
        trainer.predict(classifier(), datamodule=digits(), ckpt_path=tmp_path / "last.ckpt")
    assert not (tmp_path / "p.csv").exists()
