"""A captured step with a split first pass: the sharp rows and the others have first passes of their own."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imbsam import ClassAwareSAM, FocalSAM, ImbSAM
from imbsam.batch import SharpGradient
from imbsam.capture.captured_step import CapturedStep
from imbsam.capture.graphs import CudaGraphs
from tests.imbsam.capture import fake_cuda
from tests.imbsam.capture.nets import BATCH, COUNTS, Net, batches, captured, losses_of, of_rows
from tests.no_synchronisation import NoSynchronisation

WEIGHT = [0.5, 1.0, 2.0, 3.0]


def net(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4)
    return nn.Sequential(*layers).double()


def labels(sharp: int) -> Tensor:
    """That many rows of tail classes, spread over the batch."""
    y = torch.zeros(BATCH, dtype=torch.int64)
    y[torch.arange(sharp) * 7 % BATCH] = 3
    return y


def sources(step: Any) -> set[SharpGradient]:
    return {recording.passes.source for recording in step._static._recordings.values()}


@pytest.mark.parametrize("perturb", ["all", "norm", "classifier"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_gradient_loss_and_outputs_are_the_eager_engines(perturb, adaptive):
    """With any number of sharp rows; sizes of 8, 16 and 24, so that most passes have rows that do not count."""
    model = net()
    settings = {"rho": 0.3, "first_pass": "split", "perturb": perturb, "adaptive": adaptive, "class_weight": WEIGHT}
    own, eager = (ImbSAM(m, COUNTS, **settings) for m in (model, copy.deepcopy(model)))
    seen: list[int] = []

    def losses(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(x))
        logits = own.module(x)
        return F.cross_entropy(logits, y, reduction="none"), logits

    step = captured(own, losses, pass_sizes=None)
    x = batches(1)[0][0]
    for sharp in range(BATCH + 1):
        y = labels(sharp)
        seen.clear()
        loss = step(x, y)
        torch.testing.assert_close(loss, eager.backward(of_rows(eager.module, x, y), y), rtol=1e-13, atol=0)
        for p, q in zip(own.module.parameters(), eager.module.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-13)
        with torch.no_grad():
            torch.testing.assert_close(step.outputs[0], own.module(x), rtol=0, atol=1e-14)
        wanted = {0: [24], 1: [24, 8, 8], 2: [16, 16, 16], 3: [24, 24]}[-(-sharp // 8)]
        assert seen == ([24, 24] if sharp == BATCH else wanted)  # 1 + t passes from 9 sharp rows on
        for sam in (own, eager):
            sam.module.zero_grad()
    # 0, and up to 8, 16 and 23 rows; and 24, where every row is sharp: no more graphs than without the setting
    assert len(step._static._recordings) == 5


def test_sharp_rows_draw_the_same_masks_at_w_and_w_plus_e_and_are_in_the_outputs():
    model = net(dropout=0.5)
    masks: list[Tensor] = []

    def losses(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        hidden = model[3](torch.ones(len(x), 8, dtype=x.dtype) + 0 * model[:3](x))
        masks.append(hidden.detach().clone())
        return F.cross_entropy(model[4](hidden), y, reduction="none"), hidden

    step = captured(ImbSAM(model, COUNTS, rho=0.3, first_pass="split"), losses, pass_sizes=[8, 16])
    x, y = batches(1)[0][0], labels(10)
    for _ in range(2):
        masks.clear()
        before = torch.get_rng_state()
        step(x, y)
        rest, sharp, at_e = masks
        assert torch.equal(sharp, at_e)
        assert len(rest) == BATCH - 8
        assert torch.equal(step.outputs[0][y == 3], sharp[:10])  # its sharp rows come first
        assert torch.equal(step.outputs[0][y != 3], rest[: BATCH - 10])
        after = torch.get_rng_state()  # where the two first passes leave it
        torch.set_rng_state(before)
        for taken in (rest, sharp):
            F.dropout(torch.ones_like(taken), 0.5)
        assert torch.equal(torch.get_rng_state(), after)


def test_generator_states_of_the_passes_on_a_gpu(monkeypatch):
    """On the fake of one: the pass at w + e draws what the sharp rows' first pass drew, in every replay."""
    fake_cuda.install(monkeypatch)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), fake_cuda.Dropout(), nn.Linear(8, 4)).double()
    masks: list[Tensor] = []

    def losses(x: Tensor, y: Tensor) -> Tensor:
        hidden = model[1](torch.ones(len(x), 8, dtype=x.dtype) + 0 * model[0](x))
        masks.append(hidden.detach().clone())
        return F.cross_entropy(model[2](hidden), y, reduction="none")

    sam = ImbSAM(model, COUNTS, rho=0.3, first_pass="split")
    graphs = CudaGraphs(torch.device("cuda", 0))
    step = CapturedStep(sam, losses, batches(1)[0], graphs=graphs, pass_sizes=[8, 16])
    drawn = []
    for _ in range(3):
        start = fake_cuda.DEFAULT.get_offset()
        step(batches(1)[0][0], labels(10))
        rest, sharp, at_e = masks[-3:]
        assert torch.equal(sharp, at_e)
        assert not torch.equal(rest, sharp)
        assert fake_cuda.DEFAULT.get_offset() == start + 8
        drawn.append(sharp)
    assert not torch.equal(drawn[0], drawn[1])
    assert graphs._stream.joined.count(graphs._branch) == 4  # in each warm-up and in the capture
    assert sources(step) == {SharpGradient.FIRST_PASS}


