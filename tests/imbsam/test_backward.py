"""The gradient, compared with that of `imbsam.reference`."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imbsam import (
    CCSAM,
    GSAM,
    SAM,
    SSESAM,
    ClassAwareSAM,
    FocalSAM,
    ImbSAM,
    PartitionedSAM,
    Plain,
    SettingError,
    reference,
)

COUNTS = [200, 60, 15, 4]
BATCH = 24


def batch_norm_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 6),
        nn.BatchNorm1d(6),
        nn.Linear(6, 4),
    )


def group_norm_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.Tanh(), nn.Linear(8, 4))


NETS = {"batch norm": batch_norm_net, "group norm": group_norm_net, "mlp": mlp}
METHODS: dict[str, Callable[..., ClassAwareSAM]] = {
    "sam": lambda module, **kw: SAM(module, **kw),
    "imbsam": lambda module, **kw: ImbSAM(module, COUNTS, **kw),
    "focal_sam": lambda module, **kw: FocalSAM(module, COUNTS, focal_lambda=1.1, focal_gamma=2.0, **kw),
    "gsam": lambda module, **kw: GSAM(module, alpha=0.7, **kw),
    "cc_sam": lambda module, **kw: CCSAM(module, COUNTS, **kw),
    "sse_sam": lambda module, **kw: SSESAM(module, COUNTS, eta=20, head_rho=0.04, **kw),
    "partitioned": lambda module, **kw: PartitionedSAM(
        module, partition=[2, 0, 1, 0], radius=[1.0, 2.0, 0.0], sharpness_weight=[0.7, 0.5, 1.0, 1.1], **kw
    ),
}
CLASS_WEIGHT = [0.5, 1.0, 2.0, 3.0]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(net: str) -> tuple[nn.Module, Tensor, Tensor]:
    model = NETS[net]().double()
    x = torch.randn(BATCH, 2, 6, 6, dtype=torch.float64)
    y = torch.tensor(([0] * 5 + [1] * 3 + [2] * 2 + [3] * 2) * 2)
    return model, x, y


def cross_entropies(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda rows: F.cross_entropy(model(x[rows]), y[rows], reduction="none")


def objective_gradient(model: nn.Module, x: Tensor, y: Tensor, c: Tensor, **settings: Any) -> list[Tensor]:
    """The reference's gradient, on a copy of the model."""
    net = copy.deepcopy(model)
    params = list(net.parameters())
    settings = {"rho": 0.1, **settings}
    reference.backward(lambda: F.cross_entropy(net(x), y, reduction="none"), params, c, **settings)
    return [p.grad for p in params if p.grad is not None]


def assert_gradient(model: nn.Module, expected: list[Tensor]) -> None:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    wanted = torch.cat([g.flatten() for g in expected])
    assert torch.linalg.vector_norm(found - wanted) <= 1e-10 * torch.linalg.vector_norm(wanted)


def per_row(sam: ClassAwareSAM, y: Tensor, weights: list[float] | None) -> dict[str, Any]:
    """What the reference needs, for labels or probabilities; c_ik and rho_k if there are several e."""
    p = F.one_hot(y, 4).double() if y.dim() == 1 else y
    a = p @ torch.tensor(weights or [1.0] * 4, dtype=torch.float64)
    c = sam.sharpness_weight.expand(4)
    if isinstance(sam, PartitionedSAM):
        rho = [sam.rho * float(r) for r in sam.radius]
        # a group of radius 0 is not perturbed
        groups = [p @ (c * (sam.partition == k) * (length > 0)) for k, length in enumerate(rho)]
        return {"c": torch.stack(groups), "a": a, "rho": rho}
    return {"c": p @ c, "a": a, "alpha": sam.alpha if isinstance(sam, GSAM) else 0.0}


