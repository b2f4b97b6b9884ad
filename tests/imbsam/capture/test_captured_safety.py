"""A captured step that is interrupted or fails leaves everything as it was; what cannot work is refused in one line."""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import imbsam
from imbsam import SAM, ImbSAM, SettingError
from imbsam.capture.graphs import CaptureError, DirectCalls
from tests.imbsam.capture.nets import (
    BATCH,
    COUNTS,
    METHODS,
    assert_same,
    batches,
    captured,
    losses_of,
    of_rows,
    pair,
    state,
)


def after_a_step(method: str, losses: Any = None) -> tuple[Any, Any]:
    """The second step: its static tensors hold the first one's values, and `.grad` is one of them."""
    own, _ = pair(method)
    step = captured(own, losses(own.module) if losses else None)
    step(*batches(1)[0])
    own.module.head.weight.grad = torch.ones_like(own.module.head.weight)
    return own, step


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("in_pass", [1, 2, 3])
def test_exception_in_any_pass_leaves_everything_as_it_was(method, error, in_pass):
    calls: list[int] = []

    def failing(model: nn.Module) -> Callable[..., Any]:
        def losses(x, y):
            calls.append(len(x))
            values = losses_of(model)(x, y)
            if len(calls) == in_pass:
                raise error
            return values

        return losses

    calls += [0] * 9
    own, step = after_a_step(method, failing)
    calls.clear()
    before = state(own)
    with contextlib.suppress(error):
        step(*batches(2)[1])
        assert len(calls) < in_pass, "the exception was swallowed"
        return
    assert_same(state(own), before)
    x, y = batches(2)[1]
    step(x, y)  # and the step can be used again
    same, other = after_a_step(method)
    other(x, y)
    assert_same(state(own), state(same))


class InterruptAtLine:
    """Raise KeyboardInterrupt at the n-th line that runs inside imbsam/."""

    folder = os.path.dirname(imbsam.__file__)

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(self.folder):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


@pytest.mark.parametrize("method", ["imbsam batch", "asam"])
def test_ctrl_c_at_any_line_leaves_everything_as_it_was(method):
    own, step = after_a_step(method)
    before, cache = state(own), torch.is_autocast_cache_enabled()
    x, y = batches(2)[1]
    interrupted = 0
    for n in range(1, 20_000):
        tracer, old = InterruptAtLine(n), sys.gettrace()
        sys.settrace(tracer)
        try:
            step(x, y)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(old)
        if tracer.left > 0:
            break
        assert_same(state(own), before)
        assert torch.is_autocast_cache_enabled() == cache
    assert interrupted > 300


class Refusing(DirectCalls):
    """As a GPU does it that meets a synchronisation in a capture: the passes have been warmed up by then."""

    def record(self, passes):
        recording = super().record(passes)
        undo = recording.begin()
        recording.replay(0)
        passes.buffers.undo()
        undo()
        raise CaptureError("operation not permitted when stream is capturing")


def test_capture_that_fails_ends_in_one_line_with_everything_as_it_was():
    own, _ = pair("imbsam 4")
    before = state(own)
    step = imbsam.capture.captured_step.CapturedStep(
        own, losses_of(own.module), batches(1)[0], graphs=Refusing(torch.device("cpu"))
    )
    with pytest.raises(
        SettingError, match=r"capture is True, and the step cannot be captured: operation not .* capture=False"
    ) as caught:
        step(*batches(1)[0])
    assert "\n" not in str(caught.value)
    assert_same(state(own), before)


def test_auto_trains_eagerly_after_a_capture_that_failed():
    own, eager = pair("imbsam 4")
    step = imbsam.capture.captured_step.CapturedStep(
        own, losses_of(own.module), batches(1)[0], graphs=Refusing(torch.device("cpu")), fall_back=True
    )
    x, y = batches(1)[0]
    for sam in (own, eager):
        torch.manual_seed(1)
        if sam is own:
            with pytest.warns(
                UserWarning, match='capture is "auto", and the steps run eagerly: operation not permitted'
            ):
                step(x, y)
            step(x, y)  # without a warning
        else:
            for _ in range(2):
                sam.backward(of_rows(sam.module, x, y), y)
    assert_same(state(own), state(eager))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


