"""Networks of libraries with their weights: files, folders, caches; other sizes, other heads, other architectures."""

import json
import logging
import re
import socket
import time
from functools import partial

import pytest
import torch
from torch.testing import assert_close
from torchvision.models import VisionTransformer

from imbsam.errors import SettingError
from lightning_modules.backbones import HuggingFace, OpenCLIP, SmallCNN, Timm, Torchvision
from lightning_modules.backbones.hub import _answers
from lightning_modules.backbones.input_errors import FAILURES, input_error
from lightning_modules.backbones.library import MissingWeights
from lightning_modules.backbones.positions import resample_positions
from tests.pretrained import HF_VIT, TIMM_VIT, hf_vit_folder, load_weights, randomize


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    return hf_vit_folder(tmp_path_factory.mktemp("hf"))


def images(size=16):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def one_line(error):
    return "\n" not in str(error.value)


def test_a_folder_of_transformers_gives_architecture_and_weights(hf_folder, caplog):
    from transformers import ViTForImageClassification

    choice = HuggingFace(str(hf_folder))
    same, fewer = choice(num_classes=7), choice(num_classes=3)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        assert load_weights(same, hf_folder, choice) == []
        assert load_weights(fewer, hf_folder, choice) == ["model.classifier.weight", "model.classifier.bias"]
    assert (
        "as initialised: model.classifier.weight, model.classifier.bias (the head there has 7 classes)" in caplog.text
    )
    wanted = ViTForImageClassification.from_pretrained(hf_folder).eval()
    with torch.no_grad():
        assert_close(same.eval()(images()), wanted(images()).logits)
        features = wanted.vit(images()).last_hidden_state[:, 0]
        assert_close(fewer.eval()(images()), fewer.model.classifier(features))


def test_a_bare_model_of_transformers_is_read_too(tmp_path):
    from transformers import ViTConfig, ViTModel

    bare = ViTModel(ViTConfig(**HF_VIT))
    bare.save_pretrained(tmp_path)
    choice = HuggingFace(str(tmp_path))
    network = choice(num_classes=3)
    assert load_weights(network, tmp_path, choice) == ["model.classifier.weight", "model.classifier.bias"]
    assert torch.equal(network.model.vit.embeddings.cls_token, bare.embeddings.cls_token)


def test_a_file_of_transformers_names_is_read(tmp_path, hf_folder):
    choice = HuggingFace("vit", HF_VIT)
    network = choice(num_classes=7)
    assert load_weights(network, hf_folder / "model.safetensors", choice) == []


def test_a_kind_of_model_needs_no_files_and_the_checkpoint_holds_the_configuration(hf_folder):
    from lightning_modules.factories import describe, restore

    assert HuggingFace("vit", HF_VIT)(num_classes=3)(images()).shape == (2, 3)
    described = describe(HuggingFace(str(hf_folder), {"image_size": 32}))
    described["init_args"]["name"] = "/nowhere/any/more"
    again = restore(json.loads(json.dumps(described)))
    assert again(num_classes=2)(images(32)).shape == (2, 2)


def test_open_clips_tower_is_its_encode_image(tiny_clip, tmp_path):
    import open_clip

    model = randomize(open_clip.create_model(tiny_clip, pretrained=None)).eval()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    choice = OpenCLIP(tiny_clip)
    network = choice(num_classes=3)
    assert load_weights(network, tmp_path / "clip.pt", choice) == ["fc.weight", "fc.bias"]
    with torch.no_grad():
        assert_close(network.eval()(images()), network.fc(model.encode_image(images())))
        tokens = open_clip.get_tokenizer(tiny_clip)(["a dog", "a cat"])
        found = choice.text_features(["a dog", "a cat"], str(tmp_path / "clip.pt"))
        assert_close(found, model.encode_text(tokens))


@pytest.mark.parametrize("library", ["timm", "torchvision", "open_clip", "transformers"])
def test_another_size_interpolates_the_positions_with_a_line(library, tiny_clip, tmp_path, caplog):
    small, large = {
        "timm": (TIMM_VIT, Timm(TIMM_VIT.name, {**TIMM_VIT.settings, "img_size": 32})),
        "torchvision": tuple(partial(VisionTransformer, size, 4, 2, 2, 16, 32) for size in (16, 32)),
        "open_clip": (OpenCLIP(tiny_clip), OpenCLIP(tiny_clip, {"force_image_size": 32})),
        "transformers": tuple(HuggingFace("vit", {**HF_VIT, "image_size": size}) for size in (16, 32)),
    }[library]
    torch.save(small(num_classes=2).state_dict(), tmp_path / "small.pth")
    network = large(num_classes=2)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        assert load_weights(network, tmp_path / "small.pth", large) == []
    assert "interpolated from 17 positions to 65" in caplog.text
    assert network(images(32)).shape == (2, 2)


