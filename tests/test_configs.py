"""Every piece of configs/ runs two batches on data shaped like the real data set; combinations named in docs parse."""

import json
import logging
import re
import sys
from functools import partial

import pytest
import torch
import yaml

from datamodules import DigitsLTDataModule
from lightning_modules import LongTailedClassifier
from lightning_modules.backbones import SmallCNN
from lightning_modules.cli.run import main
from lightning_modules.cli.trainer import CommandTrainer
from lightning_modules.factories import restore
from tests.pieces import CONFIGS, configs, merged

REPOSITORY = CONFIGS.parent
KINDS = (
    "backbone",
    "data",
    "size",
    "detector",
    "ratio",
    "method",
    "loss",
    "stage",
    "tune",
    "head",
    "calibration",
    "decision",
)
PIECES = sorted(f"{path.parent.name}/{path.stem}" for kind in KINDS for path in (CONFIGS / kind).glob("*.yaml"))
RUNS = [
    ("data/digits_lt", "method/sgd"),
    ("data/digits_lt", "method/sam"),
    ("data/digits_lt", "method/focal_sam", "loss/doubled_tail"),
    ("data/digits_lt", "method/cc_sam"),
    ("data/digits_lt", "method/sse_sam"),
    ("data/digits_lt", "method/gsam"),
    ("data/cifar100_lt", "ratio/50", "method/focal_sam_cifar100", "loss/ldam_drw"),
    ("data/cifar100_lt", "size/small", "ratio/10", "method/imbsam", "stage/weight_balancing_1"),
    ("data/cifar10_lt", "ratio/50_cifar10", "method/focal_sam_cifar10"),
    ("data/cifar10_lt", "ratio/10_cifar10", "loss/balanced_softmax"),
    ("data/imagenet_lt", "method/focal_sam_imagenet", "loss/ldam_drw_imagenet"),
    ("data/places_lt", "method/imbsam", "loss/ldam_drw_places"),
    ("data/inaturalist2018", "method/focal_sam_inaturalist", "stage/weight_balancing_1_imagenet"),
    ("data/image_folder", "size/small_images"),
    ("data/image_list", "method/sgd"),
    ("data/features", "method/imbsam"),
    ("data/multilabel", "method/imbsam"),
    ("data/digits_multilabel", "method/imbsam", "loss/asymmetric"),
    ("data/digits_multilabel", "method/focal_sam", "loss/distribution_balanced"),
    *(
        ("data/image_folder", f"tune/{name}", "head/class_means")
        for name in ("full", "head_only", "last_blocks", "norm")
    ),
    ("data/image_folder", "tune/lora", "head/class_means"),
    ("data/image_folder", "backbone/clip_vit_b16", "tune/adaptformer", "head/text_features", "loss/balanced_softmax"),
    ("data/image_folder", "backbone/pretrained_resnet50", "tune/last_blocks"),
    ("data/cifar100_lt", "backbone/pretrained_efficientnet_lite0"),
    *(
        ("data/anomaly_table", f"detector/{name}")
        for name in ("devnet", "deep_sad", "prenet", "feawad", "classifier", "boosting")
    ),
    ("data/anomaly_images", "detector/deep_sad_images"),
]
DECIDED = [
    *(("data/digits_lt", f"calibration/{name}") for name in ("prior", "temperature", "vector")),
    ("data/digits_lt", "loss/balanced_softmax", "calibration/prior", "decision/coverage"),
    *(("data/anomaly_table", "detector/devnet", f"decision/{name}") for name in ("recall", "false_alarms", "costs")),
    ("data/anomaly_table", "detector/devnet", "calibration/isotonic", "decision/coverage"),
    ("data/digits_lt", "decision/drift"),
]
"""These fit when a training ends, which a run of two batches leaves out."""
SECOND_STAGES = ["crt", "lws", "tau_norm", "weight_balancing_2", "weight_balancing_2_imagenet"]
TREES = {
    "cifar10_lt": "cifar10_root",
    "cifar100_lt": "cifar100_root",
    "imagenet_lt": "imagenet_lt_root",
    "places_lt": "places_lt_root",
    "inaturalist2018": "inaturalist2018_root",
    "image_folder": "image_folder_root",
    "image_list": "image_list",
    "multilabel": "image_list",
}
"""The fixture with a tree of the data set's shape."""
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
SMALL = ["--data.batch_size=4", "--data.eval_batch_size=4", "--data.num_workers=0"]


def fit(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["imbsam", "fit", *map(str, arguments), *QUIET])
    main()


