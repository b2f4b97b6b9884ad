"""AnomalyDetector with a detector that has no gradient: trained, tested and resumed as the others are."""

from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from sklearn.ensemble import HistGradientBoostingClassifier

from datamodules import AnomalyDataModule
from imbsam import ImbSAM, Plain, SettingError
from imbsam.report.command import main as report
from lightning_modules.anomaly import AnomalyDetector
from lightning_modules.callbacks.early_stopping import RestoringEarlyStopping
from lightning_modules.detectors import Boosting
from tests.pieces import configs
from tests.training import csv_rows

BOOSTING = [
    *configs("data/anomaly_table", "detector/boosting"),
    "--model.detector.trees=25",
    "--model.detector.learning_rate=0.1",
]


def booster_of(data, trees):
    booster = HistGradientBoostingClassifier(max_iter=trees, early_stopping=False)
    return booster.fit(data.train_features.numpy(), data.train_labels.numpy())


def test_fit_test_predict_and_the_checkpoint_is_plain_data(imbsam, tmp_path, capsys):
    """Scores are scikit-learn's on the same rows; threshold, decisions, calibration and report as for a network."""
    wanted = ["--calibration.method=isotonic", "--decisions.recall=0.9"]
    code, out, err = imbsam("fit", *BOOSTING, *wanted)
    assert code == 0, err
    for text in ("AUROC", "F1", "Boosting, Plain", "recall anomaly", "calibration error"):
        assert text in out
    assert "raise trainer.max_epochs" not in out + err, "the number of trees ends the training"
    assert "more epochs may help" not in out + err
    run = tmp_path / "logs/anomaly_table/plain_boosting/version_0"
    rows = csv_rows(run / "metrics.csv")
    steps = [int(row["step"]) for row in rows if row["val/loss"]]
    assert steps == [9, 19, 24] or steps == [9, 19, 29], "ten trees an epoch, and validation after each"
    last = run / "checkpoints/last.ckpt"
    checkpoint = torch.load(last, weights_only=True)  # refuses everything but tensors and plain data
    assert int(checkpoint["state_dict"]["detector.used"]) == 25

    assert imbsam("predict", "--ckpt_path", last, "--predictions.path", "scores.csv")[0] == 0
    data = AnomalyDataModule(val_share=0.2)
    data.setup("fit")
    data.setup("predict")
    x = torch.cat([batch if torch.is_tensor(batch) else batch[0] for batch in data.predict_dataloader()]).numpy()
    found = csv_rows("scores.csv")
    np.testing.assert_allclose(
        [float(row["score"]) for row in found], booster_of(data, 25).decision_function(x), rtol=1e-4, atol=1e-4
    )
    assert {row["alarm"] for row in found} == {"0", "1"}

    code, out, _ = imbsam("test", "--ckpt_path", last)
    logged = next(row for row in rows if row.get("test/auroc"))
    assert code == 0
    assert f"{100 * float(logged['test/f1']):.1f}" in out, "the threshold comes from the checkpoint"
    report(["logs/anomaly_table"])
    assert "boosting" in capsys.readouterr().out.lower()

    code, _, err = imbsam("fit", *BOOSTING, *wanted, "--ckpt_path", last)
    assert code == 0, "a finished run that is resumed has nothing left to train"
    again = torch.load(last, weights_only=True)["state_dict"]
    assert all(torch.equal(again[name], value) for name, value in checkpoint["state_dict"].items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--config=configs/method/imbsam.yaml"], "model.sam is ImbSAM: Boosting has no gradient to sharpen"),
        (["--model.sam.tail_weight=2"], "tail_weight or class_weight, which Boosting does not use"),
        (["--model.optimizer=Adam"], "model.optimizer is set: Boosting has no gradient: set it to null"),
        (["--model.gradient_clip_val=1"], "model.gradient_clip_val is set: Boosting"),
        (["--data.sampling=pairs"], "data.sampling is pairs, which Boosting cannot use"),
        (["--trainer.precision=bf16-true"], "too coarse for trees: set it to 32-true"),
        (["--model.detector.trees=0"], "trees is 0"),
    ],
)
def test_what_boosting_cannot_use_is_one_line(settings, message, imbsam):
    code, _, err = imbsam("fit", *BOOSTING, *settings)
    assert code == 2
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("imbsam: error")]) == 1


def fit(data, trees=15, sam=Plain, callbacks=(), **settings):
    seed_everything(0)
    module = AnomalyDetector(partial(Boosting, trees=trees), sam=sam)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"max_epochs": 100, **settings},
    )
    trainer.fit(module, datamodule=data)
    return module, trainer


@pytest.mark.parametrize("val_share", [0.0, 0.2])
def test_it_trains_all_its_trees_with_early_stopping_in_the_config(val_share):
    """Neither passes over the data nor the validation loss, which rises long before the ranking is best, end it."""
    data = AnomalyDataModule(val_share=val_share, batch_size=256, batches_per_epoch=1)
    stopping = RestoringEarlyStopping(patience=1, passes_without_validation=1)
    module, trainer = fit(data, callbacks=[stopping])
    assert int(module.detector.used) == trainer.global_step == trainer.current_epoch == 15
    found = module.detector.scores(data.train_features)
    wanted = booster_of(data, 15).decision_function(data.train_features.numpy())
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert bool(module.threshold.isnan()) == (val_share == 0)


def test_no_labelled_anomaly_is_one_line():
    class Unlabelled(LightningDataModule):
        """The user's own, without an anomaly."""

        train_features, train_labels = torch.rand(50, 3), torch.zeros(50, dtype=torch.int64)
        class_counts = torch.tensor([50, 0])

        def train_dataloader(self):
            return [(self.train_features, self.train_labels)]

    with pytest.raises(SettingError, match=r"no labelled anomaly: raise data.labelled_share"):
        fit(Unlabelled())
    with pytest.raises(SettingError, match=r"model.sam is ImbSAM: Boosting has no gradient"):
        fit(Unlabelled(), sam=ImbSAM)