def test_positions_are_interpolated_as_timm_does():
    from timm.layers import resample_abs_pos_embed

    for prefix, old, new in ((1, 4, 7), (0, 6, 3), (2, 14, 7), (5, 16, 24)):
        table = torch.randn(1, prefix + old**2, 8)
        wanted = resample_abs_pos_embed(table, (new, new), num_prefix_tokens=prefix)
        assert_close(resample_positions(table, prefix + new**2), wanted)
        assert_close(resample_positions(table[0], prefix + new**2), wanted[0])
    assert resample_positions(torch.randn(1, 17, 8), 13) is None


def test_weights_of_another_architecture_change_nothing(tmp_path, hf_folder):
    torch.save(TIMM_VIT(num_classes=2).state_dict(), tmp_path / "vit.pth")
    for choice, source in (
        (Timm("test_resnet"), tmp_path / "vit.pth"),
        (Timm(TIMM_VIT.name, {**TIMM_VIT.settings, "depth": 3}), tmp_path / "vit.pth"),
        (HuggingFace("vit", {**HF_VIT, "num_hidden_layers": 3}), hf_folder),
        (HuggingFace("convnext", {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}), hf_folder),
    ):
        network = choice(num_classes=2)
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        with pytest.raises(SettingError, match=r"which does not fit .*missing") as error:
            load_weights(network, source, choice)
        assert one_line(error)
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_pickled_code_runs_only_if_it_is_named(tmp_path):
    path = tmp_path / "whole.pth"
    torch.save({"model": SmallCNN(3, width=4)}, path)
    network = SmallCNN(3, width=4)
    with pytest.raises(SettingError, match=f"so it is refused; .* name it pickle:{re.escape(str(path))}"):
        load_weights(network, path)
    assert load_weights(network, f"pickle:{path}") == []


@pytest.mark.parametrize(
    ("choice", "source", "says"),
    [
        (Torchvision("resnet18"), "pretrained:V9", "pretrained:V9: resnet18 has IMAGENET1K_V1, DEFAULT"),
        (Timm("resnet18"), "pretrained:v9", "pretrained:v9: timm has .*resnet18.a1_in1k"),
        (OpenCLIP("RN50-quickgelu"), "pretrained", "pretrained: open_clip's of RN50-quickgelu are .*pretrained:openai"),
        (OpenCLIP("ViT-B-32"), "pretrained:openai", "QuickGELU.*set model.backbone.name to ViT-B-32-quickgelu"),
        (HuggingFace("vit"), "pretrained", "vit, a kind of model without weights"),
        (SmallCNN, "pretrained", "of no library that has weights"),
        (Timm("test_resnet"), ".", r"backbone_weights is \.: a folder; Timm takes a file"),
    ],
)
def test_weights_that_nobody_has_are_one_line(choice, source, says):
    network = SmallCNN(3, width=4)
    with pytest.raises(SettingError, match=says) as error:
        load_weights(network, source, choice)
    assert one_line(error)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """A proxy that nothing listens at, empty caches, and the hub's offline mode off."""
    from huggingface_hub.utils import close_session

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{free.getsockname()[1]}"
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, proxy)
        monkeypatch.setenv(name.upper(), proxy)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("urllib.request._opener", None)  # which keeps the proxies of its first use
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path))
    close_session()
    _answers.cache_clear()
    yield
    close_session()
    _answers.cache_clear()


@pytest.mark.parametrize(
    "choice",
    [
        *(Torchvision("resnet18"), Timm("resnet18"), OpenCLIP("ViT-B-32")),
        HuggingFace("a/vit", config={"model_type": "vit"}),
    ],
    ids=lambda choice: type(choice).__name__,
)
@pytest.mark.usefixtures("no_network")
def test_no_network_is_one_line(choice, caplog, capfd):
    tag = "pretrained:laion2b_e16" if isinstance(choice, OpenCLIP) else "pretrained"
    start = time.monotonic()
    with pytest.raises(MissingWeights, match=rf"{tag}: .* could not load those of .*\); offline\? give a local") as e:
        load_weights(SmallCNN(3, width=4), tag, choice)
    assert one_line(e)
    if not isinstance(choice, Torchvision):
        assert "(https://huggingface.co cannot be reached, and the hub's cache does not have it)" in str(e.value)
    assert time.monotonic() - start < 5
    assert not caplog.records
    out, err = capfd.readouterr()
    assert "Retrying" not in out + err


