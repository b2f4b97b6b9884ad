"""`imbsam fit` on two processes with captured steps, whose shapes the ranks meet at different steps, trains as eagerly.

On two GPUs, and on the CPU, where the passes are called.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

import lightning_modules.backward_passes
from imbsam.capture.graphs import DirectCalls
from tests.programs import REPOSITORY, run_command

ARGS = [
    *("fit", "--config=configs/data/digits_lt.yaml", "--data.batch_size=16", "--trainer.max_epochs=2"),
    *("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.precision=64-true"),
]


class Shapes(Callback):
    """Writes how many shapes this rank has captured after each step.

    Args:
        folder: where to.
        stand_in: call the passes instead.
    """

    def __init__(self, folder: str, stand_in: bool = False) -> None:
        self.folder = Path(folder)
        self.met: list[int] = []
        if stand_in:
            lightning_modules.backward_passes.graphs_on = DirectCalls  # this process is of one test

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        steps = pl_module.backward_passes._steps.values()
        self.met.append(sum(len(step._static._recordings) for step in steps))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(self.met))


def arguments(folder: Path, capture: str) -> list[str]:
    folder.mkdir()
    shapes = ["--trainer.callbacks+=test_captured_processes.Shapes", f"--trainer.callbacks.folder={folder}"]
    return [*ARGS, f"--model.capture={capture}", *shapes]


def compare(eager: Path, captured: Path) -> None:
    """The weights after the training, and that the ranks have met their shapes at different steps."""
    weights = []
    for folder in (captured, eager):
        (checkpoint,) = folder.rglob("last.ckpt")
        weights.append(torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"])
    torch.testing.assert_close(*weights, rtol=1e-8, atol=1e-10)
    first, second = (json.loads((captured / f"rank{rank}.json").read_text()) for rank in range(2))
    assert min(first[-1], second[-1]) > 1
    assert first != second  # one rank captures while the other replays


@pytest.mark.processes
def test_two_processes(run_imbsam, tmp_path):
    folders = [tmp_path / name for name in ("false", "true")]
    for folder in folders:
        stand_in = ["--trainer.callbacks.stand_in=true", "--trainer.accelerator=cpu"]
        answer = run_imbsam(folder, *arguments(folder, folder.name), *stand_in, processes=2)
        assert answer["codes"] == [0, 0], answer["err"]
    compare(*folders)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus(tmp_path):
    folders = [tmp_path / name for name in ("false", "true")]
    paths = os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])
    for folder in folders:
        command = [*arguments(folder, folder.name), "--trainer.accelerator=gpu"]
        done = run_command(folder, *command, PYTHONPATH=paths)
        assert done.returncode == 0, done.stderr
    compare(*folders)
