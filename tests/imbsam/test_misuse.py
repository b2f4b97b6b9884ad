"""Calls that cannot work end in one line that names the fix; unusual ones that can work do."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from imbsam import CCSAM, GSAM, SAM, ClassAwareSAM, FocalSAM, ImbSAM, Plain, SettingError

COUNTS = [200, 60, 15, 4]
Y = torch.tensor(([0] * 5 + [1] * 3 + [2] * 2 + [3] * 2) * 2)
X = torch.randn(len(Y), 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def losses_of(model: nn.Module, x: Tensor = X, y: Tensor = Y) -> Callable[[Tensor], Tensor]:
    return lambda rows: F.cross_entropy(model(x[rows]), y[rows], reduction="none")


def grads(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ImbSAM(net().parameters(), COUNTS), "module is a generator: give the model itself"),
        (lambda: ImbSAM(list(net().parameters()), COUNTS), "module is a list: give the model itself"),
        (lambda: SAM(net(), 0.05), r"class_counts has shape \(\)"),
        (lambda: SAM(net(), rho="0.05"), "rho is '0.05': give a finite number"),
        (
            lambda: ImbSAM(net(), COUNTS, tail_classes=2),
            r"tail_classes is 2: give a list of class indices, as in \[2\]",
        ),
        (
            lambda: ImbSAM(net(), COUNTS, tail_classes=torch.tensor([True, False])),
            r"tail_classes is a mask of shape \(2,\)",
        ),
        (lambda: ImbSAM(net(), COUNTS, tail_classes=[False, True]), "tail_classes holds False: give class indices"),
        (lambda: Plain(net(), tail_weight=2.0), "tail_weight is 2.0 but class_counts is None"),
        (lambda: ClassAwareSAM(net(), sharpness_weight="all"), "sharpness_weight is 'all': give one number"),
    ],
)
def test_constructor(build, message):
    with pytest.raises(SettingError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


def copied_losses(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return losses_of(copy.deepcopy(model))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda sam, m: sam.backward((losses_of(m), Y)), r"losses is a tuple: .* or a list of \(losses, targets\)"),
        (lambda sam, m: sam.backward(copied_losses(m), Y), "no parameter of module got a gradient"),
        (
            lambda sam, m: sam.backward(losses_of(m), torch.eye(4)[Y] + torch.eye(4)[3]),
            r"row that sums to 2: .*targets.long\(\)",
        ),
        (lambda sam, m: sam.backward(losses_of(m), "labels"), "targets is a str, which is not a tensor"),
    ],
)
def test_call(call, message):
    model = net()
    sam = ImbSAM(model, COUNTS)
    with pytest.raises(SettingError, match=message) as caught:
        call(sam, model)
    assert "\n" not in str(caught.value)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mask", [torch.tensor([False, False, True, True]), np.array([False, False, True, True])])
def test_tail_classes_as_a_mask(mask):
    assert ImbSAM(net(), COUNTS, tail_classes=mask).sharpness_weight.tolist() == [0, 0, 1, 1]


def test_lists_and_arrays_as_targets():
    found = []
    for targets in (Y, Y.tolist(), Y.numpy()):
        model = net()
        ImbSAM(model, COUNTS).backward(losses_of(model), targets)
        found.append(grads(model))
    model = net()
    ImbSAM(model, COUNTS).backward(losses_of(model), sharpness_weight=(np.array(COUNTS)[Y] < 20).tolist())
    assert all(torch.equal(found[0], other) for other in [*found[1:], grads(model)])


@pytest.mark.parametrize("hook", [lambda g: g.clamp(-0.01, 0.01), lambda g: None])
def test_hook_on_a_parameters_gradient_is_refused(hook):
    model = net()
    model[0].weight.register_hook(hook)
    with pytest.raises(SettingError, match=r"0\.weight has a hook on its gradient \(register_hook\)"):
        ImbSAM(model, COUNTS).backward(losses_of(model), Y)


def test_cached_parametrizations_are_refused():
    model = net()
    parametrizations.weight_norm(model[0])
    with parametrize.cached(), pytest.raises(SettingError, match=r"parametrize\.cached\(\)"):
        ImbSAM(model, COUNTS).backward(losses_of(model), Y)
    ImbSAM(model, COUNTS).backward(losses_of(model), Y)
    with parametrize.cached():
        model = net()
        ImbSAM(model, COUNTS).backward(losses_of(model), Y)  # nothing is parametrized


@pytest.mark.parametrize("method", [Plain, SAM, ImbSAM, FocalSAM, GSAM, CCSAM])
def test_gradient_is_added_to_views_of_a_flat_tensor(method):
    model, alone = net(), net()
    flat = torch.ones(sum(p.numel() for p in model.parameters()))
    views = [
        v.view_as(p)
        for v, p in zip(flat.split([p.numel() for p in model.parameters()]), model.parameters(), strict=True)
    ]
    for p, view in zip(model.parameters(), views, strict=True):
        p.grad = view
    method(model, COUNTS).backward(losses_of(model), Y)
    method(alone, COUNTS).backward(losses_of(alone), Y)
    assert all(p.grad is view for p, view in zip(model.parameters(), views, strict=True))
    torch.testing.assert_close(flat, 1 + grads(alone), rtol=0, atol=1e-7)


def test_default_device_other_than_the_models():
    models = [net(), net()]
    for model, device in zip(
        models, ("cpu", "meta"), strict=True
    ):  # meta: whatever lands there by mistake has no values
        torch.set_default_device(device)
        try:
            ImbSAM(model, COUNTS, tail_weight=2.0, context_rows=4).backward(losses_of(model), Y)
            FocalSAM(model, torch.tensor(COUNTS, device="cpu")).backward(losses_of(model), Y)
            CCSAM(model, COUNTS).backward(losses_of(model), Y)
            CCSAM(model, COUNTS).backward(
                losses_of(model), F.one_hot(torch.tensor(Y.tolist(), device="cpu"), 4).float()
            )
        finally:
            torch.set_default_device(None)
    assert torch.equal(grads(models[0]), grads(models[1]))


class Phases(nn.Module):
    """Complex and real weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 8, dtype=torch.complex128)
        self.head = nn.Linear(8, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x.to(torch.complex128)).abs())


def test_complex_and_real_parameters_together():
    torch.manual_seed(0)
    model = Phases()
    before = [p.detach().clone() for p in model.parameters()]
    moved = []
    losses = losses_of(model, X.double())

    def watching(rows: Tensor) -> Tensor:
        steps = [(p.detach() - b).abs().square().sum() for p, b in zip(model.parameters(), before, strict=True)]
        moved.append(float(sum(steps).sqrt()))
        return losses(rows)

    SAM(model, rho=0.3).backward(watching, Y)
    assert moved == [0, pytest.approx(0.3)]
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
