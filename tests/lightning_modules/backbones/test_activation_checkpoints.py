"""Gradient checkpointing in a captured step, where a read of the generators fails as it does on a GPU."""

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

from imbsam import SettingError
from imbsam.capture.captured_step import CapturedStep
from imbsam.capture.graphs import CudaGraphs
from lightning_modules.backbones.activation_checkpoints import checkpoint_blocks
from tests.imbsam.capture.fake_cuda import Dropout, install
from tests.imbsam.capture.nets import assert_same, batches, losses_of, of_rows, pair


class Block(nn.Module):
    def __init__(self, drop: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 6))
        self.drop = Dropout() if drop else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.layers(x))


class Blocks(nn.Module):
    def __init__(self, drop: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(drop), Block(False))
        self.head = nn.Linear(6, 4)
        checkpoint_blocks(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x))


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The fake of `torch.cuda`, in which nobody may read a generator's state during a capture; the captures so far."""
    install(monkeypatch)
    state: list[bool] = []
    under_way = [False]
    capture, read = torch.cuda.graph, torch.get_rng_state

    @contextlib.contextmanager
    def watched(*args: Any, **kwargs: Any) -> Any:
        state.append(True)
        under_way[0] = True
        try:
            with capture(*args, **kwargs):
                yield
        finally:
            under_way[0] = False

    def read_outside() -> torch.Tensor:
        if under_way[0]:
            raise RuntimeError("Cannot call CUDAGeneratorImpl::current_seed during CUDA graph capture")
        return read()

    for name, value in {
        "graph": watched,
        "is_initialized": lambda: True,
        "is_current_stream_capturing": lambda: under_way[0],
        "current_device": lambda: 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "get_rng_state", read_outside)
    return state


def step_of(own: Any) -> CapturedStep:
    graphs = CudaGraphs(torch.device("cuda", 0))
    return CapturedStep(own, losses_of(own.module), batches(1)[0], graphs=graphs, pass_sizes=range(2, 24, 2))


@pytest.mark.parametrize("method", ["plain", "sam", "imbsam 4", "imbsam batch"])
def test_blocks_that_draw_nothing_are_captured(captures, method):
    own, eager = pair(method, lambda: Blocks(drop=False))
    step = step_of(own)
    for x, y in batches(5):
        assert step(x, y) == eager.backward(of_rows(eager.module, x, y), y)
        assert_same(own.module.state_dict(), eager.module.state_dict())
        for p, q in zip(own.module.parameters(), eager.module.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
        for sam in (own, eager):
            sam.module.zero_grad()
    assert captures


def test_blocks_that_draw_are_refused_by_name(captures):
    own, _ = pair("imbsam 4", lambda: Blocks(drop=True))
    before = {name: t.clone() for name, t in own.module.state_dict().items()}
    with pytest.raises(SettingError, match="gradient_checkpointing is true, and Block draws random numbers") as caught:
        step_of(own)(*batches(1)[0])
    assert "\n" not in str(caught.value)
    assert len(captures) == 1
    assert_same(own.module.state_dict(), before)
