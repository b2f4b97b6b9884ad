"""Buffers and generators: what the extra passes see, and their state after a step."""

import copy
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from imbsam import SAM, SSESAM, FocalSAM, ImbSAM, SettingError, reference
from imbsam.extra_passes import AUTO_CONTEXT_ROWS
from imbsam.snapshot import RandomState

COUNTS = [200, 60, 15, 4]
Y = torch.tensor(([0] * 5 + [1] * 3 + [2] * 2 + [3] * 2) * 4)
METHODS = {
    "sam": lambda m: SAM(m, rho=0.5),
    "imbsam": lambda m: ImbSAM(m, COUNTS, rho=0.5, context_rows=0),
    "imbsam batch": lambda m: ImbSAM(m, COUNTS, rho=0.5, context_rows="batch"),
    "focal_sam": lambda m: FocalSAM(m, COUNTS, rho=0.5),
    "sse_sam batch": lambda m: SSESAM(m, COUNTS, eta=20, rho=0.5, head_rho=0.2, context_rows="batch"),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def losses_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda rows: F.cross_entropy(model(x[rows]), Y[rows], reduction="none")


class RunningScale(nn.Module):
    """Divides by a running mean that its own forward has just updated, even in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.mul_(0.5).add_(0.5 * float(x.detach().abs().mean()))  # the same for all rows
        return x / self.scale


@pytest.mark.parametrize("method", ["sam", "imbsam batch", "focal_sam", "sse_sam batch"])
@pytest.mark.parametrize("layer", ["running scale", "spectral norm"])
def test_passes_at_w_and_at_w_plus_e_start_from_the_same_buffers(method, layer):
    middle = RunningScale() if layer == "running scale" else parametrizations.spectral_norm(nn.Linear(8, 8))
    model = nn.Sequential(nn.Linear(6, 8), middle, nn.Tanh(), nn.Linear(8, 4)).double()
    x = torch.randn(len(Y), 6, dtype=torch.float64)
    sam, net = METHODS[method](model), copy.deepcopy(model)
    entry = copy.deepcopy(net.state_dict())

    def losses() -> Tensor:
        net_state = {name: buffer for name, buffer in entry.items() if name in dict(net.named_buffers())}
        net.load_state_dict(net_state, strict=False)
        return losses_of(net, x)(torch.arange(len(Y)))

    c, rho = sam.sharpness_weight.expand(4)[Y], 0.5
    if isinstance(sam, SSESAM):
        c, rho = torch.stack([(sam.partition[Y] == group).double() for group in (0, 1)]), [0.2, 0.5]
    reference.backward(losses, list(net.parameters()), c, rho=rho)
    sam.backward(losses_of(model, x), Y)
    for p, q in zip(model.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-12)


class LayerDrop(nn.Module):
    """Skips layers at random by Python's or NumPy's generator, as LayerDrop does."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(8))
        self.draw = draw
        self.drawn: list[list[bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        kept = [self.draw() < 0.5 for _ in self.layers]
        self.drawn.append(kept)
        for layer, keep in zip(self.layers, kept, strict=True):
            x = torch.tanh(layer(x)) if keep else x
        return x


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("draw", [random.random, np.random.random], ids=["python", "numpy"])
def test_python_and_numpy_draw_the_same_at_w_and_at_w_plus_e(method, draw):
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002  the global one is what layers use
    drop = LayerDrop(draw)
    model = nn.Sequential(nn.Linear(6, 8), drop, nn.Linear(8, 4))
    METHODS[method](model).backward(losses_of(model, torch.randn(len(Y), 6)), Y)
    assert drop.drawn[-1] == drop.drawn[-2]  # of the pass that gave g_s(w), and of the one at w + e
    after = draw()
    # one ordinary pass draws once for every layer
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002  the global one is what layers use
    assert [draw() for _ in range(9)][-1] == after


def test_buffers_that_cannot_be_written_are_left_alone():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    with torch.inference_mode():
        table = torch.arange(3.0)
    model.register_buffer("table", table)
    model.register_buffer("expanded", torch.zeros(1).expand(4))
    entry_grad = torch.ones(8, 6)
    model[0].weight.grad = entry_grad
    sam, losses = ImbSAM(model, COUNTS, context_rows=0), losses_of(model, torch.randn(len(Y), 6))
    sam.backward(losses, Y)
    assert model.table is table
    assert model[1].num_batches_tracked == 1
    kept = entry_grad.clone()

    def failing(rows: Tensor) -> Tensor:
        if len(rows) < len(Y):
            raise KeyboardInterrupt
        return losses(rows)

    with pytest.raises(KeyboardInterrupt):
        sam.backward(failing, Y)
    assert model[0].weight.grad is entry_grad
    assert torch.equal(entry_grad, kept)
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize("kind", ["weight_norm", "pruning"])
@pytest.mark.parametrize("method", METHODS)
def test_weights_computed_by_a_hook_are_those_at_w_afterwards(method, kind):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    if kind == "weight_norm":
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(model[0])
    else:
        prune.l1_unstructured(model[0], "weight", 0.3)
    x = torch.randn(len(Y), 6)
    losses_of(model, x)(torch.arange(len(Y)))
    at_w = model[0].weight.detach().clone()
    METHODS[method](model).backward(losses_of(model, x), Y)
    assert torch.equal(model[0].weight, at_w)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.inner, x, use_reentrant=False))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_activation_checkpointing_leaves_the_buffers_of_one_plain_pass(method, micro_batches):
    model, x = Checkpointed(), torch.randn(len(Y), 6)
    plain = copy.deepcopy(model)
    parts = torch.arange(len(Y)).chunk(micro_batches)
    for part in parts:
        losses_of(plain, x)(part).mean().backward()
    offsets = [int(part[0]) for part in parts]
    METHODS[method](model).backward(
        [(lambda rows, o=o: losses_of(model, x)(rows + o), Y[part]) for o, part in zip(offsets, parts, strict=True)]
    )
    assert plain.inner[1].num_batches_tracked == 2 * micro_batches
    for found, wanted in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, wanted)


class HandWritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x - self.running_mean
        mean = x.mean(0)
        self.running_mean.lerp_(mean.detach(), 0.1)
        return x - mean


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["plain", "scripted", "exported", "hand-written", "without running statistics"])
def test_auto_context_detects_any_implementation_of_batch_norm(kind):
    norms = {
        "hand-written": HandWritten(),
        "without running statistics": nn.BatchNorm1d(8, track_running_stats=False),
    }
    model = nn.Sequential(nn.Linear(6, 8), norms.get(kind, nn.BatchNorm1d(8)), nn.Linear(8, 4))
    if kind == "scripted":
        model = torch.jit.script(model)
    elif kind == "exported":
        batch = torch.export.Dim("batch", min=2)
        model = torch.export.export(model, (torch.randn(6, 6),), dynamic_shapes=({0: batch},)).module()
    x, y = torch.randn(96, 6), torch.arange(96) % 24 // 23 * 3  # four tail rows
    passes = []

    def losses(rows: Tensor) -> Tensor:
        passes.append(len(rows))
        return F.cross_entropy(model(x[rows]), y[rows], reduction="none")

    ImbSAM(model, COUNTS).backward(losses, y)
    assert passes == [96] + [4 + AUTO_CONTEXT_ROWS] * 2


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.GroupNorm(2, 2), nn.InstanceNorm1d(2, track_running_stats=True)])
def test_auto_context_is_zero_where_rows_are_independent(norm):
    model = nn.Sequential(nn.Linear(6, 8), nn.Unflatten(1, (2, 4)), norm, nn.Flatten(), nn.Linear(8, 4))
    x, y, passes = torch.randn(96, 6), torch.arange(96) % 24 // 23 * 3, []

    def losses(rows: Tensor) -> Tensor:
        passes.append(len(rows))
        return F.cross_entropy(model(x[rows]), y[rows], reduction="none")

    ImbSAM(model, COUNTS).backward(losses, y)
    assert passes == [96, 4, 4]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("perturb", ["norm", ["inner.1"], "classifier"], ids=str)
@pytest.mark.parametrize("method", [ImbSAM, SAM])
def test_activation_checkpointing_with_some_parameters_perturbed(method, perturb, reentrant):
    """The reentrant kind refuses a gradient of some parameters, or hides them: not perturbed, and nobody notices."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    model = nn.ModuleDict({"stem": nn.LayerNorm(6), "inner": inner, "head": nn.Linear(6, 4)})
    x, y = torch.randn(8, 6), torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])

    def losses(rows, checkpointed=True):
        features = model["stem"](x[rows])
        features = checkpoint(inner, features, use_reentrant=reentrant) if checkpointed else inner(features)
        return F.cross_entropy(model["head"](features), y[rows], reduction="none")

    sam = method(model, [200, 60, 15, 4], rho=0.1, perturb=perturb)
    before = [p.detach().clone() for p in model.parameters()]
    if reentrant and perturb != "classifier":
        with pytest.raises(SettingError, match="activation checkpoints with use_reentrant=True"):
            sam.backward(losses, y)
        assert all(p.grad is None and torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        return
    sam.backward(losses, y)
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    sam.backward(lambda rows: losses(rows, checkpointed=False), y)
    for g, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad, rtol=0, atol=1e-7)


@pytest.fixture
def numpys_generator() -> Iterator[None]:
    generator, state = np.random.get_bit_generator(), np.random.get_state()  # noqa: NPY002
    yield
    np.random.set_bit_generator(generator)
    np.random.set_state(state)  # noqa: NPY002


def draws_again(state: RandomState, draw: Callable[[], float]) -> bool:
    first = draw()
    state.restore()
    return draw() == first


def test_numpys_second_normal_of_a_pair_is_drawn_again(numpys_generator):
    """Drawing it moves no word of the generator: a state with it and one without differ in nothing else."""
    np.random.standard_normal()  # noqa: NPY002
    with_second = np.random.get_state()  # noqa: NPY002
    np.random.standard_normal()  # noqa: NPY002
    RandomState(set())
    np.random.set_state(with_second)  # noqa: NPY002
    assert draws_again(RandomState(set()), np.random.standard_normal)


def test_numpys_generator_may_be_of_another_kind(numpys_generator):
    np.random.set_bit_generator(np.random.PCG64(0))
    state = RandomState(set())
    assert not state.host_moved()
    assert draws_again(state, np.random.random)
    np.random.random()  # noqa: NPY002
    assert state.host_moved()