@pytest.mark.parametrize("weights", [None, CLASS_WEIGHT], ids=["unweighted", "class weights"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("net", "context_rows"), [*itertools.product(NETS, ["batch"]), ("group norm", 0), ("mlp", 0), ("mlp", "auto")]
)
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
def test_gradient_is_the_objectives(net, context_rows, method, adaptive, weights, soft):
    model, x, y = make(net)
    if soft:
        y = 0.7 * F.one_hot(y, 4).double() + 0.3 * F.one_hot(y.roll(5), 4).double()
    sam = METHODS[method](model, rho=0.1, adaptive=adaptive, class_weight=weights, context_rows=context_rows)
    settings = per_row(sam, y, weights)
    expected = objective_gradient(model, x, y, **settings, adaptive=adaptive)
    plain = (settings["a"] * cross_entropies(model, x, y)(torch.arange(BATCH))).mean()
    model.load_state_dict(copy.deepcopy(model.state_dict()))

    loss = sam.backward(cross_entropies(model, x, y), y)

    assert_gradient(model, expected)
    torch.testing.assert_close(loss, plain.detach())
    assert not loss.requires_grad


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("context_rows", ["batch", 0])
@pytest.mark.parametrize("net", ["group norm", "mlp"])
def test_micro_batches_are_one_batch(net, context_rows, method):
    model, x, y = make(net)
    sam = METHODS[method](model, rho=0.1, class_weight=CLASS_WEIGHT, context_rows=context_rows)
    settings = per_row(sam, y, CLASS_WEIGHT)
    expected = objective_gradient(model, x, y, **settings)
    # of unequal size, the first without a tail row
    parts = [torch.arange(0, 8), torch.arange(8, 21), torch.arange(21, BATCH)]
    loss = sam.backward([(cross_entropies(model, x[part], y[part]), y[part]) for part in parts])
    assert_gradient(model, expected)
    torch.testing.assert_close(
        loss, (settings["a"] * cross_entropies(model, x, y)(torch.arange(BATCH))).mean().detach()
    )


def one_group(name: str, module: nn.Module, **settings: Any) -> tuple[ClassAwareSAM, ClassAwareSAM]:
    """A partition with one group that perturbs, and the method that it equals."""
    if name == "sam":
        return PartitionedSAM(module, COUNTS, partition=[0] * 4, rho=0.1, **settings), SAM(
            module, COUNTS, rho=0.1, **settings
        )
    if name == "imbsam":
        sse = SSESAM(module, COUNTS, eta=20, rho=0.1, head_rho=0.05, **settings)
        sse.radius = [0, 1]  # the second stage
        return sse, ImbSAM(module, COUNTS, eta=20, rho=0.1, **settings)
    c = [0.0, 0.3, 1.0, 1.1]
    partitioned = PartitionedSAM(
        module, COUNTS, partition=[1, 0, 0, 0], radius=[2, 5], sharpness_weight=c, rho=0.05, **settings
    )
    return partitioned, ClassAwareSAM(module, COUNTS, sharpness_weight=c, rho=0.1, **settings)


@pytest.mark.parametrize(
    "settings", [{"tail_weight": 2.0}, {"adaptive": True}, {"context_rows": "batch"}, {"context_rows": 4}]
)
@pytest.mark.parametrize("name", ["sam", "imbsam", "class aware"])
@pytest.mark.parametrize("net", ["batch norm", "mlp"])
def test_one_group_is_bit_identical_to_the_method(net, name, settings):
    model, x, y = make(net)
    grads = []
    for sam in one_group(name, model, **settings):
        model.zero_grad()
        sam.backward(cross_entropies(model, x, y), y)
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(g, h) for g, h in zip(*grads, strict=True))


def test_sharpness_weight_per_row_replaces_the_classes():
    model, x, y = make("mlp")
    c = torch.zeros(BATCH, dtype=torch.float64)
    c[[3, 7, 20]] = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    expected = objective_gradient(model, x, y, c)
    ClassAwareSAM(model, sharpness_weight=0.0, rho=0.1).backward(cross_entropies(model, x, y), sharpness_weight=c)
    assert_gradient(model, expected)


def test_sam_without_the_middle_pass_is_the_gradient_at_w_plus_e():
    model, x, y = make("batch norm")
    calls = []

    def losses(rows):
        calls.append(len(rows))
        return cross_entropies(model, x, y)(rows)

    SAM(model).backward(losses, y)
    assert calls == [BATCH, BATCH]


