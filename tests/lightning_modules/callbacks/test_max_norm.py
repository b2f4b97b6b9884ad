"""MaxNorm: the radius of the published code, and rows that never leave the ball."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from imbsam.errors import SettingError
from lightning_modules import MaxNorm
from lightning_modules.backbones.heads import CosineClassifier
from lightning_modules.callbacks.max_norm import max_norm_


def model(norms, head=None) -> Any:
    head = head or nn.Linear(3, len(norms))
    with torch.no_grad():
        head.weight.copy_(torch.tensor(norms)[:, None] * nn.functional.normalize(torch.randn(len(norms), 3), dim=1))
    backbone = nn.Module()
    backbone.fc = head
    return SimpleNamespace(backbone=backbone)


def test_long_rows_are_cut_to_the_radius_and_short_ones_stay():
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).double()
    before, norms = weight.clone(), weight.norm(dim=1)
    radius = float(norms.median())
    max_norm_(weight, radius)
    torch.testing.assert_close(weight, before * (radius / norms).clamp(max=1)[:, None], rtol=1e-6, atol=0)
    assert torch.equal(weight[norms < radius], before[norms < radius])


def test_the_radius_lies_between_the_shortest_and_the_longest_weight():
    module, callback = model([1.0, 2.0, 6.0]), MaxNorm(threshold=0.1)
    bias = module.backbone.fc.bias.clone()
    callback.on_train_start(None, module)
    assert callback.radius == pytest.approx(1.5, rel=1e-5)
    norms = module.backbone.fc.weight.norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([1.0, 1.5, 1.5]), rtol=1e-5, atol=0)
    with torch.no_grad():
        module.backbone.fc.weight.mul_(3)
    callback.on_train_batch_end(None, module)
    torch.testing.assert_close(module.backbone.fc.weight.norm(dim=1), torch.full((3,), 1.5), rtol=1e-5, atol=0)
    assert torch.equal(module.backbone.fc.bias, bias)


def test_a_resumed_run_keeps_its_radius():
    callback, resumed = MaxNorm(), MaxNorm()
    callback.on_train_start(None, model([1.0, 2.0, 6.0]))
    resumed.load_state_dict(callback.state_dict())
    resumed.on_train_start(None, model([1.0, 1.1, 1.2]))
    assert resumed.radius == callback.radius


def test_bad_settings():
    with pytest.raises(SettingError, match=r"threshold is -0\.1"):
        MaxNorm(-0.1)
    with pytest.raises(SettingError, match="cosine head"):
        MaxNorm().on_train_start(None, model([1.0, 2.0, 6.0], CosineClassifier(3, 3)))
