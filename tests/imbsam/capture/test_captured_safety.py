"""A captured step that is interrupted or fails leaves everything as it was; what cannot work is refused in one line."""

import contextlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import imbsam
from imbsam import SettingError
from imbsam.capture.graphs import CaptureError, DirectCalls
from tests.imbsam.capture.nets import (
    METHODS,
    assert_same,
    batches,
    captured,
    losses_of,
    of_rows,
    pair,
    state,
)
from tests.interrupts import InterruptAtLine


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
            with warnings.catch_warnings(action="error"):
                step(x, y)
        else:
            for _ in range(2):
                sam.backward(of_rows(sam.module, x, y), y)
    assert_same(state(own), state(eager))
