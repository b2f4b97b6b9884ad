"""AnomalyDetector through the command line, and the gradient that it trains with."""

import os
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from sklearn.metrics import average_precision_score

from datamodules import AnomalyDataModule
from imbsam import ImbSAM, Plain, SettingError
from imbsam.anomaly_metrics import AnomalyMetrics
from lightning_modules.anomaly import AnomalyDetector
from lightning_modules.detectors import FEAWAD, Boosting, DeepSAD, DevNet, PReNet, WeightedClassifier
from lightning_modules.resuming.csv_logger import ResumableCSVLogger
from lightning_modules.resuming.resumable_checkpoint import ResumableCheckpoint
from tests.pieces import anomaly
from tests.training import csv_rows

SHARED = Path(os.environ.get("IMBSAM_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
SHORT = ["--trainer.max_epochs=2", "--data.batches_per_epoch=3"]
SHORT += ["--trainer.enable_model_summary=false"]


@pytest.mark.parametrize(("name", "detector"), [("deep_sad", "DeepSAD"), ("prenet", "PReNet")])
def test_fit_test_predict(name, detector, imbsam, tmp_path):
    """Both keep something of the training samples: a centre, references."""
    config = [*anomaly(name, "imbsam"), *SHORT]
    schedule = ["--trainer.callbacks+=RhoSchedule", "--trainer.callbacks.end=0.1"]
    code, out, _ = imbsam("fit", *config, "--model.sam.rho=0.05", *schedule)
    assert code == 0
    for text in ("AUROC", "average", "F1", detector, "ImbSAM", "checkpoint: logs/anomaly_table/"):
        assert text in out
    run = tmp_path / f"logs/anomaly_table/{name}_imbsam/version_0"
    logged = next(row for row in csv_rows(run / "metrics.csv") if row.get("test/auroc"))
    assert [float(row["rho"]) for row in csv_rows(run / "metrics.csv") if row["rho"]] == pytest.approx([0.05, 0.1])
    last = run / "checkpoints/last.ckpt"

    code, out, _ = imbsam("test", *config, "--ckpt_path", last)
    assert code == 0
    assert f"{100 * float(logged['test/auroc']):.1f}" in out
    assert f"{100 * float(logged['test/f1']):.1f}" in out, "the threshold comes from the checkpoint"

    code, out, _ = imbsam("predict", *config, "--ckpt_path", last, "--predictions.path", "scores.csv")
    assert code == 0
    found = csv_rows("scores.csv")
    assert len(found) == 1797
    assert set(found[0]) == {"row", "score", "alarm"}
    assert (found[0]["row"], found[-1]["row"]) == ("1", "1797")
    alarms = [float(row["score"]) for row in found if row["alarm"] == "1"]
    rest = [float(row["score"]) for row in found if row["alarm"] == "0"]
    assert alarms
    assert not rest or min(alarms) >= max(rest)


def test_the_config_trains_until_the_table_is_learned(imbsam, tmp_path):
    """ADBench's annthyroid, all labelled, at most 2,000 steps; 54 with 500 steps on numbers from 0 to 1."""
    path = SHARED / "adbench/Classical/2_annthyroid.npz"
    if not path.is_file():
        pytest.skip(f"no {path}; set IMBSAM_DATA to the folder that holds adbench")
    settings = [f"--data.path={path}", "--data.labelled_share=1", "--trainer.max_epochs=40"]
    code, _, _ = imbsam("fit", *anomaly("classifier", "sgd"), *settings)
    assert code == 0
    logged = csv_rows(tmp_path / "logs/anomaly_table/classifier_sgd/version_0/metrics.csv")
    assert next(float(row["test/average_precision"]) for row in logged if row.get("test/average_precision")) > 0.75


@pytest.mark.processes
def test_two_processes_are_refused_in_an_evaluation_too(run_imbsam, tmp_path):
    """The precision of the threshold would be that of the samples of rank 0."""
    config = [*anomaly("devnet", "sgd"), *SHORT, "--trainer.accelerator=cpu"]
    assert run_imbsam(tmp_path, "fit", *config)["codes"] == [0]
    more = ["--ckpt_path=last", "--trainer.devices=2", "--trainer.strategy=ddp"]
    answer = run_imbsam(tmp_path, "test", *config, *more, processes=2, alone=True)
    assert answer["codes"] == [2, 2]
    assert "trainer.devices makes 2 processes" in answer["err"][0]


def test_without_validation_there_is_no_threshold(imbsam, tmp_path):
    config = [*anomaly("devnet", "sgd"), *SHORT, "--data.val_share=0"]
    code, out, _ = imbsam("fit", *config)
    assert code == 0
    assert "F1" not in out
    last = tmp_path / "logs/anomaly_table/devnet_sgd/version_0/checkpoints/last.ckpt"
    assert imbsam("predict", *config, "--ckpt_path", last, "--predictions.path", "scores.csv")[0] == 0
    assert set(csv_rows("scores.csv")[0]) == {"row", "score"}


@pytest.mark.parametrize(
    ("detector", "settings", "message"),
    [
        ("devnet", ["--data.sampling=pairs"], "data.sampling is pairs, which DevNet cannot use"),
        ("prenet", ["--data.sampling=natural"], "set it to pairs or natural_pairs"),
        ("devnet", ["--model.detector=DevNett"], "did you mean DevNet"),
        ("devnet", ["--model.budget=2.5"], "budget is 2.5"),
        ("devnet", ["--trainer.callbacks+=RhoSchedule", "--trainer.callbacks.start_epoch=-1"], "start_epoch is -1"),
    ],
)
def test_wrong_setting_is_one_line(detector, settings, message, imbsam):
    code, _, err = imbsam("fit", *anomaly(detector, "sgd"), *SHORT, *settings)
    assert code == 2
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("imbsam: error")]) == 1


