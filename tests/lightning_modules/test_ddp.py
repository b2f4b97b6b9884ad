"""The command on two processes: it trains, tests, prints one table, and ends."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


# left by a test that ran Lightning's ddp in this process; with them the command would wait for others to start rank 1
RANKS = {"LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


@pytest.mark.processes
def test_fit_on_two_processes(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in RANKS}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lightning_modules.cli", "fit", "--config", "configs/data/digits_lt.yaml"),
            *("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.max_epochs=1"),
        ],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy in %") == 1
    assert "log: logs/digits_lt/imbsam/version_0" in done.stdout
    run = tmp_path / "logs/digits_lt/imbsam/version_0"
    assert (run / "checkpoints/last.ckpt").exists()
    with (run / "per_class.csv").open(newline="") as file:
        classes = list(csv.DictReader(file))
    assert sum(int(row["test_samples"]) for row in classes) == 540  # of both ranks
    with (run / "confusion.csv").open(newline="") as file:
        assert sum(int(row["count"]) for row in csv.DictReader(file)) == 540