def test_no_host_device_synchronisation():
    model = net()

    def losses(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x)
        return F.cross_entropy(logits, y, reduction="none"), logits

    step = captured(ImbSAM(model, COUNTS, first_pass="split"), losses, pass_sizes=[8, 16])
    with NoSynchronisation():
        for sharp in (9, 12, 3, 0):
            step(batches(1)[0][0], labels(sharp))


def test_micro_batches_count_as_one_batch():
    model = net()
    own, eager = (ImbSAM(m, COUNTS, rho=0.3, first_pass="split") for m in (model, copy.deepcopy(model)))
    step = captured(own, pass_sizes=[8, 16])
    x = batches(3)
    for numbers in ((9, 12, 16), (9, 3, 12), (12, 0, 12)):
        parts = [(x[i][0], labels(sharp)) for i, sharp in enumerate(numbers)]
        loss = step(parts)
        wanted = eager.backward([(of_rows(eager.module, *part), part[1]) for part in parts])
        torch.testing.assert_close(loss, wanted, rtol=1e-13, atol=0)
        for p, q in zip(own.module.parameters(), eager.module.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-13)
        assert sources(step) == (
            {SharpGradient.FIRST_PASS}
            if numbers == (9, 12, 16)
            else {SharpGradient.FIRST_PASS, SharpGradient.OWN_FORWARD}
        )


def test_first_pass_is_whole_where_the_eager_engines_is():
    x, y = batches(1)[0][0], labels(12)
    for build, model in (
        (lambda m: ImbSAM(m, COUNTS, first_pass="whole"), net()),
        (lambda m: ImbSAM(m, COUNTS, first_pass="split", context_rows=2), net()),
        (lambda m: ImbSAM(m, COUNTS, first_pass="split"), Net().double()),
        (lambda m: FocalSAM(m, COUNTS, first_pass="split"), net()),
        (lambda m: ClassAwareSAM(m, sharpness_weight=[0, 0, 0, 0.5], first_pass="split"), net()),
    ):
        step = captured(build(model), losses_of(model), pass_sizes=[8, 16])
        step(x, y)
        assert SharpGradient.FIRST_PASS not in sources(step)
    step = captured(ImbSAM(net(), COUNTS, first_pass="split"), pass_sizes=[8, 16])
    step(x, y)
    assert sources(step) == {SharpGradient.FIRST_PASS}
