"""With most parameters frozen a step neither writes nor copies them, and costs no memory for them."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from imbsam import CCSAM, GSAM, SAM, SSESAM, FocalSAM, ImbSAM, SettingError

COUNTS = [40, 20, 4]
METHODS = {
    "SAM": SAM,
    "ImbSAM": ImbSAM,
    "FocalSAM": lambda *args, **kw: FocalSAM(*args, focal_lambda=0.8, focal_gamma=2.0, **kw),
    "GSAM": GSAM,
    "CCSAM": CCSAM,
    "SSESAM": lambda *args, **kw: SSESAM(*args, eta=20, **kw),
}
WIDTH = 64


def network():
    """A frozen trunk of 4,096 weights a layer, trained norm and classifier."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3)
    )
    for index in (0, 3):
        net[index].requires_grad_(False)
    return net


def step(sam, net, rows=16):
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1))
    y = torch.arange(rows) % 3
    sam.backward(lambda r: F.cross_entropy(net(x[r]), y[r], reduction="none"), y)


class LargeResults(TorchDispatchMode):
    """The operations that make or change a tensor of a frozen matrix's shape."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.shape == (WIDTH, WIDTH):
                self.found.append(function.name())
        return out


@pytest.mark.parametrize("perturb", ["all", "norm", "classifier"])
@pytest.mark.parametrize("method", METHODS)
def test_frozen_weights_are_neither_written_nor_copied(method, perturb):
    net = network()
    sam = METHODS[method](net, COUNTS, rho=0.5, perturb=perturb)
    frozen = [p for p in net.parameters() if not p.requires_grad]
    versions, before = [p._version for p in frozen], [p.clone() for p in frozen]
    with LargeResults() as large:
        step(sam, net)
    assert [p._version for p in frozen] == versions
    assert all(map(torch.equal, frozen, before))
    assert all(p.grad is None for p in frozen)
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    assert set(large.found) <= {"aten::t", "aten::detach"}  # views of it


@pytest.mark.parametrize("perturb", ["all", "norm", "classifier"])
def test_the_gradient_is_that_of_a_perturbation_of_the_trained_part(perturb):
    """SAM's formula by hand: e lies in the perturbed ones among the trained parameters."""
    net, other = network(), network()
    step(SAM(net, COUNTS, rho=0.5, perturb=perturb), net)
    x, y = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3
    trained = [p for p in other.parameters() if p.requires_grad]
    chosen = {"all": trained, "norm": list(other[1].parameters()), "classifier": list(other[5].parameters())}[perturb]
    g = torch.autograd.grad(F.cross_entropy(other(x), y), chosen)
    norm = torch.stack([part.norm() for part in g]).norm()
    with torch.no_grad():
        for p, part in zip(chosen, g, strict=True):
            p.add_(0.5 * part / norm)
    wanted = torch.autograd.grad(F.cross_entropy(other(x), y), trained)
    for p, part in zip((p for p in net.parameters() if p.requires_grad), wanted, strict=True):
        torch.testing.assert_close(p.grad, part)


def test_a_norm_that_is_frozen_cannot_be_perturbed():
    net = network()
    net[1].requires_grad_(False)
    with pytest.raises(SettingError, match="perturb is 'norm' and module has no normalisation layer with a trained"):
        step(SAM(net, COUNTS, perturb="norm"), net)


@pytest.mark.parametrize("sam", [SAM, ImbSAM])
def test_masks_are_the_same_with_activation_checkpoints(sam):
    """Dropout in checkpointed blocks: g_s(w), g_s(w + e) and both recomputations draw one mask."""
    gradients = []
    for use in (False, True):
        torch.manual_seed(0)
        blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5)) for _ in range(3))
        net = nn.Sequential(*blocks, nn.Linear(8, 3))
        if use:
            for block in blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        x, y = torch.randn(12, 8), torch.arange(12) % 3
        torch.manual_seed(1)
        for context_rows in (0, "batch"):
            method = sam(net, COUNTS, rho=0.5, context_rows=context_rows)
            method.backward(lambda r, net=net, x=x, y=y: F.cross_entropy(net(x[r]), y[r], reduction="none"), y)
        gradients.append([p.grad for p in net.parameters()] + [torch.rand(3)])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)
