"""State that a call of `backward` must leave unchanged, even when it is interrupted."""

import contextlib
import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import imbsam
from imbsam import CCSAM, GSAM, SAM, SSESAM, ClassAwareSAM, FocalSAM, ImbSAM
from tests.interrupts import InterruptAtLine, tracing
from tests.no_synchronisation import NoSynchronisation

COUNTS = [200, 60, 15, 4]
BATCH = 24


class Tied(nn.Module):
    """BatchNorm, dropout, a buffer that the forward replaces, tied, frozen and unused parameters."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = norm(6)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.first.weight
        self.head = nn.Linear(6, 4)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        x = F.dropout(F.relu(self.norm(self.first(x))), 0.3, self.training)
        return self.head(self.again(x) + self.frozen(x))


def make(method: str = "") -> tuple[nn.Module, Tensor, Tensor, Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    model = Tied(nn.LayerNorm if method in ROWS_APART else nn.BatchNorm1d)
    x = torch.randn(BATCH, 6)
    y = torch.tensor(([0] * 5 + [1] * 3 + [2] * 2 + [3] * 2) * 2)
    return model, x, y, lambda rows: F.cross_entropy(model(x[rows]), y[rows], reduction="none")


METHODS: dict[str, Callable[[nn.Module], ClassAwareSAM]] = {
    "sam": lambda m: SAM(m),
    "imbsam batch": lambda m: ImbSAM(m, COUNTS, context_rows="batch"),
    "imbsam 4": lambda m: ImbSAM(m, COUNTS, context_rows=4, adaptive=True),
    "focal_sam": lambda m: FocalSAM(m, COUNTS),
    "gsam": lambda m: GSAM(m),
    "cc_sam": lambda m: CCSAM(m, COUNTS),
    "sse_sam 4": lambda m: SSESAM(m, COUNTS, eta=20, context_rows=4, adaptive=True),
    "imbsam norm 4": lambda m: ImbSAM(m, COUNTS, perturb="norm", context_rows=4),
    "imbsam classifier": lambda m: ImbSAM(m, COUNTS, perturb="classifier"),
    "imbsam split": lambda m: ImbSAM(m, COUNTS, first_pass="split"),
}
ROWS_APART = ("imbsam classifier", "imbsam split")
"""Methods whose own kinds of pass there are only where no row sees another: these get LayerNorm."""


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "parameters": [p.detach().clone() for p in model.parameters()],
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "generator": torch.get_rng_state(),
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
    }


def assert_same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_buffers_and_generators_are_as_one_plain_pass_leaves_them(method):
    model, _, y, losses = make(method)
    plain_model, _, _, plain_losses = make(method)
    torch.manual_seed(1)
    plain_losses(torch.arange(BATCH)).mean().backward()
    plain = state(plain_model)

    sam = METHODS[method](model)
    settings = repr(vars(sam))
    torch.manual_seed(1)
    sam.backward(losses, y)

    found = state(model)
    # dropout in two passes draws other numbers than in one
    for part in ("parameters", "buffers", *(["generator"] if method != "imbsam split" else [])):
        assert_same(found[part], plain[part])
    assert getattr(model.norm, "num_batches_tracked", 1) == 1
    assert model.calls == 1
    # nothing is kept: the attributes are the settings
    assert repr(vars(sam)) == settings
    # tied, frozen and unused parameters
    assert model.frozen.weight.grad is None
    assert model.unused.weight.grad is None
    assert model.first.weight.grad is model.again.weight.grad is not None


@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_a_batch_outlives_the_call(method):
    """Not even until the garbage collector runs: it would be the images of a batch and copies of the buffers."""
    model, _, y, losses = make(method)
    seen = weakref.ref(losses)
    gc.collect()
    gc.disable()
    try:
        METHODS[method](model).backward(losses, y)
        del losses
        assert seen() is None
    finally:
        gc.enable()


def test_tied_parameters_are_perturbed_once():
    model, _, y, losses = make()
    model.eval()
    before = [p.detach().clone() for p in model.parameters()]
    moved = []

    def watching(rows):
        moved.append(sum(((p - b) ** 2).sum() for p, b in zip(model.parameters(), before, strict=True)).sqrt().item())
        return losses(rows)

    ImbSAM(model, COUNTS, rho=0.5).backward(watching, y)
    assert moved == [0, 0, pytest.approx(0.5, rel=1e-5)]


@pytest.mark.parametrize("method", METHODS)
def test_gradients_accumulate(method):
    model, _, y, losses = make(method)
    torch.manual_seed(1)
    METHODS[method](model).backward(losses, y)
    alone = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model, _, y, losses = make(method)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    torch.manual_seed(1)
    METHODS[method](model).backward(losses, y)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, alone[name] + 3 if name in alone else torch.full_like(p, 3.0))


@pytest.mark.parametrize("accumulated", [False, True])
def test_batch_without_sharp_rows_is_a_plain_backward(accumulated):
    grads = []
    for own in (False, True):
        model, x, _, _ = make()
        y = torch.zeros(BATCH, dtype=torch.int64)
        if accumulated:
            model.head.weight.grad = torch.ones_like(model.head.weight)
        torch.manual_seed(1)
        passes = []

        def losses(rows, model=model, x=x, y=y, passes=passes):
            passes.append(len(rows))
            return F.cross_entropy(model(x[rows]), y[rows], reduction="none")

        if own:
            ImbSAM(model, COUNTS).backward(losses, y)
            assert passes == [BATCH]
        else:
            losses(torch.arange(BATCH)).mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert_same(grads[0], grads[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("in_pass", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("where", ["losses", "backward"])
def test_exception_in_any_pass_leaves_everything_as_it_was(method, error, in_pass, where):
    model, _, y, losses = make(method)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    head_grad = model.head.weight.grad
    before = state(model)
    calls = {"losses": 0, "backward": 0}

    def count(kind):
        calls[kind] += 1
        if kind == where and calls[kind] == in_pass:
            raise error

    def failing_losses(rows):
        values = losses(rows)
        count("losses")
        return values

    def failing_backward(loss, **kw):
        loss.backward(**kw)
        count("backward")

    with contextlib.suppress(error):
        METHODS[method](model).backward(failing_losses, y, backward=failing_backward)
        assert calls[where] < in_pass, "the exception was swallowed"
        return
    assert_same(state(model), before)
    assert model.head.weight.grad is head_grad


SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("sam", "imbsam batch", "sse_sam 4", "imbsam classifier", "imbsam split")
]


@pytest.mark.parametrize("method", ["imbsam 4", *SLOW])
def test_ctrl_c_at_any_line_leaves_everything_as_it_was(method):
    interrupted = 0
    for n in range(1, 10_000):
        model, _, y, losses = make(method)
        model.head.weight.grad = torch.ones_like(model.head.weight)
        before = state(model)
        sam = METHODS[method](model)
        tracer = InterruptAtLine(n)
        try:
            with tracing(tracer):
                sam.backward(losses, y)
        except KeyboardInterrupt:
            interrupted += 1
            assert_same(state(model), before)
        if tracer.left > 0:
            break
    assert interrupted > 100


@pytest.mark.parametrize("method", ["imbsam 4"])
def test_second_ctrl_c_while_the_first_is_undone(method):
    interrupted = 0
    for n in range(1, 10_000):
        model, _, y, losses = make(method)
        before = state(model)
        calls = []
        tracer = InterruptAtLine(n)

        def failing_losses(rows, losses=losses, calls=calls, tracer=tracer):
            calls.append(rows)
            if len(calls) == 3:
                sys.settrace(tracer)  # sees only the functions that are called from here on
                raise ValueError
            return losses(rows)

        try:
            METHODS[method](model).backward(failing_losses, y)
        except (ValueError, KeyboardInterrupt) as error:
            interrupted += isinstance(error, KeyboardInterrupt)
        finally:
            sys.settrace(None)
        assert_same(state(model), before)
        if tracer.left > 0:
            break
    assert interrupted > 10


@pytest.mark.parametrize(("method", "passes"), [(ImbSAM, 3), (CCSAM, 9)])  # class 3 comes last
def test_non_finite_sharp_gradient_perturbs_nothing_and_reaches_grad(method, passes):
    model, x, y, _ = make()
    model.eval()
    before = [p.detach().clone() for p in model.parameters()]
    at = []

    def losses(rows):
        at.append([p.detach().clone() for p in model.parameters()])
        values = F.cross_entropy(model(x[rows]), y[rows], reduction="none")
        return torch.where(y[rows] == 3, values * torch.inf, values)

    method(model, COUNTS).backward(losses, y)
    assert len(at) == passes
    assert_same(at[-1], before)
    assert not model.head.weight.grad.isfinite().all()


@pytest.mark.parametrize("method", ["imbsam 4", "sse_sam 4", "imbsam classifier", "imbsam split"])
def test_grad_scaler_skips_the_step_after_an_overflow_in_an_extra_pass(method):
    model, x, y, _ = make(method)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = [p.detach().clone() for p in model.parameters()]
    passes = []

    def losses(rows):
        passes.append(len(rows))
        values = F.cross_entropy(model(x[rows]), y[rows], reduction="none")
        return values * torch.inf if len(passes) == 3 else values

    METHODS[method](model).backward(losses, y, backward=lambda loss, **kw: scaler.scale(loss).backward(**kw))
    scaler.step(optimizer)
    scaler.update()
    assert_same([p.detach() for p in model.parameters()], before)
    assert scaler.get_scale() == 512


@pytest.mark.parametrize("method", [ImbSAM, SSESAM])
@pytest.mark.parametrize("context_rows", ["batch", 0])
def test_one_autocast_region_around_everything(context_rows, method):
    """Autocast caches the casts of w; the pass at w + e must not use them (ImbSAM would be SGD)."""
    grads = {}
    for enclosing in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
        x, y = torch.randn(BATCH, 6), make()[2]

        def inner(rows, model=model, x=x, y=y, enclosing=enclosing):
            with torch.autocast("cpu", torch.bfloat16, enabled=True):
                return F.cross_entropy(model(x[rows]).float(), y[rows], reduction="none")

        sam = method(model, COUNTS, eta=20, rho=1.0, context_rows=context_rows)
        with torch.autocast("cpu", torch.bfloat16, enabled=enclosing):
            sam.backward(inner, y)
            # after the return, the casts are of w again
            with torch.no_grad():
                logits = model(x)
        grads[enclosing] = torch.cat([p.grad.flatten() for p in model.parameters()])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enclosing):
            assert_same(logits, model(x))
    plain = torch.cat(
        [g.flatten() for g in torch.autograd.grad(inner(torch.arange(BATCH)).mean(), list(model.parameters()))]
    )
    assert_same(grads[True], grads[False])
    assert (grads[True] - plain).norm() > 0.05 * plain.norm()


@pytest.mark.parametrize("method", METHODS)
def test_no_host_device_synchronisation(method):
    model, _, y, losses = make(method)
    sam = METHODS[method](model)
    with NoSynchronisation():
        sam.backward(losses, y)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            torch.ones(()).item()


class CallsOutsideThePasses(TorchDispatchMode):
    """Collects torch calls outside the forward and backward passes, without views and allocations."""

    FREE = (
        "as_strided",
        "detach",
        "empty",
        "empty_like",
        "expand",
        "lift_fresh",
        "promote_types",
        "slice",
        "split",
        "view",
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.in_a_pass = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not self.in_a_pass and name not in self.FREE:
            tensors = [t for arg in args for t in (arg if isinstance(arg, (list, tuple)) else [arg])]
            sizes = [t.numel() for t in tensors if isinstance(t, Tensor)]
            # a number or one for each parameter is small; the rest goes over all weights or buffers
            self.calls.append(name if name.startswith("_foreach") or max(sizes, default=0) > 200 else "small")
        return func(*args, **(kwargs or {}))

    def passing(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def run_in_a_pass(*args: Any, **kwargs: Any) -> Any:
            self.in_a_pass = True
            try:
                return run(*args, **kwargs)
            finally:
                self.in_a_pass = False

        return run_in_a_pass


# copies of buffers at entry and after the first pass, and back before each extra pass and at the end; copy and return
# of the weights; a norm; e in three; w + e, and g_rest -= g_s. ASAM's e is scaled by the weights twice.
# SSE-SAM has two of the e.
@pytest.mark.parametrize(
    ("method", "most", "small"),
    [
        ("sam", 11, 16),
        ("imbsam batch", 12, 25),
        ("imbsam 4", 15, 19),
        ("focal_sam", 12, 28),
        ("gsam", 17, 34),
        ("sse_sam 4", 25, 46),
        ("imbsam classifier", 12, 27),
    ],
)
def test_bookkeeping_is_a_few_calls_whatever_the_number_of_parameters(method, most, small):
    counted = []
    for depth in (2, 20):
        torch.manual_seed(0)
        layers = [layer for _ in range(depth) for layer in (nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU())]
        model = nn.Sequential(*layers, nn.Linear(12, 4))
        x, y = torch.randn(BATCH, 12), make()[2]
        seen = CallsOutsideThePasses()
        losses = seen.passing(lambda rows, m=model, x=x, y=y: F.cross_entropy(m(x[rows]), y[rows], reduction="none"))
        sam = METHODS[method](model)
        with seen:
            sam.backward(losses, y, backward=seen.passing(Tensor.backward))
        counted.append(sorted(seen.calls))
    assert counted[0] == counted[1]
    assert sum(call != "small" for call in counted[1]) <= most
    assert counted[1].count("small") <= small


def test_sparse_gradients_are_refused_by_name():
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Flatten(), nn.Linear(4, 4))
    x, y = torch.tensor([[0], [1], [2], [3]]), torch.tensor([0, 1, 2, 3])
    sam = ImbSAM(model, COUNTS)
    with pytest.raises(imbsam.SettingError, match=r"0\.weight has a sparse gradient"):
        sam.backward(lambda rows: F.cross_entropy(model(x[rows]), y[rows], reduction="none"), y)
    assert all(p.grad is None for p in model.parameters())