def test_no_more_passes_than_the_method_needs():
    """A guard against an accidental pass: rows forward and backward in one step."""
    model, x, y = make("batch norm")
    tail = int((torch.tensor(COUNTS)[y] < 20).sum())
    assert tail == 8

    def count(sam):
        rows_forward, backwards = [], []

        def losses(rows):
            rows_forward.append(len(rows))
            return cross_entropies(model, x, y)(rows)

        def backward(loss, **kw):
            backwards.append(kw)
            loss.backward(**kw)

        sam.backward(losses, y, backward=backward)
        return rows_forward, len(backwards)

    assert count(Plain(model)) == ([BATCH], 1)
    assert count(SAM(model)) == count(GSAM(model)) == ([BATCH] * 2, 2)
    assert count(ImbSAM(model, COUNTS, context_rows="batch")) == ([BATCH] * 2, 3)
    assert count(ImbSAM(model, COUNTS, context_rows=0)) == ([BATCH, 8, 8], 3)
    assert count(ImbSAM(model, COUNTS, context_rows=3)) == ([BATCH, 12, 12], 3)
    assert count(ImbSAM(model, COUNTS, context_rows="auto")) == ([BATCH] * 2, 3)  # 8 + 32 rows are the whole batch
    assert count(ImbSAM(model.eval(), COUNTS, context_rows="auto")) == ([BATCH, 8, 8], 3)
    assert count(ImbSAM(model, COUNTS, rho=0.0)) == ([BATCH], 1)
    # two passes for each group that is in the batch: of 16 head rows and 8 tail rows, of 10, 6, 4 and 4 rows
    assert count(SSESAM(model, COUNTS, eta=20)) == ([BATCH, 16, 16, 8, 8], 5)
    assert count(CCSAM(model, COUNTS)) == ([BATCH, 10, 10, 6, 6, 4, 4, 4, 4], 9)
    assert count(SSESAM(model, COUNTS, eta=20, head_rho=0.0)) == ([BATCH, 8, 8], 3)
    y[y == 2] = 1
    assert count(CCSAM(model, COUNTS)) == ([BATCH, 10, 10, 10, 10, 4, 4], 7)
    assert count(CCSAM(model.train(), COUNTS, context_rows="batch")) == ([BATCH] * 7, 7)


@pytest.mark.parametrize("method", ["imbsam", "cc_sam"])
@pytest.mark.parametrize("context_rows", ["batch", 0, 4])
def test_dropout_sees_the_same_masks_at_w_and_at_w_plus_e(context_rows, method):
    model = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 4))
    x, y = torch.randn(BATCH, 6), make("mlp")[2]
    masks = []
    model[1].register_forward_hook(lambda module, inputs, output: masks.append(output == 0))

    METHODS[method](model, context_rows=context_rows).backward(cross_entropies(model, x, y), y)

    # of the passes that follow each other, the last is at w + e and the one before it gave g_s(w)
    pairs = list(zip(masks[-1::-2], masks[-2::-2], strict=False))
    assert len(pairs) == (4 if method == "cc_sam" else 1)
    assert all(torch.equal(*pair) and not pair[0].all() for pair in pairs)


@pytest.mark.parametrize("context_rows", [BATCH, "auto"])
@pytest.mark.parametrize("own", [False, True], ids=["classes", "rows"])
def test_context_rows_that_cover_the_batch_equal_batch(context_rows, own):
    model, x, y = make("batch norm")
    sharpness = torch.rand(BATCH) * (torch.tensor(COUNTS)[y] < 20) if own else None
    grads = []
    for k in (context_rows, "batch"):
        model.zero_grad()
        losses = cross_entropies(model, x, y)
        ImbSAM(model, COUNTS, rho=0.5, context_rows=k).backward(losses, y, sharpness_weight=sharpness)
        grads.append([p.grad for p in model.parameters()])
    for given, batch in zip(*grads, strict=True):
        torch.testing.assert_close(given, batch, rtol=0, atol=1e-14)


def test_all_rows_but_one_are_sharp():
    """Rounding up the size of the pass takes in the whole batch."""
    model, x, y = make("mlp")
    y[:] = 3
    y[-5] = 0
    c = (y == 3).double()
    expected = objective_gradient(model, x, y, c, rho=0.5)
    ImbSAM(model, COUNTS, rho=0.5, context_rows=0).backward(cross_entropies(model, x, y), y)
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=1e-12)


def test_first_call_is_for_all_rows_in_order_and_comes_once():
    model, x, y = make("batch norm")
    seen = []

    def losses(rows):
        seen.append(rows)
        return cross_entropies(model, x, y)(rows)

    ImbSAM(model, COUNTS, context_rows=3).backward(losses, y)
    assert seen[0].tolist() == list(range(BATCH))
    assert seen[0].dtype == torch.int64
    sharp = [i for i in range(BATCH) if COUNTS[y[i]] < 20]
    assert seen[1].tolist()[: len(sharp)] == sharp
    assert torch.equal(seen[1], seen[2])


