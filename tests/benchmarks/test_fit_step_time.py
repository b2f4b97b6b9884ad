"""benchmarks/fit_step_time.py in a small form on the CPU: `imbsam fit` on the random images of a bare machine."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from fit_step_time import line, main

SMALL = ["--trainer.accelerator=cpu", "--model.backbone=SmallCNN", "--model.backbone.in_channels=3"]


@pytest.mark.processes
def test_imbsam_fit_and_the_bare_loop_on_random_images(tmp_path, capsys):
    settings = [f"--root={tmp_path}", "--epochs=1", "--window=40", f"--json={tmp_path / 'windows.json'}"]
    main([*settings, "--methods", "imbsam", "--captures", "false", "true", *SMALL, "--model.backbone.width=4"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("random images with CIFAR-100-LT's class counts, torch ")
    found, refused = printed[-4:-2]
    assert found.startswith("| imbsam | false | ")
    assert found.endswith(" |  | 3 |")
    assert "| failed: imbsam: error: model.capture is true, and the step cannot be captured: CUDA graphs" in refused
    (row,) = json.loads((tmp_path / "windows.json").read_text())
    assert len(row["windows"]) == 170 // 40
    assert all(w["fit"] > 0 and w["bare"] > 0 and not w["epoch_ended"] for w in row["windows"])


def test_the_warm_up_and_the_ends_of_epochs_are_left_out():
    windows = [(9.0, 9.0, False), (0.4, 0.1, False), (7.0, 1.0, True), (0.6, 0.2, False), (0.5, 0.1, False)]
    result = {"window": 50, "windows": [{"fit": f, "bare": b, "epoch_ended": end} for f, b, end in windows]}
    assert line("sgd", "true", result, 5.0) == "| sgd | true | 10.00 | 2.00 | 8.00 (6.00 to 8.00) | 5 | 3 |"
    assert "too few windows" in line("sgd", "true", {**result, "windows": result["windows"][:3]}, None)
