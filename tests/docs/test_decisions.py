"""The commands and the program of docs/decisions.md run as they stand, but for fewer epochs."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from lightning_modules.cli.run import main

PAGE = (Path(__file__).resolve().parents[2] / "docs/decisions.md").read_text()
FEW = {"data/anomaly_table.yaml": ["--data.batches_per_epoch=5"], "data/digits_lt.yaml": []}


@pytest.mark.parametrize("block", range(6))
def test_commands(block, tmp_path, monkeypatch, capsys):
    """Those of the first block follow each other: predict finds the checkpoint that fit wrote."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    blocks = [block for block in blocks if "calibration_table.py" not in block]  # that of CIFAR-100: minutes
    assert len(blocks) == 6
    for line in blocks[block].replace("\\\n", " ").strip().splitlines():
        args = shlex.split(line)
        if args[1] == "fit":
            data = args[args.index("--config") + 1].removeprefix("configs/")
            args += ["--trainer.max_epochs=2", *FEW[data]]
        monkeypatch.setattr(sys, "argv", args)
        main()  # ends with SystemExit where it fails
    out = capsys.readouterr().out
    assert "decisions" in out or "calibration" in out
    if block == 0:
        assert (tmp_path / "predictions.csv").read_text().startswith("row,score,alarm,probability\n")


def test_program(capsys):
    torch.manual_seed(0)
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(program, {})
    assert "tensor([[" in capsys.readouterr().out
