"""MultiLabelClassifier: the same steps as a plain loop around the engine, its log, its files, and the command."""

import csv
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from sklearn.metrics import average_precision_score

from datamodules import DigitsLTDataModule, DigitsMultiLabelDataModule
from imbsam import CCSAM, SAM, FocalSAM, ImbSAM, Plain, SettingError
from imbsam.losses import LDAM
from imbsam.multilabel_losses import Asymmetric, DistributionBalanced
from imbsam.report.command import main as report
from lightning_modules import LongTailedClassifier, MultiLabelClassifier
from lightning_modules.backbones import SmallCNN
from lightning_modules.callbacks.average_precision import ClassAveragePrecision
from lightning_modules.callbacks.calibration import Calibration
from lightning_modules.callbacks.epochs_on_test_set import EpochsOnTestSet
from lightning_modules.callbacks.evaluation_files import EvaluationFiles
from lightning_modules.callbacks.result_tables import AccuracyTable
from lightning_modules.tuning.head_init import ClassMeans
from tests.pieces import configs
from tests.programs import run_command
from tests.training import csv_rows, quiet_trainer

SMALL: dict[str, Any] = {"backbone": partial(SmallCNN, width=4), "many": 100, "few": 20}


def adam(params):
    return torch.optim.Adam(params, lr=0.01)


@pytest.fixture(scope="module")
def data():
    data = DigitsMultiLabelDataModule(samples=300, test_samples=120, val_share=0.2)
    data.setup()
    return data


def fit(data, callbacks=(), epochs=1, **settings):
    seed_everything(0)
    model = MultiLabelClassifier(**{**SMALL, "optimizer": adam, **settings})
    run = quiet_trainer(max_epochs=epochs, callbacks=list(callbacks), log_every_n_steps=1)
    run.fit(model, datamodule=data)
    return model, run