def data_arguments(pieces, request):
    """Arguments for the small tree, with images and a network small enough to take no time."""
    name = pieces[0].removeprefix("data/")
    if name.startswith("anomaly"):
        return ["--data.batch_size=16"]
    if name == "features":
        return [f"--config={request.getfixturevalue('features')}", *SMALL[:2]]
    if name not in TREES:
        return SMALL
    option = "path" if TREES[name] == "image_list" else "root"
    tree = [f"--data.{option}={request.getfixturevalue(TREES[name])}", *SMALL]
    tree += ["--data.val_share=0"] if name == "image_folder" else []
    tree += ["--data.label_column=label"] if name == "multilabel" else []
    network = ["--model.backbone=CifarResNet20", "--model.backbone.width=4"]
    if "tune/lora" in pieces:
        settings = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2}
        network = ["--model.backbone=Timm", "--model.backbone.name=vit_tiny_patch16_224"]
        network += [f"--model.backbone.settings={json.dumps(settings)}"]
    elif "head/text_features" in pieces:
        network = ["--model.backbone=OpenCLIP", f"--model.backbone.name={request.getfixturevalue('tiny_clip')}"]
        network += ['--model.backbone.settings={"force_image_size": 32}']
    weights = request.getfixturevalue("clip_weights") if "head/text_features" in pieces else "null"  # random ones
    network += [f"--model.backbone_weights={weights}"]
    return tree + network + ([] if name.startswith("cifar") else ["--data.image_size=32"])


@pytest.fixture(scope="module")
def clip_weights(tiny_clip, tmp_path_factory):
    import open_clip

    path = tmp_path_factory.mktemp("clip_weights") / "clip.pt"
    torch.save(open_clip.create_model(tiny_clip, pretrained=None).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """The piece beside the features of the digits by a random network."""
    folder = tmp_path_factory.mktemp("features")
    torch.save(SmallCNN(10, width=4).state_dict(), folder / "weights.pt")
    model = LongTailedClassifier(partial(SmallCNN, width=4), backbone_weights=str(folder / "weights.pt"))
    run = CommandTrainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    return run.features(model, DigitsLTDataModule(), folder=str(folder)).with_suffix(".yaml")


@pytest.mark.parametrize("pieces", RUNS, ids=" ".join)
def test_pieces_run(pieces, request, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    fit(monkeypatch, *configs(*pieces), "--trainer.fast_dev_run=2", *data_arguments(pieces, request))


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("cifar100_lt_clip", "apple", "worm"),
        ("imagenet_lt_clip", "tench", "tiger shark"),
        ("places_lt_clip", "airfield", "zen"),
        ("inaturalist2018_clip", "Quercus robur", "Vulpes lagopus"),
    ],
)
def test_lifts_benchmarks_run(name, first, last, request, monkeypatch, tmp_path, caplog):
    """The first row of their tables, which is LIFT, with a tiny CLIP; training and test with its five crops."""
    table = yaml.safe_load((CONFIGS / "tables.yaml").read_text())["tables"][name]
    row = table["rows"][0]
    pieces = [*table["pieces"], *row["pieces"]]
    own = data_arguments(pieces, request)
    if name == "imagenet_lt_clip":  # whose folders are WordNet's ids
        (tmp_path / "names.txt").write_text("tench\ngoldfish\ngreat white shark\ntiger shark\n")
        own.append(f"--model.head_init.names={tmp_path / 'names.txt'}")
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit(monkeypatch, *configs(*pieces), *row["settings"], "--trainer.fast_dev_run=2", *own)
    assert f'prompts, from "a photo of a {first}." to "a photo of a {last}."' in caplog.text


@pytest.mark.parametrize("pieces", DECIDED, ids=" ".join)
def test_decisions_and_calibration_are_fitted(pieces, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    fit(monkeypatch, *configs(*pieces), *short, *(["--data.batch_size=64"] if "anomaly" in pieces[0] else []))
    (checkpoint,) = tmp_path.glob("logs/*/*/version_0/checkpoints/last.ckpt")
    saved = torch.load(checkpoint, weights_only=True)["callbacks"]
    wanted = merged(*pieces)
    for name, key in (("calibration", "Calibration"), ("decisions", "Decisions"), ("drift", "Drift")):
        assert (name in wanted) == bool(saved.get(key, {}).get("fitted")), capsys.readouterr().err


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("first"))
        fit(patch, *configs("data/digits_lt", "method/sgd"), "--trainer.max_epochs=1", *SMALL[1:])
        (checkpoint,) = CONFIGS.cwd().glob("logs/digits_lt/sgd/version_0/checkpoints/last.ckpt")
        return checkpoint