@pytest.mark.usefixtures("no_network")
def test_a_repository_without_a_network_is_one_line(caplog):
    start = time.monotonic()
    with pytest.raises(SettingError, match=r"a/vit: its config.json cannot be read \(https://.*\): name a") as e:
        HuggingFace("a/vit")(3)
    assert one_line(e)
    assert HuggingFace("vit", HF_VIT).preprocessing("file.pth") == {"image_size": 16}  # a kind: nothing to read
    assert time.monotonic() - start < 5
    assert not caplog.records


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("text", "ask", "says"),
    [
        (
            {"hf_tokenizer_name": "a/tokenizer"},
            lambda choice: choice.text_features(["a dog"], "clip.pt"),
            "head_init is TextFeatures, and the tokenizer or text tower of clip-of-the-hub cannot be read",
        ),
        (
            {"hf_model_name": "a/text"},
            lambda choice: choice(num_classes=2),
            "backbone.name is clip-of-the-hub: building it takes files of the hub",
        ),
    ],
    ids=["tokenizer", "tower"],
)
def test_a_clip_whose_text_is_of_the_hub_is_one_line_without_a_network(text, ask, says, tmp_path, caplog, capfd):
    import open_clip

    tower = {"image_size": 16, "patch_size": 4, "layers": 1, "width": 16, "head_width": 8}
    text = {"vocab_size": 99, "layers": 1, "width": 16, "heads": 2, **text}
    config = tmp_path / "clip-of-the-hub.json"
    config.write_text(json.dumps({"embed_dim": 8, "vision_cfg": tower, "text_cfg": text}))
    open_clip.add_model_config(config)
    choice, start = OpenCLIP("clip-of-the-hub"), time.monotonic()
    with pytest.raises(SettingError, match=rf"{says}.* \(https://huggingface.co cannot be reached, and the") as error:
        ask(choice)
    assert one_line(error)
    assert time.monotonic() - start < 5
    assert not caplog.records
    out, err = capfd.readouterr()
    assert "Retrying" not in out + err


@pytest.mark.usefixtures("no_network")
def test_without_a_network_the_hubs_cache_serves(tmp_path, monkeypatch):
    snapshot = hf_vit_folder(tmp_path / "models--a--vit/snapshots/0123456789abcdef0123456789abcdef01234567")
    (tmp_path / "models--a--vit/refs").mkdir()
    (tmp_path / "models--a--vit/refs/main").write_text(snapshot.name)
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path), raising=False)
    choice = HuggingFace("a/vit")
    network = choice(num_classes=3)
    assert load_weights(network, "pretrained", choice) == ["model.classifier.weight", "model.classifier.bias"]
    assert choice.preprocessing("pretrained")["mean"] == [0.4] * 3


def test_torchvisions_weights_come_from_its_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path))
    choice = Torchvision("resnet18")
    file = tmp_path / "checkpoints" / "resnet18-f37072fd.pth"
    file.parent.mkdir()
    theirs = choice(num_classes=1000).state_dict()
    torch.save(theirs, file)
    network = choice(num_classes=5)
    assert load_weights(network, "pretrained:IMAGENET1K_V1", choice) == ["fc.weight", "fc.bias"]
    assert torch.equal(network.conv1.weight, theirs["conv1.weight"])


def test_the_librarys_classifier_is_not_taken_even_if_it_fits(monkeypatch, tmp_path, caplog):
    """On ImageNet-LT it would be that of the balanced ImageNet."""
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path))
    choice = Torchvision("resnet18")
    (tmp_path / "checkpoints").mkdir()
    torch.save(choice(num_classes=1000).state_dict(), tmp_path / "checkpoints/resnet18-f37072fd.pth")
    network = choice(num_classes=1000)
    before = network.fc.weight.clone()
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        assert load_weights(network, "pretrained:IMAGENET1K_V1", choice) == ["fc.weight", "fc.bias"]
    assert torch.equal(network.fc.weight, before)
    assert "as initialised: fc.weight, fc.bias (the head there is for the library's 1000 classes)" in caplog.text


def test_other_weights_name_the_network_that_was_chosen(tmp_path):
    torch.save(Torchvision("resnet34")(num_classes=3).state_dict(), tmp_path / "resnet34.pth")
    choice = Torchvision("resnet18")
    with pytest.raises(SettingError, match=r"resnet34.pth, which does not fit Torchvision resnet18: 96 unknown"):
        load_weights(choice(num_classes=3), tmp_path / "resnet34.pth", choice)


def swin(size, window):
    settings = {"img_size": size, "window_size": window, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1] * 4}
    return Timm("swin_tiny_patch4_window7_224", settings)


