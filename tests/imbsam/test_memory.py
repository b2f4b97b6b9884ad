"""How many copies of the parameters a step holds, counted from the CPU allocator's own records."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from imbsam import CCSAM, GSAM, SAM, ClassAwareSAM, FocalSAM, ImbSAM

COUNTS = [200, 60, 15, 4]
METHODS: dict[str, tuple[Callable[[nn.Module], ClassAwareSAM], float]] = {
    "sam": (lambda module: SAM(module), 1.2),
    "imbsam": (lambda module: ImbSAM(module, COUNTS), 2.2),
    "imbsam batch": (lambda module: ImbSAM(module, COUNTS, context_rows="batch"), 2.2),
    "imbsam adaptive": (lambda module: ImbSAM(module, COUNTS, adaptive=True), 2.2),
    "focal_sam": (lambda module: FocalSAM(module, COUNTS), 2.2),
    "gsam": (lambda module: GSAM(module), 2.2),
    "cc_sam": (lambda module: CCSAM(module, COUNTS), 2.2),
}


def wide_net() -> nn.Module:
    """Its activations are negligible compared with its parameters, and each layer is a small part of all of them."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(192, 192) for _ in range(20)))


def copies(model: nn.Module, step: Callable[[], object]) -> tuple[float, float]:
    """The memory of a step in units of the parameters' memory: its peak, and the peak during the last forward."""
    for p in model.parameters():
        p.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    forward = [e for e in events if e.name() == "forward"][-1]
    live, peak, in_forward = 0, 0, 0
    for e in events:
        if e.name() == "[memory]":
            live += e.nbytes()
            peak = max(peak, live)
            if forward.start_ns() <= e.start_ns() <= forward.start_ns() + forward.duration_ns():
                in_forward = max(in_forward, live)
    unit = sum(p.numel() * p.element_size() for p in model.parameters())
    return peak / unit, in_forward / unit


@pytest.mark.parametrize("method", METHODS)
def test_copies_of_the_parameters(method):
    make, beyond_sgd = METHODS[method]
    model = wide_net()
    x, y = torch.randn(8, 192), torch.tensor([0, 0, 0, 1, 1, 2, 3, 0])

    def losses(rows):
        with record_function("forward"):
            return F.cross_entropy(model(x[rows])[:, :4], y[rows], reduction="none")

    sam = make(model)
    sgd, _ = copies(model, lambda: losses(torch.arange(8)).mean().backward())
    peak, at_w_plus_e = copies(model, lambda: sam.backward(losses, y))

    assert sgd == pytest.approx(1, abs=0.15)  # the gradient: the records are complete
    assert peak - sgd < beyond_sgd
    # w, and the gradient so far if there is one: the direction of the ascent is freed
    assert at_w_plus_e < beyond_sgd