@pytest.mark.parametrize("stage", SECOND_STAGES)
def test_second_stages_run(stage, first_stage, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    pieces = configs("data/digits_lt", "method/imbsam", f"stage/{stage}")
    short = ["--data.val_share=0.1", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    fit(monkeypatch, *pieces, f"--model.checkpoint={first_stage}", *short, *SMALL)
    assert (tmp_path / f"logs/digits_lt/imbsam_{stage}/version_0/config.yaml").exists()


def test_every_piece_is_run_here():
    stages = {f"stage/{name}" for name in SECOND_STAGES}
    assert {piece for run in [*RUNS, *DECIDED] for piece in run} | stages == set(PIECES)


@pytest.mark.parametrize("piece", PIECES)
def test_a_piece_says_where_its_settings_come_from(piece):
    assert (CONFIGS / f"{piece}.yaml").read_text().startswith("# ")


@pytest.mark.parametrize("piece", [piece for piece in PIECES if piece.startswith("data/")])
def test_data_name_a_network_that_can_be_built_and_a_cosine_as_long_as_the_run(piece):
    model = merged(piece)["model"].get("init_args", {})
    if "backbone" in model:
        choice = {**model["backbone"], "class_path": f"lightning_modules.backbones.{model['backbone']['class_path']}"}
        with torch.device("meta"):
            restore(choice)(num_classes=3)
        assert model["lr_scheduler"] == {"class_path": "CosineToEnd"}


def test_deferred_weights_come_before_the_end():
    for data, loss in (
        ("cifar100_lt", "ldam_drw"),
        ("imagenet_lt", "ldam_drw_imagenet"),
        ("places_lt", "ldam_drw_places"),
    ):
        trainer = merged(f"data/{data}", f"loss/{loss}")["trainer"]
        assert 0 < trainer["callbacks"][0]["init_args"]["start_epoch"] < trainer["max_epochs"]


@pytest.mark.parametrize(
    ("data", "ratios"),
    [
        ("digits_lt", []),
        ("cifar100_lt", ["ratio/50", "ratio/10"]),
        ("cifar10_lt", ["ratio/50_cifar10", "ratio/10_cifar10"]),
    ],
)
def test_eta_leaves_a_tail_and_a_head(data, ratios):
    from datamodules import imbalanced_class_counts

    largest = {"digits_lt": (122, 10), "cifar10_lt": (5000, 10), "cifar100_lt": (500, 100)}[data]
    for overlay in [(), *((ratio,) for ratio in ratios)]:
        config = merged(f"data/{data}", *overlay)
        counts = imbalanced_class_counts(*largest, config["data"]["init_args"]["ratio"], "exponential")
        tail = torch.tensor(counts) < config["model"]["init_args"]["sam"]["init_args"]["eta"]
        assert 0 < tail.sum() < len(counts), overlay


def named_in_docs():
    """The commands of README and docs that name configs, by their configs; a backslash continues a line."""
    texts = [path.read_text() for path in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]]
    texts += [path.read_text() for path in sorted(CONFIGS.rglob("*.yaml"))]
    lines = [line for text in texts for line in text.replace("\\\n", " ").splitlines() if "--config configs/" in line]
    found = {tuple(re.findall(r"--config configs/([\w/]+)\.yaml", line)) for line in lines}
    return sorted(pieces if pieces[0].startswith("data/") else ("data/digits_lt", *pieces) for pieces in found)


@pytest.mark.parametrize("pieces", named_in_docs(), ids=" ".join)
def test_combinations_named_in_docs_parse(pieces, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    needed = ["--model.checkpoint=first.ckpt"] if set(pieces) & {f"stage/{name}" for name in SECOND_STAGES} else []
    monkeypatch.setattr(sys, "argv", ["imbsam", "fit", *configs(*pieces), *needed, "--print_config"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    assert {"model", "data", "trainer"} <= yaml.safe_load(capsys.readouterr().out).keys()


def test_docs_name_only_existing_configs():
    text = [*(REPOSITORY / "docs").glob("*.md"), REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
    scripts = [path for suffix in ("py", "sh", "sbatch") for path in (REPOSITORY / "scripts").rglob(f"*.{suffix}")]
    for path in [*text, *CONFIGS.rglob("*.yaml"), *scripts, REPOSITORY / "Makefile"]:
        for name in re.findall(r"configs/[\w/]+\.yaml", path.read_text()):
            assert (REPOSITORY / name).exists(), f"{path.name}: {name}"