X, Y = batches(1)[0][0].float(), batches(1)[0][1]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda m, f: SAM(m).capture(f, (X, Y)),
            r'capture is True and module is on cpu: CUDA graphs need a GPU; .*"auto"',
        ),
        (lambda m, f: SAM(m).capture(f, (X, Y), capture="always"), "capture is 'always': give True, False or \"auto\""),
        (
            lambda m, f: SAM(m).capture(lambda rows: f(X[rows], Y[rows]), (X, Y), capture="auto"),
            r"losses_of\(rows\) does not take the 2 tensors of a batch: .* not of their indices as for backward\(\)",
        ),
        (lambda m, f: SAM(m).capture(3, (X, Y), capture="auto"), "losses_of is a int: give a function"),
        (lambda m, f: SAM(m).capture(f, X, capture="auto"), "example is a Tensor: give the tensors of one batch"),
        (lambda m, f: SAM(m).capture(f, (X, Y[:3]), capture="auto"), r"example has tensors of \[24, 3\] rows"),
        (lambda m, f: captured(SAM(m), f, (X, Y), pass_sizes=[0]), "pass_sizes is .0.: give whole numbers from 1"),
    ],
)
def test_what_cannot_be_captured_is_refused(build, message):
    model = net()
    with pytest.raises(SettingError, match=message) as caught:
        build(model, losses_of(model))
    assert "\n" not in str(caught.value)


def freeze(model: nn.Module) -> None:
    model[0].bias.requires_grad_(False)


def grow(model: nn.Module) -> None:
    model.append(nn.Linear(4, 4))


def move(model: nn.Module) -> None:
    model[0].weight.data = model[0].weight.data.clone()


@pytest.mark.parametrize(
    ("change", "batch", "message"),
    [
        (None, (X.double(), Y), "tensor 0 of the batch has shape .24, 6. and dtype torch.float64, captured were"),
        (None, (torch.cat([X, X]), torch.cat([Y, Y])), r"tensor 0 of the batch has shape \(48, 6\)"),
        (None, (X[:, :3], Y), r"tensor 0 of the batch has shape \(24, 3\)"),
        (None, (X,), r"the batch is \(Tensor\): give 2 tensors"),
        (None, ([],), "the list of micro-batches is empty"),
        (None, ([(X, Y), (X,)],), r"the batch is \(Tensor\): give 2 tensors"),
        (freeze, (X, Y), "module has 3 trained parameters that are not the 4 it was captured with"),
        (grow, (X, Y), "module has 6 trained parameters that are not the 4 it was captured with"),
        (move, (X, Y), r"module's parameters have moved since capture\(\)"),
        (None, (X, Y + 9), "targets holds the label 12"),
    ],
)
def test_what_a_step_refuses(change, batch, message):
    model = net()
    step = captured(ImbSAM(model, COUNTS), losses_of(model), (X, Y))
    if change:
        change(model)
    with pytest.raises(SettingError, match=message) as caught:
        step(*batch)
    assert "\n" not in str(caught.value)
    assert all(p.grad is None for p in model.parameters())


def test_micro_batches_without_their_targets_are_refused():
    model = net()
    step = captured(ImbSAM(model, COUNTS), losses_of(model), (X, Y))
    with pytest.raises(SettingError, match="targets has 1 entries for 2 micro-batches"):
        step([(X, Y), (X, Y)], targets=[Y])


def test_losses_that_are_not_one_a_row_are_refused():
    model = net()
    step = captured(SAM(model), lambda x, y: F.cross_entropy(model(x), y), (X, Y))
    with pytest.raises(SettingError, match=rf"losses_of\(x, y\) returned shape \(\) for {BATCH} rows"):
        step(X, Y)
