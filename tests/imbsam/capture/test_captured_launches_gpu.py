"""A replayed step is one launch of a graph, or two where the ranks average g_s(w) in between."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from imbsam import SAM, ClassAwareSAM, ImbSAM, Plain
from tests.imbsam.capture.nets import COUNTS, LABELS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: CUDA graphs run on no other"),
]
METHODS: dict[str, Callable[[nn.Module], ClassAwareSAM]] = {
    "plain": lambda m: Plain(m),
    "sam": lambda m: SAM(m),
    "imbsam 4": lambda m: ImbSAM(m, COUNTS, context_rows=4),
    "imbsam batch": lambda m: ImbSAM(m, COUNTS, context_rows="batch"),
}


def launches(method: str, group: object = None) -> dict[str, int]:
    """How often the host launched a graph, and forwards and backwards ran one by one, in three replayed steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).cuda()
    sam = METHODS[method](model)
    sam.process_group = group

    def losses_of(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y, reduction="none")

    x, y = torch.randn(len(LABELS[0]), 3, 8, 8, device="cuda"), torch.tensor(LABELS[0])
    step = sam.capture(losses_of, (x, y))
    step(x, y)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            model.zero_grad()
            step(x, y)
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events()]
    return {name: sum(n.startswith(name) for n in names) for name in ("cudaGraphLaunch", "aten::convolution")}


@pytest.mark.parametrize("method", METHODS)
def test_one_launch_a_step(method):
    assert launches(method) == {"cudaGraphLaunch": 3, "aten::convolution": 0}


def test_two_launches_around_the_all_reduce(tmp_path: Path):
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        assert launches("imbsam 4", dist.group.WORLD) == {"cudaGraphLaunch": 6, "aten::convolution": 0}
    finally:
        dist.destroy_process_group()
