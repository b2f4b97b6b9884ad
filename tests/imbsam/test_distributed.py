"""Processes of DistributedDataParallel take the steps of one process with the joint batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from imbsam import SAM, ClassAwareSAM, ImbSAM

COUNTS = [100, 10]
STEPS = 12
ROWS = 6


def batches() -> list[tuple[Tensor, Tensor]]:
    """Joint batches of two ranks: tail rows on both, on rank 1 only, nowhere, and rank 1 all tail."""
    generator = torch.Generator().manual_seed(0)
    labels = [[0, 1, 0, 0, 1, 0] * 2, [0] * 6 + [1, 0, 0, 1, 0, 0], [0] * 12, [0] * 6 + [1] * 6]
    return [
        (torch.randn(2 * ROWS, 5, dtype=torch.float64, generator=generator), torch.tensor(labels[i % 4]))
        for i in range(STEPS)
    ]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2)).double()


def engine(name: str, module: nn.Module) -> ClassAwareSAM:
    return SAM(module, rho=0.3) if name == "sam" else ImbSAM(module, COUNTS, rho=0.3)


def train(net: nn.Module, method: str, rows: slice) -> None:
    sam = engine(method, net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    for joint_x, joint_y in batches():
        x, y = joint_x[rows], joint_y[rows]
        sam.backward(lambda r, x=x, y=y: F.cross_entropy(net(x[r]), y[r], reduction="none"), y)
        optimizer.step()
        optimizer.zero_grad()


def worker(rank: int, method: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    reductions = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda *args, **kw: (reductions.append(1), all_reduce(*args, **kw))[1]
    net = nn.parallel.DistributedDataParallel(model())
    train(net, method, slice(rank * ROWS, (rank + 1) * ROWS))
    torch.save([p.detach() for p in net.parameters()], f"{folder}/rank{rank}.pt")
    assert len(reductions) == 2 * STEPS, reductions
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["imbsam", "sam"])
def test_two_processes_equal_one_with_the_joint_batch(tmp_path: Path, method: str) -> None:
    mp.spawn(worker, args=(method, str(tmp_path)), nprocs=2)
    one = model()
    train(one, method, slice(None))
    for rank in range(2):
        for found, wanted in zip(torch.load(tmp_path / f"rank{rank}.pt"), one.parameters(), strict=True):
            torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=1e-12)
