"""The loss at w + e, by rho, of a checkpoint."""

import sys
from pathlib import Path

import pytest
import torch

from datamodules import DigitsLTDataModule
from imbsam import SAM, ImbSAM
from lightning_modules import LongTailedClassifier
from lightning_modules.backbones import SmallCNN
from lightning_modules.cli.run import main
from tests.pieces import configs

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import perturbed_loss


@pytest.mark.parametrize("method", ["sam", "imbsam"])
def test_a_small_rho_raises_the_loss_by_its_gradient_along_e(method):
    torch.manual_seed(0)
    module = LongTailedClassifier(SmallCNN)
    data = DigitsLTDataModule()
    data.setup("fit")
    module._learn_classes(data.class_counts, data.class_names)
    module.backbone = SmallCNN(10).double()
    x, y = next(iter(data.train_dataloader()))[:2]
    x = x.double()
    tail = data.class_counts < 20
    rows = tail[y] if method == "imbsam" else torch.ones_like(y, dtype=torch.bool)
    params = list(module.backbone.parameters())
    losses = module.loss(module(x), y)
    g = torch.autograd.grad(losses[rows].mean(), params, retain_graph=True)
    g_tail = torch.autograd.grad(losses[tail[y]].mean(), params)
    norm = torch.sqrt(sum((t**2).sum() for t in g))
    slope = sum((a * b).sum() for a, b in zip(g, g_tail, strict=True)) / norm

    rho = 1e-6
    sam = SAM(module.backbone, rho=rho) if method == "sam" else ImbSAM(module.backbone, data.class_counts, rho=rho)
    _, at_w_plus_e = perturbed_loss.loss_after_ascent(module, sam, x, y, tail)
    assert float(at_w_plus_e - losses[tail[y]].mean()) == pytest.approx(float(rho * slope), rel=1e-3)
    assert all(p.grad is None for p in params)


def test_the_table_of_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pieces = configs("data/digits_lt", "method/sgd")
    monkeypatch.setattr(sys, "argv", ["imbsam", "fit", *pieces, "--trainer.max_epochs=1", "--trainer.logger.name=run"])
    main()
    checkpoint = tmp_path / "logs/run/version_0/checkpoints/last.ckpt"
    lines = perturbed_loss.table(checkpoint, [1e-6, 0.3], batches=3, eta=20).splitlines()
    assert lines[0] == "| rho | all, SAM | tail, SAM | tail, ImbSAM |"
    (_, *at_w), (_, *far) = ([float(cell) for cell in line.strip("| ").split("|")] for line in lines[2:])
    assert at_w[1] == at_w[2]
    assert all(f > w for f, w in zip(far, at_w, strict=True))
