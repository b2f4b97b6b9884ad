"""The command on two nodes: two torchrun agents on the loopback address, one process each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from tests.ports import held_port
from tests.programs import PATIENCE, REPOSITORY


class KeepWeights(Callback):
    """Write the weights of every rank; the command names this class by its path."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save(pl_module.state_dict(), f"weights{trainer.global_rank}_node{trainer.node_rank}.pt")


def agent(node: int, port: int, folder: Path) -> subprocess.Popen:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={node}"),
            *("--master-addr=127.0.0.1", f"--master-port={port}", "-m", "lightning_modules.cli", "fit"),
            *("--config", "configs/data/digits_lt.yaml", "--config", "configs/trainer/ddp.yaml"),
            *("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=2", "--trainer.max_epochs=1"),
            "--trainer.precision=32",  # bfloat16 is slow on many processors
            "--trainer.callbacks+=test_two_nodes.KeepWeights",
        ],
        cwd=folder,
        env={
            **ours,
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)]),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "120",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.processes
def test_fit_on_two_nodes(tmp_path):
    with held_port() as port:
        agents = [agent(node, port, tmp_path) for node in range(2)]
        try:
            outputs = [a.communicate(timeout=PATIENCE)[0] for a in agents]
        finally:
            for a in agents:
                a.terminate()
    assert [a.returncode for a in agents] == [0, 0], outputs

    first, second = (torch.load(tmp_path / f"weights{n}_node{n}.pt", weights_only=True) for n in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    run = tmp_path / "logs/digits_lt/imbsam"
    assert [path.name for path in run.iterdir()] == ["version_0"]
    kept = torch.load(run / "version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(first[name], kept[name]) for name in first)
    assert kept.keys() == first.keys()
    assert [output.count("test accuracy in %") for output in outputs] == [1, 0], outputs
