"""A captured step that perturbs some parameters alone: the eager engine's to the last bit."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imbsam import SAM, ClassAwareSAM, ImbSAM, SettingError
from imbsam.batch import SharpGradient
from tests.imbsam.capture.nets import COUNTS, Net, assert_same, batches, captured, losses_of, of_rows, train


def independent_rows() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 4))


NETS: dict[str, Callable[[], nn.Module]] = {"layer norm": independent_rows, "batch norm": Net}
METHODS: dict[str, tuple[Callable[..., ClassAwareSAM], SharpGradient]] = {
    "sam": (lambda m, **kw: SAM(m, COUNTS, **kw), SharpGradient.EVERY_ROW),
    "imbsam": (lambda m, **kw: ImbSAM(m, COUNTS, context_rows=0, **kw), SharpGradient.DIRECTION),
    "imbsam 4": (lambda m, **kw: ImbSAM(m, COUNTS, context_rows=4, **kw), SharpGradient.OWN_FORWARD),
    "imbsam batch": (lambda m, **kw: ImbSAM(m, COUNTS, context_rows="batch", **kw), SharpGradient.SAME_GRAPH),
    "asam": (lambda m, **kw: ImbSAM(m, COUNTS, context_rows=0, adaptive=True, **kw), SharpGradient.DIRECTION),
    "soft": (
        lambda m, **kw: ClassAwareSAM(m, sharpness_weight=[0.0, 0.5, 1.0, 0.0], context_rows=0, **kw),
        SharpGradient.DIRECTION,
    ),
}
PERTURB: dict[Any, Callable[[str], bool]] = {
    "norm": lambda name: name.startswith(("1.", "norm.")),
    "classifier": lambda name: name.startswith(("4.", "head.")),
    ("4.bias", "head.bias"): lambda name: name in ("4.bias", "head.bias"),
}


def pair(method: str, net: str, perturb: Any) -> tuple[ClassAwareSAM, ClassAwareSAM]:
    torch.manual_seed(0)
    model = NETS[net]().double()
    own, eager = (METHODS[method][0](m, perturb=perturb) for m in (model, copy.deepcopy(model)))
    own._num_classes = eager._num_classes = len(COUNTS)  # known from the data, also where no method asks for counts
    return own, eager


@pytest.mark.parametrize("perturb", PERTURB, ids=str)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", METHODS)
def test_a_training_is_the_eager_engines_to_the_last_bit(method, net, perturb):
    own, eager = pair(method, net, perturb)
    wanted = train(eager, lambda x, y: eager.backward(of_rows(eager.module, x, y), y), steps=5)
    named = list(own.module.named_parameters())
    moved: set[str] = set()
    weights: dict[str, Tensor] = {}

    def losses(x: Tensor, y: Tensor) -> Tensor:
        moved.update(name for name, p in named if not torch.equal(p, weights[name]))
        return losses_of(own.module)(x, y)

    step = captured(own, losses)

    def backward(x: Tensor, y: Tensor) -> Tensor:
        weights.update((name, p.detach().clone()) for name, p in named)
        return step(x, y)

    assert_same(train(own, backward, steps=5), wanted)
    assert moved == {name for name, p in named if PERTURB[perturb](name)}
    sources = {recording.passes.source for recording in step._static._recordings.values()}
    wanted_source = METHODS[method][1]
    if wanted_source is SharpGradient.DIRECTION and net == "batch norm":
        wanted_source = SharpGradient.OWN_FORWARD  # where rows see each other g_s(w) is subtracted
    assert wanted_source in sources


@pytest.mark.parametrize("perturb", PERTURB, ids=str)
@pytest.mark.parametrize("method", ["imbsam", "imbsam batch", "soft"])
def test_micro_batches_count_as_one_batch(method, perturb):
    own, eager = pair(method, "layer norm", perturb)
    parts = [batches(6)[i] for i in (0, 5, 2)]
    step = captured(own)
    torch.manual_seed(1)
    loss = step(parts)
    torch.manual_seed(1)
    assert loss == eager.backward([(of_rows(eager.module, x, y), y) for x, y in parts])
    for p, q in zip(own.module.parameters(), eager.module.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-13, atol=1e-15)


def test_pass_along_e_computes_the_gradients_of_what_is_perturbed_alone():
    own, _ = pair("imbsam", "layer norm", "classifier")
    step = captured(own)
    step(*batches(1)[0])
    computed: list[int] = []
    backward = torch.autograd.backward

    def counting(*args: Any, **options: Any) -> None:
        backward(*args, **options)
        computed.append(sum(p.grad is not None for p in own.module.parameters()))

    own.module.zero_grad()
    torch.autograd.backward, kept = counting, torch.autograd.backward
    try:
        step(*batches(1)[0])
    finally:
        torch.autograd.backward = kept
    assert computed == [6, 2, 6]
    results = step._static._results._tensors
    assert sum(kind == "g_s" for kind, _ in results) == 0  # nothing of g_s is kept in one process


def test_perturb_may_change_between_steps():
    own, eager = pair("imbsam", "layer norm", "norm")
    step = captured(own)
    x, y = batches(1)[0]
    for perturb in ("norm", "classifier", "all", "norm"):
        for sam in (own, eager):
            sam.perturb = perturb
            torch.manual_seed(0)
            step(x, y) if sam is own else sam.backward(of_rows(sam.module, x, y), y)
        assert_same([p.grad for p in own.module.parameters()], [p.grad for p in eager.module.parameters()])
    assert len(step._static._recordings) == 3
    own.perturb = ["nothing"]
    before = [p.grad.clone() for p in own.module.parameters()]
    with pytest.raises(SettingError, match=r"perturb is \['nothing'\] and module has no trained parameter of such a"):
        step(x, y)
    assert_same([p.grad for p in own.module.parameters()], before)


def test_what_is_perturbed_and_never_reached_perturbs_nothing():
    """The layer takes no part in the forward: e is 0, and the gradient that of plain training."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(6, 4), "unused": nn.Linear(6, 4)}).double()
    x, y = batches(1)[0]
    sam, losses, grads = ImbSAM(model, COUNTS, perturb=["unused"]), losses_of(model["used"]), []
    for own in (True, False):
        model.zero_grad()
        captured(sam, losses)(x, y) if own else sam.backward(lambda rows: losses(x[rows], y[rows]), y)
        grads.append([p.grad for p in model.parameters()])
    assert_same(*grads)
    assert grads[0][2] is None


def test_reentrant_checkpoints_are_refused_by_name():
    from torch.utils.checkpoint import checkpoint

    own, _ = pair("imbsam", "layer norm", "norm")
    model = own.module

    def losses(x: Tensor, y: Tensor) -> Tensor:
        hidden = checkpoint(model[:4], x.requires_grad_(), use_reentrant=True)
        return nn.functional.cross_entropy(model[4](hidden), y, reduction="none")

    step = captured(own, losses)
    with pytest.raises(SettingError, match="module has activation checkpoints with use_reentrant=True") as caught:
        step(*batches(1)[0])
    assert "\n" not in str(caught.value)