@pytest.mark.parametrize(
    ("theirs", "own", "says"),
    [
        (TIMM_VIT, Timm(TIMM_VIT.name, {**TIMM_VIT.settings, "img_size": [16, 32]}), "from a square grid to a square"),
        (swin(224, 7), swin(256, 8), "relative positions are not interpolated: set the window and image size of the"),
    ],
    ids=["non_square", "window"],
)
def test_positions_that_are_not_interpolated_say_why(theirs, own, says, tmp_path):
    torch.save(theirs(num_classes=2).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(SettingError, match=f"{own.name}: .*of another shape .*: .*{says}") as error:
        load_weights(own(num_classes=2), tmp_path / "weights.pth", own)
    assert one_line(error)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: HuggingFace("vti")(3), "backbone.name is vti: huggingface has no such network; did you mean .*vit"),
        (
            lambda: HuggingFace("./nowhere/vit")(3),
            "nowhere/vit: its config.json cannot be read .* a kind of model .*vit",
        ),
        (lambda: OpenCLIP("ViT-B16")(3), "ViT-B16: openclip has no such network; did you mean .*ViT-B-16"),
        (lambda: HuggingFace("vit", {"hidden": 3})(3), "backbone.settings of vit has hidden, which vit has not"),
        (lambda: OpenCLIP("ViT-B-32", {"pretrained": "openai"})(3), "backbone_weights .* pretrained:openai"),
    ],
)
def test_unknown_names_are_one_line_with_the_nearest(build, says, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SettingError, match=says) as error:
        build()
    assert one_line(error)


def test_preprocessing_is_the_models(hf_folder, tiny_clip):
    assert HuggingFace(str(hf_folder)).preprocessing("pretrained") == {
        "image_size": 16, "mean": [0.4] * 3, "std": [0.2] * 3,
    }  # fmt: skip
    assert HuggingFace("vit", {**HF_VIT, "image_size": 32}).preprocessing(str(hf_folder))["image_size"] == 32
    imagenet = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert Torchvision("resnet18").preprocessing("file.pth") == {"image_size": 224, **imagenet}
    assert Torchvision("inception_v3").preprocessing("pretrained")["image_size"] == 299
    assert Timm("vit_tiny_patch16_224").preprocessing("pretrained") == {
        "image_size": 224, "mean": [0.5] * 3, "std": [0.5] * 3,
    }  # fmt: skip
    assert TIMM_VIT.preprocessing("file.pth")["image_size"] == 16
    assert Timm("resnet18").preprocessing("pretrained:tv_in1k") == {"image_size": 224, **imagenet}
    clip = OpenCLIP(tiny_clip, {"force_image_size": 32}).preprocessing("file.pt")
    assert clip["image_size"] == 32
    assert clip["mean"] == pytest.approx([0.4815, 0.4578, 0.4082], abs=1e-4)


def test_a_folder_without_a_preprocessor_says_so(tmp_path):
    folder = hf_vit_folder(tmp_path / "vit")
    of_kind, weights = HuggingFace("vit", HF_VIT), str(folder / "model.safetensors")
    assert of_kind.preprocessing(weights)["mean"] == [0.4] * 3  # beside the file
    (folder / "preprocessor_config.json").unlink()
    for choice, source in ((HuggingFace(str(folder)), "pretrained"), (HuggingFace("vit", HF_VIT), str(folder))):
        with pytest.warns(
            UserWarning, match=r"preprocessor_config\.json of .*vit cannot be read \(.*data's mean"
        ) as seen:
            assert choice.preprocessing(source) == {"image_size": 16}
        assert len(seen) == 1
        assert "\n" not in str(seen[0].message)


@pytest.mark.parametrize(
    "choice",
    [
        TIMM_VIT,
        HuggingFace("vit", HF_VIT),
        partial(VisionTransformer, 16, 4, 2, 2, 16, 32),
        "tiny_clip",
    ],
    ids=["timm", "transformers", "torchvision", "open_clip"],
)
def test_images_of_another_size_are_one_line(choice, request):
    choice = OpenCLIP(request.getfixturevalue(choice)) if isinstance(choice, str) else choice
    network = choice(num_classes=2)
    with pytest.raises(FAILURES):
        network(images(24))
    line = str(input_error(network, images(24), {"class_path": "a.X", "init_args": {"name": "y"}}))
    assert line.startswith("backbone X y takes images of 16 pixels and these have 24: set data.image_size to 16, or")
    assert "takes images of 3 channels and these have 1" in str(input_error(network, torch.zeros(2, 1, 16, 16)))
    assert input_error(network, images()) is None