def attached(detector, method, rho, **settings):
    """A detector as if Lightning had set it up, without the loop of a Trainer, and its training samples."""
    torch.manual_seed(0)
    x, labels = torch.rand(60, 5, dtype=torch.float64), (torch.arange(60) < 8).long()
    module = AnomalyDetector(detector, sam=partial(ImbSAM, rho=rho, **settings))
    module.class_counts, module.input_shape = labels.bincount(), (5,)
    module.configure_model()
    module.detector.prepare(x.float(), labels)
    module.double()
    module._trainer = SimpleNamespace(strategy=None, world_size=1)
    engine = module.sam_factory(module.detector, module.class_counts, tail_classes=[1])
    return module, engine, x, labels


@pytest.mark.parametrize("detector", [DevNet, DeepSAD, PReNet, FEAWAD, WeightedClassifier])
@pytest.mark.parametrize("tail_weight", [1.0, 2.0])
def test_gradient_is_that_of_the_objective(detector, tail_weight, monkeypatch):
    """1/B * sum_i a_i [(1 - c_i) l_i(w) + c_i l_i(w + e)], c_i = 1 for anomalies and for pairs with one in them."""
    module, engine, x, labels = attached(detector, "imbsam", 0.3, tail_weight=tail_weight)
    chosen = torch.randint(60, (24, 2)) if module.detector.uses_pairs else torch.randint(60, (24,))
    flat = chosen.reshape(24, -1)
    flat[:3, 0], flat[3:6, -1] = torch.arange(3), torch.arange(3, 6)
    batch = x[chosen], labels[chosen]
    sharp = (labels[flat].sum(dim=1) > 0).double()
    assert 0 < sharp.sum() < 24

    module.sam, module._loss = engine, torch.zeros(())
    monkeypatch.setattr(module, "step_optimizer", lambda: None)
    monkeypatch.setattr(module, "manual_backward", lambda loss, **kwargs: loss.backward(**kwargs))
    module.training_step(batch, 0)
    found = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in module.detector.parameters()]

    params = list(module.detector.parameters())
    weight = 1 + (tail_weight - 1) * sharp

    def gradient(factor):
        loss = (factor * weight * module.detector.losses(*batch)).sum() / 24
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]

    head, direction = gradient(1 - sharp), gradient(sharp)
    length = sum(g.square().sum() for g in direction).sqrt()
    with torch.no_grad():
        for p, g in zip(params, direction, strict=True):
            p += 0.3 * g / length
    expected = [a + b for a, b in zip(head, gradient(sharp), strict=True)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "early"),
    [({}, False), ({}, True), ({"check_val_every_n_epoch": 50}, False), ({"val_check_interval": 0.5}, False)],
)
def test_the_threshold_is_that_of_the_final_weights(settings, early, tmp_path):
    """Neither the sanity check's nor that of a mid-training validation; and it is in the last checkpoint."""
    data = AnomalyDataModule(sampling="balanced", batch_size=64, batches_per_epoch=4, val_share=0.3)
    module = AnomalyDetector(DevNet, sam=Plain)
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        callbacks=[
            *([EarlyStopping("train/loss", stopping_threshold=1e9)] if early else []),
            ResumableCheckpoint(dirpath=tmp_path, every_seconds=1e9),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, datamodule=data)
    expected = AnomalyMetrics()
    with torch.no_grad():
        for x, labels in data.val_dataloader()[0]:
            expected.update(module(x), labels)
    assert module.threshold == expected.best_threshold()
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]["threshold"] == module.threshold
    assert not module.val_metrics.scores
    assert trainer.current_epoch == (1 if early else 3)


