"""The tables of docs/decisions.md: what is measured on scores of a known law."""

import importlib.util
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "calibration_table.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("calibration_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SPLITS", 4)
    return module


def test_scores_of_balanced_weights_are_calibrated_by_the_prior(script):
    """Two normals one apart, one in ten positive: the weighted classifier's minimum is the log-likelihood ratio."""
    random = torch.Generator().manual_seed(0)
    labels = (torch.arange(4000) % 10 == 0).long()
    x = torch.randn(4000, generator=random, dtype=torch.float64) + 2 * labels
    found = script.measure(2 * x - 2, labels)
    for method in ("prior", "temperature", "vector", "isotonic"):
        assert found[f"{method} error"] < 2.5
        assert found[f"{method} log-loss"] < found["nothing log-loss"]
    assert found["recall split promised"] == pytest.approx(90, abs=1)
    assert found["recall split realised"] == pytest.approx(90, abs=5)
    assert 0 <= found["recall drawn inside"] <= 100
    assert found["covered anomalies"] == pytest.approx(90, abs=5)


def test_the_tables_are_markdown(script, capsys):
    script.print_table(["a", "b"], [["1", "2"]])
    assert capsys.readouterr().out == "| a | b |\n| --- | --- |\n| 1 | 2 |\n\n"
