"""Two processes: the passes are split where the ranks average g_s, so that each may meet its shapes when it does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imbsam import SAM, ClassAwareSAM, FocalSAM, ImbSAM, Plain
from imbsam.capture.captured_step import CapturedStep
from imbsam.capture.graphs import DirectCalls
from tests.imbsam.capture.nets import assert_same
from tests.ranks import run_ranks

pytestmark = pytest.mark.processes

COUNTS = [100, 10]
ROWS = 12
STEPS = 8
ENGINES: dict[str, Callable[[nn.Module], ClassAwareSAM]] = {
    "plain": lambda m: Plain(m),
    "sam": lambda m: SAM(m, rho=0.3),
    "imbsam": lambda m: ImbSAM(m, COUNTS, rho=0.3),
    "imbsam batch": lambda m: ImbSAM(m, COUNTS, rho=0.3, context_rows="batch"),
    "asam": lambda m: ImbSAM(m, COUNTS, rho=0.3, adaptive=True),
    "per rank": lambda m: ImbSAM(m, COUNTS, rho=0.3, perturbation="per_rank"),
    "focal": lambda m: FocalSAM(m, COUNTS, rho=0.3),
    "norm": lambda m: ImbSAM(m, COUNTS, rho=0.3, perturb="norm"),
    "layer norm, norm": lambda m: ImbSAM(m, COUNTS, rho=0.3, perturb="norm"),
    "sam, classifier": lambda m: SAM(m, COUNTS, rho=0.3, perturb="classifier"),
    "per rank, classifier": lambda m: ImbSAM(m, COUNTS, rho=0.3, perturbation="per_rank", perturb="classifier"),
    "auxiliary head": lambda m: ImbSAM(m, COUNTS, rho=0.3),
    "per rank, auxiliary head": lambda m: ImbSAM(m, COUNTS, rho=0.3, perturbation="per_rank"),
}


class AuxiliaryHead(nn.Linear):
    """As Inception's: without a gradient where it is in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x) if self.training else x


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """Sharp rows on both ranks, on one, on none, only sharp ones; the last batch is smaller, on one rank."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    tail = [[2, 3], [0, 4], [0, 0], [ROWS, 1], [7, 0], [2, 2], [0, 1], [1, 1]][step][rank]
    rows = ROWS - 3 if (step, rank) == (STEPS - 1, 1) else ROWS
    x = torch.randn(rows, 5, dtype=torch.float64, generator=generator)
    return x, (torch.arange(rows) * 5 % ROWS < tail).long()


def train(rank: int, name: str, own: bool) -> list[Any]:
    torch.manual_seed(0)
    engine = ENGINES[name]
    norm = nn.LayerNorm(8) if name.startswith("layer norm") else nn.BatchNorm1d(8)
    net = nn.Sequential(nn.Linear(5, 8), norm, nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2), nn.Linear(2, 2)).double()
    auxiliary = AuxiliaryHead(2, 2) if name.endswith("auxiliary head") else nn.Identity()
    net.add_module("auxiliary", auxiliary.double())
    model = nn.parallel.DistributedDataParallel(net)
    sam = engine(model)

    def losses_of(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y, reduction="none")

    graphs = DirectCalls(torch.device("cpu"))
    step = CapturedStep(sam, losses_of, batch(0, 0), graphs=graphs, pass_sizes=range(2, ROWS, 2)) if own else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    torch.manual_seed(rank)
    found = []
    for i in range(STEPS):
        x, y = batch(rank, i)
        auxiliary.train(i % 2 == 0)
        loss = sam.backward(lambda rows, x=x, y=y: losses_of(x[rows], y[rows]), y) if step is None else step(x, y)
        found.append((loss.clone(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]))
        optimizer.step()
        optimizer.zero_grad()
    return [found, [p.detach() for p in model.parameters()], list(model.buffers()), torch.get_rng_state()]


def worker(rank: int, folder: str) -> None:
    found = {name: [train(rank, name, own) for own in (True, False)] for name in ENGINES}
    torch.save(found, f"{folder}/rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(worker, 2, str(folder))
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", ENGINES)
def test_two_ranks_are_the_eager_engines_two_ranks_to_the_last_bit(ranks, name):
    for rank in ranks:
        own, eager = rank[name]
        assert_same(own, eager)
    assert_same(ranks[0][name][0][1], ranks[1][name][0][1])
