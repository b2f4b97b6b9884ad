"""Calibration through the command: fitted after training, kept in the checkpoint, written by predict."""

import csv
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import log_loss

from datamodules import AnomalyDataModule, DigitsLTDataModule
from imbsam import Plain, SettingError
from imbsam.losses import LogitAdjusted
from lightning_modules import AnomalyDetector, LongTailedClassifier
from lightning_modules.backbones.small_cnn import SmallCNN
from lightning_modules.callbacks.calibration import Calibration
from lightning_modules.callbacks.predictions import PredictionsCSV
from lightning_modules.resuming.resumable_checkpoint import ResumableCheckpoint
from tests.pieces import anomaly

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def digits(**settings):
    return DigitsLTDataModule(ratio=10, val_share=0.3, **settings)


def classifier(loss=None, weight=1.0):
    sam = partial(Plain, tail_weight=weight)
    return LongTailedClassifier(SmallCNN, loss=loss, sam=sam, optimizer=partial(torch.optim.Adam, lr=0.01))


def trained(folder, calibration, model, data, callbacks=(), epochs=3):
    seed_everything(0)
    checkpoint = ResumableCheckpoint(dirpath=folder, every_seconds=1e9)
    trainer = Trainer(max_epochs=epochs, callbacks=[calibration, *callbacks, checkpoint], **QUIET)
    trainer.fit(model, datamodule=data)
    return trainer


def predicted(path, model, data, folder):
    """The file of a prediction from the checkpoint alone."""
    writer = PredictionsCSV(str(folder / "p.csv"))
    Trainer(callbacks=[Calibration(), writer], **QUIET).predict(model, datamodule=data, ckpt_path=path)
    found = rows(folder / "p.csv")
    return np.array([[float(row[c]) for c in list(row)[2:]] for row in found])


def logits_and_labels(model, loader):
    with torch.no_grad():
        pairs = [(model.eval()(x), y) for x, y in loader]
    x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return x.double().numpy(), y.numpy()


def softmax(logits):
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def test_predictions_are_corrected_and_calibrated_from_the_checkpoint_alone(tmp_path):
    """Balanced softmax, class-balanced sampling and a doubled tail, all undone; the temperature by a grid."""
    data, model = digits(sampling="class_balanced"), classifier(partial(LogitAdjusted, tau=1.0), weight=2.0)
    calibration = Calibration("temperature", prior="balanced")
    trained(tmp_path, calibration, model, data)

    (z, y), (new, _) = (logits_and_labels(model, loader()) for loader in (data.val_dataloader, data.test_dataloader))
    natural = data.class_counts.numpy() / data.class_counts.sum().numpy()
    there = np.bincount(y, minlength=10) / len(y)
    weight = np.where(data.class_counts.numpy() < 20, 2.0, 1.0)
    shift = np.log(there) + np.log(natural) - np.log(weight) - np.log(0.1)
    z, new = z + shift, new + shift
    temperatures = np.exp(np.linspace(-3, 3, 6001))
    own = [-np.log(softmax(z / t)[np.arange(len(y)), y]).mean() + np.log(t) ** 2 / 2 / len(y) for t in temperatures]
    best = temperatures[np.argmin(own)]
    assert calibration.fitted["map"]["temperature"] == pytest.approx(best, rel=2e-3)
    expected = softmax(np.log(softmax(new / best)) - np.log(there))

    found = predicted(tmp_path / "last.ckpt", classifier(partial(LogitAdjusted, tau=1.0)), digits(), tmp_path)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert np.abs(found - softmax(new - shift)).max() > 0.05, "something was calibrated"


def test_an_isotonic_probability_stands_beside_the_score(imbsam, tmp_path):
    """By the command, with a user's default settings; test on the same checkpoint measures it."""
    few = ["--trainer.max_epochs=2", "--data.batches_per_epoch=5"]
    code, out, err = imbsam("fit", *anomaly("devnet", "sgd"), *few, "--calibration.method=isotonic")
    assert code == 0, err
    run = tmp_path / "logs/anomaly_table/devnet_sgd/version_0"
    last = run / "checkpoints/last.ckpt"
    code, out, err = imbsam("predict", "--ckpt_path", last, "--predictions.path=p.csv")
    assert code == 0, err
    found = rows("p.csv")
    assert list(found[0]) == ["row", "score", "alarm", "probability"]

    kept = torch.load(last, weights_only=True)["state_dict"]
    data = AnomalyDataModule(val_share=0.2, sampling="balanced", batch_size=256)
    data.setup()
    model = AnomalyDetector()
    model.class_counts, model.input_shape = data.class_counts, (data.num_features,)
    model.configure_model()
    model.load_state_dict(kept)
    z, y = logits_and_labels(model, data.val_dataloader()[0])
    theirs = IsotonicRegression(out_of_bounds="clip").fit(z, y).predict([float(row["score"]) for row in found])
    ours = np.array([float(row["probability"]) for row in found])
    assert np.abs(ours - theirs).max() < 2 / len(y)

    code, out, err = imbsam("test", "--ckpt_path", last)
    assert code == 0, err
    assert "before and after calibration (isotonic)" in out
    bins = rows(tmp_path / "logs/anomaly_table/devnet_sgd/test_0/calibrated.csv")
    counted = {g: sum(int(b["samples"]) for b in bins if b["group"] == g) for g in ("normal", "anomaly", "all")}
    assert counted == {"normal": 487, "anomaly": 53, "all": 540}
    tested = rows(tmp_path / "logs/anomaly_table/devnet_sgd/test_0/metrics.csv")[0]
    new, labels = logits_and_labels(model, data.test_dataloader())
    p = IsotonicRegression(y_min=1 / 254, y_max=253 / 254, out_of_bounds="clip").fit(z, y).predict(new)
    assert float(tested["test/calibrated_log_loss_all"]) == pytest.approx(log_loss(labels, p), rel=1e-3)
    assert float(tested["test/calibrated_log_loss_anomaly"]) == pytest.approx(-np.log(p[labels == 1]).mean(), rel=1e-3)