@pytest.mark.parametrize(
    "method",
    [Plain, partial(SAM, rho=0.1), partial(ImbSAM, rho=0.1, eta=30), partial(FocalSAM, rho=0.1)],
    ids=["plain", "sam", "imbsam", "focal_sam"],
)
def test_trains_like_a_plain_loop(data, method):
    model, _ = fit(data, sam=partial(method, tail_weight=2.0), optimizer=partial(torch.optim.SGD, lr=0.5))

    seed_everything(0)
    plain = SmallCNN(num_classes=10, width=4)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    engine = partial(method, tail_weight=2.0)(plain, data.label_counts)
    for x, y in data.train_dataloader():
        engine.backward(
            lambda rows, x=x, y=y: F.binary_cross_entropy_with_logits(
                plain(x[rows]), y[rows].float(), reduction="none"
            ),
            y,
        )
        optimizer.step()
        optimizer.zero_grad()
    for found, wanted in zip(model.backbone.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("loss", [Asymmetric, partial(DistributionBalanced, kappa=0.1)])
def test_losses_get_the_counts_of_both_labels(data, loss):
    model, run = fit(data, loss=loss)
    assert run.callback_metrics["train/loss_epoch"].isfinite()
    if isinstance(model.loss, DistributionBalanced):
        assert torch.equal(model.loss.class_counts, data.label_counts)


def test_the_log_and_the_files_of_a_test(data, tmp_path, capsys):
    model, run = fit(data, [ClassAveragePrecision(), AccuracyTable(), EvaluationFiles()])
    assert {f"val/map_{group}" for group in ("many", "medium", "few", "all")} <= set(run.callback_metrics)
    assert 0 <= float(run.callback_metrics["train/tail_rows"]) <= 32
    run = quiet_trainer(
        callbacks=[ClassAveragePrecision(), AccuracyTable(), EvaluationFiles()], logger=CSVLogger(tmp_path)
    )
    capsys.readouterr()
    (metrics,) = run.test(model, datamodule=data, verbose=False)
    model.eval()
    with torch.no_grad():
        x, y = (torch.cat(part) for part in zip(*data.test_dataloader(), strict=True))
        scores = model(x)
    wanted = [average_precision_score(y[:, j], scores[:, j]) for j in range(10)]
    assert metrics["test/map_all"] == pytest.approx(sum(wanted) / 10, rel=1e-4)
    assert metrics["test/loss"] == pytest.approx(float(F.binary_cross_entropy_with_logits(scores, y.float())), rel=1e-4)
    rows = csv_rows(Path(run.log_dir) / "average_precision.csv")
    assert [float(row["average_precision"]) for row in rows] == pytest.approx(wanted, rel=1e-4)
    assert [int(row["training_samples"]) for row in rows] == data.class_counts.tolist()
    assert [int(row["test_samples"]) for row in rows] == y.sum(0).tolist()
    assert not (Path(run.log_dir) / "confusion.csv").exists()
    predicted = model.predict_step([x, y], 0)
    torch.testing.assert_close(predicted, scores.sigmoid())
    header, table = model.prediction_table([predicted])
    assert header == data.class_names
    assert [float(cell) for cell in next(iter(table))] == pytest.approx(predicted[0].tolist(), rel=1e-4)
    tail = data.class_counts < 20
    assert model._count_tail(y) == sum(any(has and rare for has, rare in zip(row, tail, strict=True)) for row in y)
    printed = capsys.readouterr().out
    assert "average precision of each class" in printed
    assert "mean average precision" in printed


@pytest.mark.parametrize(
    ("settings", "callbacks", "message"),
    [
        ({"sam": CCSAM}, [], "^sam is CCSAM, which has a perturbation for each group of classes"),
        ({"loss": LDAM}, [], "^loss is LDAM, for samples of one class each: choose BinaryCrossEntropy"),
        ({}, [EpochsOnTestSet()], "^model is MultiLabelClassifier, which has no accuracy of class groups"),
        (
            {"head_init": ClassMeans()},
            [],
            "^head_init is ClassMeans, and samples of MultiLabelClassifier have any",
        ),
        ({}, [Calibration("temperature")], "^calibration is set, and it is for samples of one class each"),
    ],
)
def test_what_cannot_work_with_several_classes_a_sample(data, settings, callbacks, message):
    with pytest.raises(SettingError, match=message):
        fit(data, callbacks, **settings)


def test_model_and_data_must_suit_each_other(data):
    with pytest.raises(
        SettingError, match=r"^model is MultiLabelClassifier, for samples of any number of classes, and those"
    ):
        fit(DigitsLTDataModule())
    with pytest.raises(
        SettingError, match=r"^model is LongTailedClassifier, for samples of one class, .*MultiLabelClassifier"
    ):
        quiet_trainer().fit(LongTailedClassifier(**SMALL), datamodule=data)


@pytest.fixture
def images(tmp_path):
    """A table of 24 images and their findings, with one damaged cell to be made by the tests."""
    rows = []
    for i in range(24):
        names = [name for name, every in (("red", 2), ("green", 3), ("blue", 8)) if i % every == 0] or ["grey"]
        colour = tuple(200 if name in names else 30 for name in ("red", "green", "blue"))
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{i}.png")
        rows.append([f"{i}.png", ";".join(names)])
    with (tmp_path / "images.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "labels"], *rows])
    return tmp_path / "images.csv"


def test_the_command_from_a_table_to_predictions_and_a_report(images, imbsam, tmp_path, capsys):
    small = [
        "--model.backbone=CifarResNet20",
        "--model.backbone.width=4",
        "--data.image_size=16",
        "--data.num_workers=0",
    ]
    pieces = configs("data/multilabel", "method/imbsam")
    settings = [f"--data.path={images}", "--model.sam.eta=6", "--data.val_share=0.2", "--trainer.max_epochs=2"]
    code, out, err = imbsam("fit", *pieces, *small, *settings)
    assert code == 0, err
    assert "training labels of 4 classes" in out
    assert "average precision of each class" in out
    (run,) = tmp_path.glob("logs/multilabel/imbsam/version_0")

    code, out, err = imbsam("predict", "--ckpt_path", run / "checkpoints/last.ckpt", f"--data.predict={images}")
    assert code == 0, err
    (written,) = tmp_path.rglob("predictions.csv")
    rows = csv_rows(written)
    assert list(rows[0]) == ["path", "blue", "green", "grey", "red"]
    assert len(rows) == 24
    assert all(0 < float(row["blue"]) < 1 for row in rows)

    code, out, err = imbsam("test", "--ckpt_path", run / "checkpoints/last.ckpt")
    assert code == 0, err
    assert "mean average precision" in out

    capsys.readouterr()
    report([str(run)])
    assert "mAP few" in capsys.readouterr().out
    report([str(run), "--output", str(tmp_path / "report.html")])
    assert "mAP few" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("edit", "option", "message"),
    [
        (
            ("red;green", "red;gren"),
            "--data.class_names=[red,green,blue,grey]",
            "has the label gren, which is not among",
        ),
        (("grey", ""), "--data.allow_empty=false", "has no label: name its classes"),
        (("", ""), "--data.label_columns=[labels]", "labels is 'red;green;blue': write 1 if the image has it, else 0"),
        (("", ""), "--data.class_names=[red,green,blue,grey,gold]", "no training sample has class gold"),
        (("", ""), "--model.sam=CCSAM", "sam is CCSAM, which has a perturbation for each group"),
    ],
)
def test_bad_input_is_one_line(edit, option, message, images, imbsam):
    if edit[0]:
        images.write_text(images.read_text().replace(*edit, 1))
    code, _, err = imbsam(
        "fit", *configs("data/multilabel", "method/imbsam"), f"--data.path={images}", "--data.num_workers=0", option
    )
    lines = [line for line in err.splitlines() if line.startswith("imbsam: error: ")]
    assert (code, len(lines)) == (2, 1), err
    assert message in lines[0]


@pytest.mark.processes
def test_two_processes_measure_what_one_does(tmp_path):
    """Scores of both ranks count: a test of the checkpoint on one process finds the same average precisions."""

    def run(*arguments):
        done = run_command(tmp_path, *arguments, "--trainer.accelerator=cpu")
        assert done.returncode == 0, done.stderr
        return done.stdout

    small = ["--data.samples=300", "--data.test_samples=121", "--model.backbone.width=4", "--trainer.max_epochs=1"]
    out = run("fit", *configs("data/digits_multilabel", "method/imbsam"), *small, "--trainer.devices=2")
    assert out.count("average precision of each class") == 1
    trained = tmp_path / "logs/digits_multilabel/imbsam/version_0"
    run("test", "--ckpt_path", str(trained / "checkpoints/last.ckpt"), "--trainer.devices=1")
    (tested,) = set(tmp_path.rglob("average_precision.csv")) - {trained / "average_precision.csv"}
    assert csv_rows(trained / "average_precision.csv") == csv_rows(tested)
