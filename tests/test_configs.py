"""Every config builds what it names and runs two batches on data of the real set's shape."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_modules.backbones import create_backbone
from lightning_modules.cli.run import main

REPOSITORY = Path(__file__).resolve().parents[1]
SETS = {
    "digits_lt": None,
    "cifar10_lt": "cifar10_root",
    "cifar100_lt": "cifar100_root",
    "imagenet_lt": "imagenet_lt_root",
    "places_lt": "places_lt_root",
    "inaturalist2018": "inaturalist2018_root",
    "image_folder": "image_folder_root",
    "image_list": "image_list",
}
"""Folders of configs, and the fixture with a tree of the data set's shape."""
OF_FILES = ("imagenet_lt", "places_lt", "inaturalist2018", "image_folder")
FILES = [path for name in SETS for path in sorted((REPOSITORY / "configs" / name).glob("*.yaml"))]
OVERLAYS = [path for path in FILES if path.stem.startswith("ratio_")]
CONFIGS = [path for path in FILES if path not in OVERLAYS]
METHODS = {"Plain": "sgd", "SAM": "sam", "ImbSAM": "imbsam", "FocalSAM": "focal_sam"}
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=false"]
SMALL = ["--data.batch_size=4", "--data.eval_batch_size=4", "--data.num_workers=0"]


def eta_of(config, default):
    return config["model"]["init_args"]["sam"]["init_args"]["eta"] if "model" in config else default


def name(path):
    return f"{path.parent.name}/{path.stem}"


def fit(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["imbsam", "fit", *map(str, arguments), *SMALL])
    main()


def data_arguments(path, request):
    """Where the small tree lies, and images of a size that takes no time."""
    fixture = SETS[path.parent.name]
    if fixture == "image_list":
        return [f"--data.path={request.getfixturevalue(fixture)}", "--data.image_size=32"]
    own_validation = ["--data.val_share=0"] if fixture == "image_folder_root" else []
    root = [f"--data.root={request.getfixturevalue(fixture)}"] if fixture else []
    return root + own_validation + (["--data.image_size=32"] if path.parent.name in OF_FILES else [])


def backbone_arguments(path):
    """A small network in place of one that takes minutes here; `test_config_names_a_backbone` builds the real one."""
    if "resnet" not in path.read_text():
        return []
    return ["--model.backbone=cifar_resnet20", "--model.backbone_args={width: 4}"]


def test_every_data_set_has_every_method():
    tricks = {"imbsam_ldam_drw", "imbsam_balanced_softmax"}
    tricks |= {"imbsam_weight_balancing_stage1", "imbsam_weight_balancing_stage2"}
    for folder in SETS:
        stems = {path.stem for path in CONFIGS if path.parent.name == folder}
        assert {"sgd", "imbsam"} <= stems
        if not folder.startswith("image_"):
            assert {"sam", "focal_sam"} <= stems
            assert tricks <= stems or folder == "digits_lt"


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_config_runs(path, request, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    data = data_arguments(path, request)
    if not path.stem.endswith("_stage2"):
        short = ["--trainer.fast_dev_run=2", *QUIET[:2]]
        fit(monkeypatch, "--config", path, *short, *data, *backbone_arguments(path))
        return
    first = path.with_stem(path.stem.replace("stage2", "stage1"))
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_test_batches=1", *QUIET[:2]]
    fit(monkeypatch, "--config", first, *short, *data, *backbone_arguments(first))
    (checkpoint,) = tmp_path.glob("logs/*/*/version_0/checkpoints/last.ckpt")
    fit(
        monkeypatch, "--config", path, "--trainer.fast_dev_run=2", *QUIET[:2], *data, f"--model.checkpoint={checkpoint}"
    )


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_config_is_consistent(path):
    text = path.read_text()
    assert text.startswith("#"), "a head comment says where the settings come from"
    config = yaml.safe_load(text)
    model = config["model"]["init_args"]
    method = METHODS[model["sam"]["class_path"]]
    assert path.stem == method or path.stem.startswith(f"{method}_")
    assert model["lr_scheduler"] == {"class_path": "CosineToEnd"}, "its length is that of the run"
    for callback in config["trainer"].get("callbacks", []):
        assert callback["init_args"].get("start_epoch", 0) < config["trainer"]["max_epochs"]


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_config_names_a_backbone(path):
    model = yaml.safe_load(path.read_text())["model"]["init_args"]
    if "backbone" in model:
        with torch.device("meta"):
            create_backbone(model["backbone"], num_classes=3, **model.get("backbone_args", {}))


@pytest.mark.parametrize("path", OVERLAYS, ids=name)
def test_ratio_overlays_go_over_a_config(path, monkeypatch, capsys):
    overlay = yaml.safe_load(path.read_text())
    for config in (path.with_stem("imbsam"), path.with_stem("imbsam_ldam_drw")):
        arguments = ["fit", "--config", str(config), "--config", str(path), "--print_config"]
        monkeypatch.setattr(sys, "argv", ["imbsam", *arguments])
        with pytest.raises(SystemExit) as done:
            main()
        assert done.value.code == 0
        merged = yaml.safe_load(capsys.readouterr().out)
        eta = yaml.safe_load(config.read_text())["model"]["init_args"]["sam"]["init_args"]["eta"]
        assert merged["data"]["init_args"]["ratio"] == overlay["data"]["init_args"]["ratio"]
        assert merged["model"]["init_args"]["sam"]["init_args"]["eta"] == eta_of(overlay, eta)


def test_eta_of_every_config_leaves_a_tail_and_a_head():
    from datamodules import imbalanced_class_counts

    largest = {"digits_lt": (122, 10), "cifar10_lt": (5000, 10), "cifar100_lt": (500, 100)}
    for path in FILES:
        if path.parent.name in largest:
            config = yaml.safe_load(path.read_text())
            ratio = config["data"]["init_args"]["ratio"]
            counts = imbalanced_class_counts(*largest[path.parent.name], ratio, "exponential")
            eta = eta_of(config, 20)
            tail = torch.tensor(counts) < eta
            assert 0 < tail.sum() < len(counts), path
