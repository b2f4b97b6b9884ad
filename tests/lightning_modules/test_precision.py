"""Precision: fp16 with a GradScaler that skips steps, bf16 autocast, and weights in bf16."""

import csv
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy

from datamodules import DigitsLTDataModule
from imbsam import ImbSAM, SettingError
from lightning_modules import LongTailedClassifier
from lightning_modules.backbones import SmallCNN


def fit(tmp_path: Path, model_settings: dict[str, Any] | None = None, **settings: Any) -> LongTailedClassifier:
    seed_everything(0)
    model = LongTailedClassifier(
        backbone=partial(SmallCNN, width=8),
        many=50,
        few=10,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        **(model_settings or {}),
    )
    run = Trainer(
        **{
            "accelerator": "cpu",
            "logger": CSVLogger(tmp_path, version=0),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "log_every_n_steps": 1,
            **settings,
        }
    )
    data = DigitsLTDataModule()
    run.fit(model, datamodule=data)
    run.test(model, datamodule=data, verbose=False)
    return model


def logged(tmp_path: Path, name: str) -> list[float]:
    with (tmp_path / "lightning_logs/version_0/metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def scaled(init_scale: float) -> MixedPrecision:
    """On the CPU, Lightning's own 16-mixed is bf16 without a scaler."""
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=init_scale))


def weights(model: LongTailedClassifier) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in model.backbone.parameters()])


def test_overflows_are_skipped_and_logged_and_training_continues(tmp_path):
    model = fit(tmp_path / "16", plugins=[scaled(2.0**40)], max_epochs=24)
    whole = fit(tmp_path / "32", max_epochs=24)
    skipped, scale = logged(tmp_path / "16", "train/skipped_steps"), logged(tmp_path / "16", "train/loss_scale")
    assert skipped[0] == 11  # every step of the first epoch overflows
    assert skipped[-1] == 0
    assert sum(skipped) == 40 - torch.tensor(scale[-1]).log2()
    assert torch.isfinite(weights(model)).all()
    accuracy, wanted = (logged(tmp_path / run, "test/all")[-1] for run in ("16", "32"))
    assert accuracy == pytest.approx(wanted, abs=0.1)
    assert wanted > 0.4
    assert torch.isfinite(weights(whole)).all()


def test_without_a_scaler_no_scale_is_logged(tmp_path):
    fit(tmp_path, max_epochs=1)
    assert "train/loss_scale" not in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_perturbation_reaches_the_low_precision_passes(tmp_path, precision):
    """Autocast keeps casts of the weights: were they those of w, ImbSAM would be SGD."""
    low: dict[str, Any] = {"precision": "bf16-mixed"} if precision == "bf16-mixed" else {"plugins": [scaled(2.0**10)]}
    change = {}
    for name, settings in (("low", low), ("32", {})):
        runs = [
            weights(fit(tmp_path / name / str(rho), {"sam": partial(ImbSAM, rho=rho)}, max_epochs=1, **settings))
            for rho in (0.001, 0.5)
        ]
        change[name] = runs[1] - runs[0]
    assert torch.cosine_similarity(change["low"], change["32"], dim=0) > 0.8


def test_bf16_weights_warn_and_log_the_perturbed_fraction(tmp_path):
    with pytest.warns(UserWarning, match="precision is bf16-true.*moves only some of them"):
        fit(tmp_path / "small", {"sam": partial(ImbSAM, rho=0.05)}, precision="bf16-true", max_epochs=1)
    with pytest.warns(UserWarning, match="precision is bf16-true"):
        fit(tmp_path / "large", {"sam": partial(ImbSAM, rho=5.0)}, precision="bf16-true", max_epochs=1)
    small, large = (max(logged(tmp_path / size, "train/perturbed_fraction")) for size in ("small", "large"))
    assert 0 < small < large < 1


def test_communication_hook_is_refused(tmp_path):
    strategy = DDPStrategy(ddp_comm_hook=lambda state, bucket: None)
    try:
        with pytest.raises(SettingError, match="the strategy has a ddp_comm_hook"):
            fit(tmp_path, strategy=strategy, devices=1, max_epochs=1)
    finally:
        torch.distributed.destroy_process_group()
