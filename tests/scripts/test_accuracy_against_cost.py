"""scripts/accuracy_against_cost.py on the logs of eight runs."""

import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from accuracy_against_cost import main

COLUMNS = "epoch,train/loss_epoch,test/loss,test/many,test/medium,test/few,test/all"


def log(folder, sam, seed, accuracy, callbacks=None):
    """The files of a run of one epoch of ten that the script reads."""
    folder = folder / f"version_{len(list(folder.parent.rglob('version_*')))}"
    folder.mkdir(parents=True)
    model = {"class_path": "LongTailedClassifier", "init_args": {"backbone": backbone(), "sam": sam}}
    data = {"class_path": "DigitsLTDataModule", "init_args": {"batch_size": 16, "seed": seed}}
    trainer = {"max_epochs": 10, "callbacks": callbacks}
    config = {"seed_everything": seed, "trainer": trainer, "model": model, "data": data}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.csv").write_text(f"{COLUMNS}\n9,0.1,0.2,0.9,0.8,{accuracy - 0.2},{accuracy}\n")


def backbone():
    return {"class_path": "lightning_modules.backbones.SmallCNN", "init_args": {"width": 4}}


def test_table_and_figure(tmp_path, monkeypatch, capsys):
    norm = {"class_path": "imbsam.ImbSAM", "init_args": {"rho": 1.0, "perturb": "norm"}}
    whole = {"class_path": "imbsam.ImbSAM", "init_args": {**norm["init_args"], "first_pass": "whole"}}
    schedule = {"class_path": "RhoSchedule", "init_args": {"start_epoch": 5, "every_n_steps": 2}}
    for seed, plain in enumerate((0.5, 0.6)):
        log(tmp_path / "sgd", {"class_path": "imbsam.Plain", "init_args": {"eta": 20}}, seed, plain)
        log(tmp_path / "imbsam", norm, seed, plain + 0.1)
        log(tmp_path / "imbsam", whole, seed, plain + 0.1)
        log(tmp_path / "imbsam", norm, seed, plain + 0.05, [schedule])
    figure = tmp_path / "figure.png"
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path), "--out", str(figure), "--rounds", "5"])
    main()
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines[2:]}
    plain = cells["SGD"]
    dense = cells["ImbSAM, rho 1, norm alone"]
    whole = cells["ImbSAM, rho 1, norm alone, whole first pass"]
    sparse = cells["ImbSAM, rho 1, norm alone, every 2 steps, last 50 % of the epochs"]
    assert plain == ["1.00", "1.00", "35.0 ± 5.0", "55.0 ± 5.0", "", "2"]
    assert dense[2:] == whole[2:] == ["45.0 ± 5.0", "65.0 ± 5.0", "+10.0 ± 0.0", "2"]
    assert sparse[4:] == ["+5.0 ± 0.0", "2"]
    assert float(dense[0]) < float(whole[0])  # the modules split the first pass: 1 + t in place of 1 + 2t
    # perturbed at every second step of the second half
    for of_sparse, of_dense in zip(sparse[:2], dense[:2], strict=True):
        assert float(of_sparse) == pytest.approx(1 + (float(of_dense) - 1) / 4, abs=0.01)
    assert figure.stat().st_size > 5000
