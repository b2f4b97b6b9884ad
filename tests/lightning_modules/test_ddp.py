"""The command on two processes: it trains, tests, prints one table, and ends."""

import csv

import pytest

from tests.programs import run_command


@pytest.mark.processes
def test_fit_on_two_processes(tmp_path):
    two = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.max_epochs=1"]
    done = run_command(tmp_path, "fit", "--config", "configs/data/digits_lt.yaml", *two)
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
