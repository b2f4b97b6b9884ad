"""benchmarks/gpu_step_table.py on the CPU, where the captured passes are called."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from gpu_step_cost import METHODS, Size
from gpu_step_table import markdown, table

BATCH = 16


class WholeBatches(nn.Module):
    """Fails on fewer rows, such as those of ImbSAM's extra passes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(3 * 4 * 4, 100), nn.LayerNorm(100))

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < BATCH:
            raise RuntimeError(f"{len(x)} rows\nand more")
        return self.fc(x.flatten(1))


@pytest.mark.processes
def test_a_method_that_fails_ends_its_process_and_the_next_one_has_another(capsys):
    size = Size(partial(WholeBatches), 4, BATCH, channels_last=False)
    rows = table({"tiny": size}, ["captured"], 3, torch.device("cpu"))
    assert [row["method"] for row in rows] == list(METHODS)
    failed = {row["method"]: row["failed"] for row in rows if "failed" in row}
    assert failed == dict.fromkeys(("ImbSAM, auto", "ImbSAM, norm"), "RuntimeError: 8 rows")
    first, second, last = (rows[i]["eager_sgd_ms"] for i in (0, 3, 4))
    assert (len(first), len(second), len(last)) == (1, 1, 2)  # two processes ended before they measured SGD again
    printed = capsys.readouterr().out
    assert "| captured | ImbSAM, auto | RuntimeError: 8 rows | | | | |" in printed
    beside = ", ".join(f"{ms:.2f}" for ms in first + second + last)
    assert f"| captured | eager SGD beside them | {beside} | | | | |" in printed


def test_ratios_and_goals():
    timed = {"low": 3.0, "high": 5.0, "first_s": 1.0, "memory_mb": 1000.0, "eager_sgd_ms": [9.0, 11.0]}
    rows = [{"method": "SGD", "ms": 4.0, **timed}, {"method": "ImbSAM, auto", "ms": 6.0, **timed}]
    lines = markdown("ResNet-34 at 32, 128", "captured", rows)
    assert "| captured | SGD | 4.00 (3.00 to 5.00) | 1.00 | 0.40 |" in lines[0]
    assert "| 1.50 (goal 1.6) | 0.60 |" in lines[1]
    assert lines[2] == "| captured | eager SGD beside them | 9.00, 11.00 | | | | |"
    assert "| 1.50 | 0.60 (goal 0.45) |" in markdown("ResNet-34 at 32, 64", "captured", rows)[1]
