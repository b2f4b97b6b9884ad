"""The trainings of docs/fine_tuning.md run on a small folder of images, with random weights in place of downloads."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from lightning_modules.backbones import Torchvision
from lightning_modules.cli.run import main

PAGE = (Path(__file__).resolve().parents[2] / "docs/fine_tuning.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
FEW = [
    *("--trainer.max_epochs=1", "--data.batch_size=2", "--trainer.enable_progress_bar=false"),
    *(f"--trainer.limit_{part}_batches=1" for part in ("train", "val", "test")),
]


@pytest.fixture
def my_images(image_tree, tmp_path, monkeypatch):
    """`my_images`, the folder of the page, in the current one: 3 classes."""
    monkeypatch.chdir(tmp_path)
    for label, (name, count) in enumerate({"ant": 20, "bee": 10, "cat": 10}.items()):
        for i in range(count + 2):
            image_tree.put(tmp_path / "my_images", f"{'train' if i < count else 'test'}/{name}/{i}.jpg", label)


def fit(block, monkeypatch, *settings):
    args = [*shlex.split(BLOCKS[block].replace("\\\n", " ")), *FEW, *settings]
    assert args[:2] == ["imbsam", "fit"]
    monkeypatch.setattr(sys, "argv", args)
    main()  # ends with SystemExit where it fails
    return torch.load(next(Path().rglob("last.ckpt")), weights_only=True)["state_dict"]


def test_resnet50(my_images, monkeypatch):
    torch.manual_seed(0)
    started = Torchvision("resnet50")(1000).state_dict()
    for name, value in started.items():
        if name.endswith("bn3.weight"):  # random blocks with BatchNorm's first statistics would grow to infinity
            value.fill_(0.1)
    torch.save(started, "resnet50.pth")
    trained = fit(0, monkeypatch, "--model.backbone_weights=resnet50.pth")
    changed = {name for name, value in started.items() if not torch.equal(value, trained[f"backbone.{name}"])}
    assert {name.rpartition(".")[0].partition(".")[0] for name in changed} == {"layer4", "fc"}
    assert not any(name.startswith(("layer4.0.", "layer4.1.")) for name in changed)


@pytest.mark.parametrize("name", ["tiny-clip", pytest.param("ViT-B-16-quickgelu", marks=pytest.mark.slow)])
def test_clip(name, my_images, tiny_clip, monkeypatch):
    import open_clip

    torch.manual_seed(0)
    started = open_clip.create_model(name, load_weights=False).state_dict()
    torch.save(started, "clip.pt")
    trained = fit(1, monkeypatch, "--model.backbone_weights=clip.pt", f"--model.backbone.name={name}")
    weights, biases = ([t for n, t in trained.items() if n.endswith(f"adapter.2.{k}")] for k in ("weight", "bias"))
    assert len(weights) == len(biases) == open_clip.get_model_config(name)["vision_cfg"]["layers"]
    assert all(bias.any() for bias in biases)  # both start as 0
    assert all(weight.any() for weight in weights)
    clip = open_clip.create_model(name, load_weights=False).eval()
    clip.load_state_dict(started)
    tokens = open_clip.get_tokenizer(name)([f"a photo of a {animal}." for animal in ("ant", "bee", "cat")])
    with torch.no_grad():
        text = torch.nn.functional.normalize(clip.encode_text(tokens), dim=1)
    moved = trained["backbone.fc.weight"] - text  # by SGD's steps at 0.01 in one epoch
    assert 0 < moved.norm() < 0.5 * text.norm()
    first = "transformer.resblocks.0.attn.in_proj_weight"
    assert torch.equal(trained[f"backbone.visual.{first}"], started[f"visual.{first}"])
