"""What the tests of the captured step share: a net, methods, batches, and a step whose passes are called."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imbsam import SAM, ClassAwareSAM, FocalSAM, ImbSAM, Plain
from imbsam.capture.captured_step import CapturedStep
from imbsam.capture.graphs import DirectCalls

COUNTS = [200, 60, 15, 4]
BATCH = 24
EAGER_SIZES = range(2, BATCH, 2)
"""Those of the eager engine, so that both see the same rows."""


class Net(nn.Module):
    """BatchNorm, dropout, a buffer that the forward replaces and one that it reads, tied and unused parameters."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.first.weight
        self.head = nn.Linear(6, 4)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.checkpointed = checkpointed

    def body(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(self.norm(self.first(x))), 0.3, self.training)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        x = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        return self.head(self.again(x) + self.frozen(x)) * (1 + self.calls / 8)


METHODS: dict[str, Callable[[nn.Module], ClassAwareSAM]] = {
    "plain": lambda m: Plain(m),
    "sam": lambda m: SAM(m),
    "imbsam batch": lambda m: ImbSAM(m, COUNTS, context_rows="batch"),
    "imbsam 4": lambda m: ImbSAM(m, COUNTS, context_rows=4),
    "imbsam auto": lambda m: ImbSAM(m, COUNTS),
    "imbsam 0": lambda m: ImbSAM(m, COUNTS, context_rows=0),
    "imbsam tail weight": lambda m: ImbSAM(m, COUNTS, context_rows=6, tail_weight=2.0),
    "asam": lambda m: ImbSAM(m, COUNTS, context_rows=4, adaptive=True),
    "focal": lambda m: FocalSAM(m, COUNTS),
    "imbsam norm": lambda m: ImbSAM(m, COUNTS, context_rows=4, perturb="norm"),
    "imbsam classifier": lambda m: ImbSAM(m, COUNTS, context_rows=0, perturb="classifier"),
    "head": lambda m: ClassAwareSAM(m, sharpness_weight=[0.0, 0.5, 1.0, 0.0], context_rows=2),
}

LABELS = [
    ([0] * 5 + [1] * 3 + [2] * 2 + [3] * 2) * 2,
    [0] * 20 + [1] * 2 + [2] + [3],
    [0] * BATCH,
    [2, 3] * 12,
    [0] * 12 + [1] * 9 + [2] * 3,
]


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(BATCH, 6, dtype=torch.float64, generator=generator), torch.tensor(LABELS[i % len(LABELS)]))
        for i in range(steps)
    ]


def losses_of(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")


def of_rows(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda rows: losses_of(model)(x[rows], y[rows])


def captured(sam: ClassAwareSAM, losses: Any = None, example: Any = None, **settings: Any) -> CapturedStep:
    settings.setdefault("pass_sizes", EAGER_SIZES)
    return CapturedStep(
        sam,
        losses or losses_of(sam.module),
        example or batches(1)[0],
        graphs=DirectCalls(torch.device("cpu")),
        **settings,
    )


def pair(method: str, net: Callable[[], nn.Module] = Net) -> tuple[ClassAwareSAM, ClassAwareSAM]:
    torch.manual_seed(0)
    model = net().double()
    return METHODS[method](model), METHODS[method](copy.deepcopy(model))


def state(sam: ClassAwareSAM) -> dict[str, Any]:
    model = sam.module
    return {
        "parameters": [p.detach().clone() for p in model.parameters()],
        "buffers": [b.clone() for b in model.buffers()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "generator": torch.get_rng_state(),
    }


def assert_same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def train(sam: ClassAwareSAM, backward: Callable[[Tensor, Tensor], Tensor], steps: int = 7) -> list[Any]:
    """A training whose rho and class weights change: the loss and the state after each step."""
    parameters = [p for p in sam.module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    found = []
    for i, (x, y) in enumerate(batches(steps)):
        if not isinstance(sam, Plain):
            sam.rho = [0.05, 0.5, 0.0, 0.2][i % 4]
        if i == 3:
            sam.class_weight = [0.1, 0.5, 2.0, 3.0]
        loss = backward(x, y)
        found.append((loss.clone(), state(sam)))
        optimizer.step()
        optimizer.zero_grad()
    return found