def test_the_test_after_a_fit_is_better_by_vector_scaling(tmp_path):
    """A model that is far too confident: its head's logits are five times too large."""
    data, model, calibration = digits(sampling="square_root"), classifier(), Calibration("vector", prior="balanced")

    class Loud(LongTailedClassifier):
        def forward(self, images):
            return 5 * super().forward(images)

    model = Loud(SmallCNN, sam=Plain, optimizer=partial(torch.optim.Adam, lr=0.01))
    trainer = trained(tmp_path, calibration, model, data)
    found = trainer.test(model, datamodule=data, verbose=False)[0]
    z, y = logits_and_labels(model, data.test_dataloader())
    assert found["test/log_loss_all"] == pytest.approx(log_loss(y, softmax(z).clip(1e-38), labels=range(10)), rel=1e-3)
    assert found["test/calibrated_log_loss_all"] < found["test/log_loss_all"]


def test_a_fit_that_fails_leaves_the_checkpoint(tmp_path):
    """A validation part of one's own, without a class."""

    class WithoutFives(DigitsLTDataModule):
        def val_dataloader(self):
            batches = [(x[y != 5], y[y != 5]) for x, y in super().val_dataloader()]
            return torch.utils.data.DataLoader(batches, batch_size=None)

    data = WithoutFives(ratio=10, val_share=0.3)
    with pytest.warns(UserWarning, match=r"no calibration: method is vector: 1 of 10 .* \(5\): set it to temp"):
        trainer = trained(tmp_path, Calibration("vector"), classifier(), data, epochs=1)
    assert (tmp_path / "last.ckpt").exists()
    trainer.test(datamodule=data, verbose=False)


@pytest.mark.parametrize(
    ("settings", "val_share", "message"),
    [
        ({"method": "temperature"}, 0.0, "data.val_share is 0, and calibration is fitted on the validation part"),
        ({"method": "isotonic"}, 0.3, "calibration.method is isotonic: it is for two classes and these are 10"),
        ({"method": "temperature", "prior": "uniform"}, 0.3, "prior is 'uniform': give training, balanced"),
        ({"method": "temperature", "prior": [0.5, 0.5]}, 0.3, "give a share above 0 for each class"),
    ],
)
def test_what_cannot_work_is_refused_before_the_training(settings, val_share, message, tmp_path):
    with pytest.raises(SettingError, match=message):
        trained(tmp_path, Calibration(**settings), classifier(), DigitsLTDataModule(ratio=10, val_share=val_share))


def test_a_detector_without_logits_and_an_unknown_method(imbsam):
    config = anomaly("devnet", "sgd")
    for settings, message in (
        (["--calibration.method=temperature"], "a detector's scores are no logits: set it to isotonic"),
        (["--calibration.method=isotonic", "--calibration.prior=training"], "calibration.prior is training"),
        (["--calibration.method=platt"], "calibration"),
    ):
        code, _, err = imbsam("fit", *config, *settings)
        assert code == 2
        assert message in err
        assert len([line for line in err.splitlines() if line.startswith("imbsam: error")]) == 1


def test_another_method_than_the_checkpoints_is_refused_and_an_early_checkpoint_warns(tmp_path):
    data, model = digits(), classifier()
    trained(tmp_path, Calibration("temperature"), model, data, epochs=1)
    early = torch.load(tmp_path / "last.ckpt", weights_only=True)
    early["callbacks"]["Calibration"]["fitted"] = None
    torch.save(early, tmp_path / "best.ckpt")

    def test_with(calibration, name):
        Trainer(callbacks=[calibration], **QUIET).test(classifier(), digits(), tmp_path / name, verbose=False)

    test_with(Calibration("temperature"), "last.ckpt")
    with pytest.raises(SettingError, match=r"calibration.method is vector, and the checkpoint has .*temperature"):
        test_with(Calibration("vector"), "last.ckpt")
    with pytest.warns(UserWarning, match="no calibration: this checkpoint was written before the training ended"):
        test_with(Calibration(), "best.ckpt")