def test_context_rows_do_not_count_even_where_their_loss_is_infinite():
    model, x, y = make("mlp")
    sam = ImbSAM(model, COUNTS, context_rows=8)

    def losses(rows):
        values = cross_entropies(model, x, y)(rows)
        # the non-sharp rows of the extra passes
        return torch.where((torch.tensor(COUNTS)[y[rows]] >= 20) & (len(rows) < BATCH), torch.inf, values)

    sam.backward(losses, y)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda sam, f, y: sam.backward(lambda rows: f(rows).mean(), y), r"shape \(\) for 24 rows.*reduction=\"none\""),
        (lambda sam, f, y: sam.backward(lambda rows: f(rows)[:5], y), r"shape \(5,\) for 24 rows"),
        (lambda sam, f, y: sam.backward(lambda rows: 0.0, y), "float for 24 rows"),
        (lambda sam, f, y: sam.backward(f, torch.where(y == 3, 4, y)), "targets holds the label 4: with 4 classes"),
        (lambda sam, f, y: sam.backward(f, torch.where(y == 3, -1, y)), "targets holds the label -1"),
        (lambda sam, f, y: sam.backward(f, torch.rand(24, 3)), "3 columns for the 4 classes"),
        (lambda sam, f, y: sam.backward(f, y.float()), "float32"),
        (lambda sam, f, y: sam.backward(f), "targets is None"),
        (lambda sam, f, y: sam.backward([(f, y)], y), "micro-batches"),
        (lambda sam, f, y: sam.backward([]), "losses is an empty list"),
        (lambda sam, f, y: sam.backward(f(torch.arange(24)).mean(), y), "losses is a Tensor: give a function"),
        (lambda sam, f, y: sam.backward(f, y, sharpness_weight=torch.ones(3)), r"sharpness_weight= has shape \(3,\)"),
        (lambda sam, f, y: sam.backward(f, sharpness_weight=torch.full((24,), torch.nan)), "negative or non-finite"),
        (lambda sam, f, y: sam.backward(f, sharpness_weight=torch.full((24,), torch.inf)), "negative or non-finite"),
        (lambda sam, f, y: sam.backward(f, sharpness_weight=torch.full((24,), -1.0)), "negative or non-finite"),
        (lambda sam, f, y: sam.backward(f, y, backward=lambda loss: loss.backward()), "does not take retain_graph"),
        (lambda sam, f, y: setattr(sam, "rho", float("nan")), "rho is nan"),
        (lambda sam, f, y: setattr(sam, "class_weight", [1.0, 2.0]), "class_weight has 2 entries for 4 classes"),
        (lambda sam, f, y: setattr(sam, "class_weight", [1.0, 2.0, 3.0, -1.0]), "class_weight holds -1"),
    ],
)
def test_errors_name_the_setting_and_the_fix(call, message):
    model, x, y = make("mlp")
    sam = ImbSAM(model, COUNTS, context_rows="batch")
    with pytest.raises(SettingError, match=message) as caught:
        call(sam, cross_entropies(model, x, y), y)
    assert "\n" not in str(caught.value)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": -0.1}, "rho is -0.1"),
        ({"rho": float("nan")}, "rho is nan"),
        ({"tail_weight": -1}, "tail_weight is -1"),
        ({"class_weight": [1.0, 2.0]}, "class_weight has 2"),
        ({"class_weight": [1.0, 2.0, 3.0, -1.0]}, "class_weight holds -1"),
        ({"context_rows": "all"}, "context_rows is 'all'"),
        ({"context_rows": -1}, "context_rows is -1"),
        ({"tail_weight": 2.0, "class_weight": [1.0, 2.0]}, "class_weight has 2"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(SettingError, match=message):
        ImbSAM(mlp(), COUNTS, **settings)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda m: SSESAM(m, COUNTS, eta=2),
            r"eta is 2, which leaves SSE-SAM no tail class: set eta above 4 and to at most",
        ),
        (lambda m: SSESAM(m, COUNTS, eta=300), "eta is 300, which leaves SSE-SAM no head class: .* at most 200"),
        (
            lambda m: SSESAM(m, COUNTS, tail_classes=[]),
            r"tail_classes is \[\], which leaves SSE-SAM no tail class: name some",
        ),
        (lambda m: SSESAM(m, COUNTS, eta=20, head_rho=-0.1), "head_rho is -0.1: give a finite number from 0"),
        (lambda m: SSESAM(m, COUNTS, eta=20, rho=-0.1), "rho is -0.1"),
        (lambda m: GSAM(m, alpha=-1), r"alpha is -1: give a finite number from 0 \(0 is SAM\)"),
        (lambda m: CCSAM(m, COUNTS, radius_power=-1), "radius_power is -1: give a finite number from 0"),
        (lambda m: CCSAM(m, COUNTS, flat_ratio=float("inf")), "flat_ratio is inf"),
        (lambda m: CCSAM(m, COUNTS, class_weight=[1.0, 2.0]), "class_weight has 2 entries for 4 classes"),
        (lambda m: PartitionedSAM(m, COUNTS, partition=[0, 1]), "partition has 2 entries for 4 classes"),
        (
            lambda m: PartitionedSAM(m, partition=[0, 1], sharpness_weight=[1.0] * 3),
            "partition has 2 entries for 3 classes",
        ),
        (lambda m: PartitionedSAM(m, partition=[0.5, 1.0]), r"partition is \[0.5, 1.0\]: give each class the number"),
        (lambda m: PartitionedSAM(m, partition=[0, -1]), r"partition is \[0, -1\]"),
        (
            lambda m: PartitionedSAM(m, partition=[0, 1], radius=[1.0]),
            r"radius is \[1.0\]: give one number for each of the 2 groups",
        ),
        (
            lambda m: PartitionedSAM(m, partition=[0, 1], radius=[1.0, -1.0]),
            "radius holds -1.0: every group needs a finite number from 0",
        ),
        (lambda m: setattr(SSESAM(m, COUNTS, eta=20), "radius", float("nan")), "radius holds nan"),
    ],
)
def test_settings_of_the_family_that_cannot_work(build, message):
    with pytest.raises(SettingError, match=message):
        build(mlp())


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (CCSAM, "sharpness_weight= is per row, and this method"),
        (GSAM, "sharpness_weight= is per row, and GSAM's gap"),
    ],
)
def test_methods_that_do_not_take_a_sharpness_weight_per_row(method, message):
    model, x, y = make("mlp")
    with pytest.raises(SettingError, match=message):
        method(model, COUNTS).backward(cross_entropies(model, x, y), y, sharpness_weight=torch.ones(BATCH))


