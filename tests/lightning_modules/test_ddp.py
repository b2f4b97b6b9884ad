"""The command on two processes: it trains, tests, prints one table, and ends."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_fit_on_two_processes(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lightning_modules.cli", "fit", "--config", "configs/digits_lt/imbsam.yaml"),
            *("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=1"),
            *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy in %") == 1
    assert "log: logs/digits_lt/imbsam/version_0" in done.stdout
    assert (tmp_path / "logs/digits_lt/imbsam/version_0/checkpoints/last.ckpt").exists()