@pytest.mark.parametrize(("detector", "sampling"), [(DevNet, "balanced"), (DeepSAD, "natural"), (PReNet, "pairs")])
def test_the_validation_loss_is_the_objective_on_the_known_labels(detector, sampling):
    data = AnomalyDataModule(sampling=sampling, val_share=0.3, eval_batch_size=70)
    module = AnomalyDetector(detector, sam=partial(Plain, tail_weight=3.0))
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module, datamodule=data)
    found = trainer.validate(module, datamodule=data, verbose=False)[0]
    scored, drawn = data.val_dataloader()
    with torch.no_grad():
        x, labels = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        weight = torch.where((labels.reshape(len(labels), -1) == 1).any(dim=1), 3.0, 1.0)
        assert found["val/loss"] == pytest.approx(float((weight * module.detector.losses(x, labels)).mean()), rel=1e-5)
        x, labels = (torch.cat(parts) for parts in zip(*scored, strict=True))
        expected = average_precision_score(labels, module(x))
    assert found["val/average_precision"] == pytest.approx(expected, rel=1e-5), "by the true labels"


@pytest.mark.parametrize(
    ("detector", "sampling"),
    [(DevNet, "balanced"), (DevNet, "natural"), (PReNet, "pairs"), (partial(Boosting, trees=11), "natural")],
)
def test_stopped_mid_epoch_and_resumed_it_ends_bit_identically(detector, sampling, tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, 1):
                raise RuntimeError("killed")

    def fit(folder, callbacks=(), resume=False):
        seed_everything(3)
        trainer = Trainer(
            max_epochs=3,
            accelerator="cpu",
            logger=ResumableCSVLogger(folder, version=0, resume=resume),
            callbacks=[*callbacks, ResumableCheckpoint(every_seconds=0)],
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = AnomalyDataModule(sampling=sampling, batch_size=128, batches_per_epoch=4, val_share=0.3)
        path = folder / "version_0/checkpoints/last.ckpt" if resume else None
        sam = Plain if isinstance(detector, partial) else partial(ImbSAM, rho=0.2)
        trainer.fit(AnomalyDetector(detector, sam=sam), datamodule=data, ckpt_path=path)

    fit(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "stopped", [Stop()])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the training data do not come from")
        fit(tmp_path / "stopped", resume=True)
    found, wanted = (
        torch.load(tmp_path / name / "version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("stopped", "whole")
    )
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    logs = [(tmp_path / name / "version_0/metrics.csv").read_text() for name in ("stopped", "whole")]
    assert logs[0] == logs[1]


def test_own_detector_and_wrong_shape():
    class Norm(DevNet):
        """The user's own."""

    module, *_ = attached(Norm, "sgd", 0.0)
    assert isinstance(module.detector, Norm)
    checkpoint = {"input_shape": (7,), "class_counts": torch.tensor([9, 1])}
    with pytest.raises(SettingError, match="shape \\(7,\\)"):
        module.on_load_checkpoint(checkpoint)
