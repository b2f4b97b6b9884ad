"""scripts/head_table.py on features of a few images by a network with random weights."""

import csv
import sys
from pathlib import Path

import pytest
import torch

from lightning_modules import LongTailedClassifier
from lightning_modules.backbones import Timm
from lightning_modules.cli.trainer import CommandTrainer
from tests.pretrained import TinyImages

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import head_table
from head_table import Fit

CROSS_ENTROPY, WEIGHTED = "cross-entropy", "SGD, tail loss weighted"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "lite0.pth"
    torch.manual_seed(0)
    torch.save(Timm(head_table.NETWORK)(num_classes=1000).state_dict(), path)
    return path


def test_choices_on_validation_then_the_test_and_a_second_call_trains_nothing(weights, tmp_path, monkeypatch, capsys):
    run = CommandTrainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    files = []
    for seed in (0, 1):
        model = LongTailedClassifier(Timm(head_table.NETWORK), backbone_weights=str(weights), many=50, few=10)
        files.append(str(run.features(model, TinyImages(image_size=32, seed=seed), folder=str(tmp_path), copies=0)))
    for name, value in {
        "EPOCHS": 2,
        "LEARNING_RATES": (0.01, 0.1),
        "RHOS": (0.05, 1.0),
        "TAIL_WEIGHTS": (2.0, 5.0),
        "LOSSES": {CROSS_ENTROPY: head_table.LOSSES[CROSS_ENTROPY]},
        "METHODS": {name: head_table.METHODS[name] for name in ("SGD", WEIGHTED, "ImbSAM")},
    }.items():
        monkeypatch.setattr(head_table, name, value)
    table = tmp_path / "results/heads.csv"
    monkeypatch.setattr(sys, "argv", ["", str(weights), *files, f"--file={table}"])
    head_table.main()
    printed = capsys.readouterr().out
    fits = head_table.read(table)
    assert len(fits) == 2 * (2 + 2 + 2 + 3)  # seeds x (learning rates, radii, weights, the three methods tested)

    def chosen(method, field):
        """The choice with the highest mean accuracy on the validation parts."""
        scores = {}
        for fit, results in fits.items():
            if (fit.part, fit.method) == ("val", method):
                scores.setdefault(getattr(fit, field), []).append(results["all"])
        return max(scores, key=lambda value: sum(scores[value]))

    lr, weight, rho = chosen("SGD", "lr"), chosen(WEIGHTED, "chosen"), chosen("ImbSAM", "chosen")
    tested = [fit for fit in fits if fit.part == "test"]
    assert tested == [
        Fit("test", seed, CROSS_ENTROPY, method, lr, value)
        for method, value in (("SGD", 0.0), (WEIGHTED, weight), ("ImbSAM", rho))
        for seed in (0, 1)
    ]

    before = table.read_bytes()
    head_table.main()
    assert table.read_bytes() == before
    assert printed.endswith(capsys.readouterr().out)
    monkeypatch.setattr(sys, "argv", ["", "--table", f"--file={table}"])
    head_table.main()
    assert printed.endswith(capsys.readouterr().out)


def test_tables_pair_the_seeds_and_take_the_last_choice(tmp_path):
    path = tmp_path / "heads.csv"

    def add(method, seed, rho, accuracy):
        results = dict.fromkeys(head_table.RESULTS, accuracy) | {"seconds": 3.0}
        head_table.append(path, Fit("test", seed, CROSS_ENTROPY, method, 0.1, rho), results)

    add("ImbSAM", 0, 0.05, 0.9)  # of a shorter grid
    for seed, plain in enumerate((0.4, 0.6)):
        add("SGD", seed, 0.0, plain)
        add("ImbSAM", seed, 0.5, plain + 0.01 * (seed + 1))
    with path.open(newline="") as file:
        assert len(list(csv.reader(file))) == 6
    many = len(head_table.MEASURES)
    lines = head_table.tables(head_table.read(path)).splitlines()
    assert lines[2:4] == [
        f"| {CROSS_ENTROPY} | SGD | 0.1 |  | {' | '.join(['50.0 ± 14.1'] * many)} | 3 |",
        f"| {CROSS_ENTROPY} | ImbSAM | 0.1 | 0.5 | {' | '.join(['51.5 ± 14.8'] * many)} | 3 |",
    ]
    assert lines[-1] == f"| {CROSS_ENTROPY} | ImbSAM | {' | '.join(['+1.50 ± 0.50'] * many)} |"


def test_missing_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", "weights.pth"])
    with pytest.raises(SystemExit):
        head_table.main()
    assert "give the weights and the files of features, or --table" in capsys.readouterr().err
