"""A captured step under own weights, a GradScaler, autocast, other sizes: as the eager engine."""

import contextlib
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imbsam import ImbSAM
from imbsam.capture.pass_sizes import graph_sizes
from imbsam.extra_passes import pass_size
from tests.imbsam.capture.nets import (
    BATCH,
    COUNTS,
    METHODS,
    assert_same,
    batches,
    captured,
    of_rows,
    pair,
    state,
)
from tests.no_synchronisation import NoSynchronisation


def test_own_sharpness_weights_and_probabilities():
    for kind in ("own", "probabilities"):
        own, eager = pair("head")
        step = captured(own)
        for i, (x, y) in enumerate(batches(5)):
            weights = torch.arange(BATCH) % (i + 2) / 4 if kind == "own" else None
            targets = None if kind == "own" else F.one_hot(y, 4) * 0.75 + 0.25 * F.one_hot(y.roll(1), 4)
            torch.manual_seed(i)
            loss = step(x, y, targets=targets, sharpness_weight=weights)
            torch.manual_seed(i)
            assert loss == eager.backward(of_rows(eager.module, x, y), targets, sharpness_weight=weights)
            assert_same(state(own), state(eager))


def test_a_grad_scalers_scale_is_data():
    own, eager = pair("imbsam 4")
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) for _ in range(2)]
    step = captured(own, scaler=scalers[0])
    for i, (x, y) in enumerate(batches(6)):
        x = x * torch.inf if i == 3 else x  # skipped, and the scale is halved
        for sam, scaler in zip((own, eager), scalers, strict=True):
            torch.manual_seed(i)
            if sam is own:
                step(x, y)
            else:
                sam.backward(
                    of_rows(sam.module, x, y), y, backward=lambda loss, s=scaler, **kw: s.scale(loss).backward(**kw)
                )
            optimizer = torch.optim.SGD([p for p in sam.module.parameters() if p.requires_grad], lr=0.1)
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(sam.module.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        torch.testing.assert_close(state(own), state(eager), rtol=0, atol=0, equal_nan=True)
    assert scalers[0].get_scale() == 2.0**11  # doubled after two steps, halved, doubled


@pytest.mark.parametrize("context_rows", ["batch", 4])
@pytest.mark.parametrize("enclosing", [True, False])
def test_autocast_inside_or_around_the_step(context_rows, enclosing):
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4))]
    models.append(copy.deepcopy(models[0]))
    x, y = batches(1)[0]
    grads = []

    def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with contextlib.nullcontext() if enclosing else torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(x).float(), y, reduction="none")

    for model in models:
        sam = ImbSAM(model, COUNTS, rho=1.0, context_rows=context_rows)
        step = captured(sam, lambda x, y, m=model: losses(m, x, y), (x.float(), y))
        with torch.autocast("cpu", torch.bfloat16, enabled=enclosing):
            if model is models[0]:
                step(x.float(), y)
            else:
                sam.backward(lambda rows, m=model: losses(m, x.float()[rows], y[rows]), y)
            assert torch.is_autocast_cache_enabled()
        grads.append([p.grad.clone() for p in model.parameters()])
        if enclosing:  # the same shape without it is another graph
            step(x.float(), y)
            assert not torch.equal(model[0].weight.grad, grads[-1][0] * 2)
            assert len(step._static._recordings) == (2 if model is models[0] else 1)
    assert_same(grads[0], grads[1])


def test_more_rows_than_the_eager_engine_takes_change_no_more_than_the_rounding():
    """Where rows do not see each other; under BatchNorm there are more context rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4)).double()
    own, eager = (ImbSAM(m, COUNTS, rho=0.5) for m in (model, copy.deepcopy(model)))
    step = captured(own, pass_sizes=None)
    seen = set()
    for i in range(20):
        x, y = torch.randn(BATCH, 6, dtype=torch.float64), (torch.rand(BATCH) < i / 25).long() * 3
        step(x, y)
        eager.backward(of_rows(eager.module, x, y), y)
        seen.add(int((y == 3).sum()))
        for p, q in zip(own.module.parameters(), eager.module.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-13)
    assert len(seen) > 5
    assert {shape[2] for shape in step._static._recordings} == {0, 8, 16, 24}


@pytest.mark.parametrize("batch_size", [1, 5, 24, 100, 128, 1024])
def test_sizes_are_few_and_pass_sizes(batch_size):
    sizes = graph_sizes(batch_size)
    assert sizes[-1] == batch_size
    assert all(pass_size(n) == n for n in sizes[:-1])
    assert len(sizes) <= 8 + 4 * max(0, (batch_size - 1).bit_length() - 6)
    assert all(large <= 1.25 * small for small, large in itertools.pairwise(sizes) if small >= 32)


def test_smaller_last_batch_runs_eagerly_and_outputs_are_kept():
    own, eager = pair("imbsam 4")
    seen: list[int] = []

    def losses(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(x))
        logits = own.module(x)
        return F.cross_entropy(logits, y, reduction="none"), logits

    step = captured(own, losses)
    for rows in (BATCH, 10, BATCH):
        x, y = (t[:rows] for t in batches(1)[0])
        torch.manual_seed(1)
        loss = step(x, y)
        torch.manual_seed(1)
        assert loss == eager.backward(of_rows(eager.module, x, y), y)
        assert_same(state(own), state(eager))
        torch.testing.assert_close(loss, F.cross_entropy(step.outputs[0], y), rtol=1e-12, atol=0)
        assert not step.outputs[0].requires_grad
    assert seen == [24, 12, 12, 10, 6, 6, 24, 12, 12]


@pytest.mark.parametrize("method", METHODS)
def test_no_host_device_synchronisation(method):
    own, _ = pair(method)
    step = captured(own)
    with NoSynchronisation():
        for x, y in batches(3):
            step(x, y)


def test_another_training_mode_is_another_graph():
    own, eager = pair("imbsam 4")
    step = captured(own)
    for training in (True, False, True):
        for sam in (own, eager):
            sam.module.train(training)
            torch.manual_seed(0)
            x, y = batches(1)[0]
            step(x, y) if sam is own else sam.backward(of_rows(sam.module, x, y), y)
        assert_same(state(own), state(eager))
    assert len(step._static._recordings) == 2
