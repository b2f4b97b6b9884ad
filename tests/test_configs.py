"""Every config builds what it names and runs two batches."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_modules.cli import main

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path for path in (REPOSITORY / "configs").glob("*_lt/*.yaml"))
SHORT = [
    "--trainer.fast_dev_run=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--data.batch_size=4",
    "--data.eval_batch_size=4",
]


def test_every_data_set_has_every_method():
    for folder in {path.parent for path in CONFIGS}:
        assert {"sgd", "sam", "imbsam", "focal_sam"} <= {path.stem for path in folder.glob("*.yaml")}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_config_runs(path, request, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    data = []
    if path.parent.name == "cifar100_lt":
        data = [f"--data.root={request.getfixturevalue('cifar100_root')}"]
    elif path.parent.name == "cifar10_lt":
        data = [f"--data.root={request.getfixturevalue('cifar10_root')}"]
    # a ResNet-34 of the config's width takes minutes here; its width is the backbone tests' business
    narrow = ["--model.backbone_args={width: 8}"] if "resnet34" in path.read_text() else []
    monkeypatch.setattr(sys, "argv", ["imbsam", "fit", "--config", str(path), *SHORT, *data, *narrow])
    main()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_config_is_consistent(path):
    text = path.read_text()
    assert text.startswith("#"), "a head comment says where the settings come from"
    config = yaml.safe_load(text)
    model = config["model"]["init_args"]
    assert path.stem.removesuffix("_small") == model["method"]
    assert model["lr_scheduler"]["init_args"]["T_max"] == config["trainer"]["max_epochs"]


def test_eta_of_every_config_leaves_a_tail_and_a_head():
    from datamodules import imbalanced_class_counts

    largest = {"digits_lt": (122, 10), "cifar10_lt": (5000, 10), "cifar100_lt": (500, 100)}
    for path in CONFIGS:
        config = yaml.safe_load(path.read_text())
        counts = imbalanced_class_counts(
            *largest[path.parent.name], config["data"]["init_args"]["ratio"], "exponential"
        )
        tail = torch.tensor(counts) < config["model"]["init_args"]["eta"]
        assert 0 < tail.sum() < len(counts), path