def test_eta_that_makes_it_plain_training_or_sam_warns():
    with pytest.warns(UserWarning, match=r"eta=2 leaves no tail class \(the smallest class has 4"):
        ImbSAM(mlp(), COUNTS, eta=2)
    with pytest.warns(UserWarning, match=r"eta=300 makes every class a tail class \(the largest has 200"):
        ImbSAM(mlp(), COUNTS, eta=300)


def test_tail_weight_multiplies_the_class_weight_of_the_tail():
    assert ImbSAM(mlp(), COUNTS, tail_weight=2).class_weight.tolist() == [1, 1, 2, 2]
    assert ImbSAM(mlp(), COUNTS, tail_weight=2, class_weight=CLASS_WEIGHT).class_weight.tolist() == [0.5, 1, 4, 6]
    assert ImbSAM(mlp(), COUNTS, tail_classes=[0]).sharpness_weight.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("method", METHODS)
def test_class_weight_may_be_scheduled(method):
    """Deferred re-weighting: from the next call on, the extra passes are weighted too."""
    model, x, y = make("mlp")
    sam = METHODS[method](model, rho=0.1, context_rows="batch")
    for weights in (None, CLASS_WEIGHT, None):
        sam.class_weight = weights
        expected = objective_gradient(model, x, y, **per_row(sam, y, weights))
        model.zero_grad()
        sam.backward(cross_entropies(model, x, y), y)
        assert_gradient(model, expected)


def test_rho_may_be_scheduled():
    model, x, y = make("mlp")
    sam = ImbSAM(model, COUNTS, rho=0.0)
    sam.backward(cross_entropies(model, x, y), y)
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    sam.rho = 0.5
    sam.backward(cross_entropies(model, x, y), y)
    assert not torch.allclose(plain[0], next(model.parameters()).grad)
