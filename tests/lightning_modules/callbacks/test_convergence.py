"""The line on whether the training loss was still falling."""

import csv
import random

import pytest
import torch

from lightning_modules.callbacks.convergence import loss_trend
from tests.pieces import anomaly

DIGITS = ["--config", "configs/data/digits_lt.yaml", "--trainer.enable_model_summary=false"]


def test_a_steady_fall_is_found_at_any_scale_and_a_plateau_is_not():
    for scale in (1e-3, 1.0, 1e4):
        assert loss_trend([scale * 0.99**epoch for epoch in range(100)]).falling
        assert not loss_trend([scale * (1 + 0.5**epoch) for epoch in range(100)]).falling
        assert not loss_trend([scale * (2 - 0.5**epoch) for epoch in range(100)]).falling  # rising


def test_noise_is_no_trend():
    draw = random.Random(0)
    falling = [loss_trend([1 + draw.gauss(0, 0.3) for _ in range(100)]).falling for _ in range(200)]
    assert sum(falling) < 20  # one-sided, two standard errors: 2 to 3 %
    noisy = [loss_trend([2 - 0.01 * epoch + draw.gauss(0, 0.03) for epoch in range(100)]).falling for _ in range(200)]
    assert sum(noisy) > 180


def test_nothing_is_said_of_one_epoch_or_of_nan():
    assert loss_trend([1.0]) is None
    assert loss_trend([1.0, float("nan")]) is None
    assert loss_trend([0.0, 0.0]).falling is False


@pytest.mark.parametrize("bar", [True, False])
def test_the_line_is_of_the_logged_losses_over_an_interruption_too(imbsam, tmp_path, bar):
    run = tmp_path / "logs/digits_lt/imbsam/version_0"
    arguments = [*DIGITS, "--model.lr_scheduler.init_args.T_max=4", f"--trainer.enable_progress_bar={str(bar).lower()}"]
    _, first, _ = imbsam("fit", *arguments, "--trainer.max_epochs=2")
    code, out, _ = imbsam("fit", *arguments, "--trainer.max_epochs=4", "--ckpt_path", run / "checkpoints/last.ckpt")
    with (run / "metrics.csv").open(newline="") as file:
        losses = [float(row["train/loss_epoch"]) for row in csv.DictReader(file) if row["train/loss_epoch"]]
    assert len(losses) == 4
    assert code == 0
    assert loss_trend(losses).text in out
    assert ["training samples of 10 classes" in text for text in (first, out)] == [
        True,
        False,
    ]
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["callbacks"]["Convergence"]["losses"] == pytest.approx(losses)


def test_detectors_have_the_line_too(imbsam):
    code, out, _ = imbsam("fit", *anomaly("devnet", "imbsam"), "--trainer.max_epochs=3")
    assert code == 0
    assert "training loss: " in out
