"""A head that starts from CLIP's text features classifies as CLIP does without training."""

import json
import logging
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import seed_everything
from torch.testing import assert_close

from datamodules import ImageNetLTDataModule
from imbsam import Plain, SettingError
from lightning_modules import LongTailedClassifier
from lightning_modules.backbones import CosineClassifier, HuggingFace, OpenCLIP
from lightning_modules.tuning.head_init import TextFeatures
from lightning_modules.tuning.prompts import readable_names
from tests.pretrained import TIMM_VIT, TinyImages, randomize
from tests.training import quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore")

TEMPLATES = ["a photo of a {}.", "a {}."]
PROMPTS = [template.format(name) for name in ("red", "green", "sky blue") for template in TEMPLATES]


COSINE = partial(CosineClassifier, scale=25)


def started(backbone, weights, head=COSINE):
    """The model after a training with learning rate 0."""
    seed_everything(0, verbose=False)
    model = LongTailedClassifier(
        backbone=backbone, backbone_weights=weights, head=head, head_init=TextFeatures(TEMPLATES), sam=Plain,
        many=8, few=4, optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
    )  # fmt: skip
    quiet_trainer().fit(model, datamodule=TinyImages(image_size=16))
    return model.eval()


def zero_shot(image_features, text_features):
    """CLIP's logits, with its mean over the templates (Radford et al., section 3.1.4)."""
    means = F.normalize(F.normalize(text_features, dim=1).view(3, 2, -1).mean(dim=1), dim=1)
    return 25 * F.normalize(image_features, dim=1) @ means.T


@torch.no_grad()
def test_open_clip(tiny_clip, tmp_path):
    import open_clip

    torch.manual_seed(1)
    clip = randomize(open_clip.create_model(tiny_clip, pretrained=None)).eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    with torch.enable_grad():
        model = started(OpenCLIP(tiny_clip), str(tmp_path / "clip.pt"))
        linear = started(OpenCLIP(tiny_clip), str(tmp_path / "clip.pt"), head=None)
    images = torch.randn(4, 3, 16, 16)
    text = clip.encode_text(open_clip.get_tokenizer(tiny_clip)(PROMPTS))
    assert_close(model(images), zero_shot(clip.encode_image(images), text))
    assert_close(linear.backbone.fc.weight, model.backbone.fc.weight)
    assert linear.backbone.fc.bias.abs().sum() == 0


@torch.no_grad()
def test_hugging_faces_clip(tmp_path):
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    letters = [*"abcdefghijklmnopqrstuvwxyz.", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz.")]
    vocabulary = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    folder = tmp_path / "clip"
    CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")).save_pretrained(folder)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1, "pad_token_id": 1}
    text = {**tower, **ends, "vocab_size": len(vocabulary), "projection_dim": 8}
    vision = {**tower, "image_size": 16, "patch_size": 4, "projection_dim": 8}
    torch.manual_seed(1)
    clip = randomize(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))).eval()
    clip.save_pretrained(folder)
    with torch.enable_grad():
        model = started(HuggingFace(str(folder)), str(folder))
    images = torch.randn(4, 3, 16, 16)
    tokens = CLIPTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    theirs = clip(pixel_values=images, **tokens)
    assert_close(model(images), zero_shot(theirs.image_embeds, theirs.text_embeds), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("backbone", "head_init", "says"),
    [
        (TIMM_VIT, TextFeatures, "Timm vit_tiny_patch16_224 has no text tower: choose OpenCLIP"),
        (lambda n: TIMM_VIT(n), TextFeatures, "the backbone has no text tower"),
        (TIMM_VIT, partial(TextFeatures, ["a photo"]), r"templates is \['a photo'\]: give texts with {}"),
    ],
)
def test_what_cannot_work_is_one_line(backbone, head_init, says):
    def fit():
        model = LongTailedClassifier(backbone=backbone, head_init=head_init(), many=8, few=4)
        quiet_trainer().fit(model, datamodule=TinyImages())

    with pytest.raises(SettingError, match=says) as error:
        fit()
    assert "\n" not in str(error.value)


def test_text_features_without_weights_are_refused(tiny_clip):
    for backbone in (OpenCLIP(tiny_clip), HuggingFace("clip")):
        with pytest.raises(SettingError, match="head_init is TextFeatures and backbone_weights is null: set"):
            backbone.text_features(["a cat"], None)


def test_an_image_tower_alone_is_refused(tiny_clip, tmp_path):
    tower = OpenCLIP(tiny_clip)(num_classes=3)
    torch.save(tower.state_dict(), tmp_path / "tower.pt")
    with pytest.raises(SettingError, match="which has no text tower of tiny-clip"):
        started(OpenCLIP(tiny_clip), str(tmp_path / "tower.pt"))


NAMES = ["tench", "jack-o'-lantern", "sea lion", "black-and-white colobus"]
IDS = {f"n0144076{label}": name for label, name in enumerate(NAMES)}


def lines(form):
    """The forms of a file of names."""
    return {
        "space": "".join(f"{key} {name.replace(' ', '_')}\n" for key, name in IDS.items()),
        "tab": "n01440769\tgoldfish\n" + "".join(f"{key}\t{name}\n" for key, name in reversed(IDS.items())),
        "in order": "\n".join(IDS.values()),
    }[form]


@pytest.mark.parametrize("form", ["space", "tab", "in order"])
def test_names_of_a_file_are_those_of_the_prompts(form, imagenet_lt_root, tiny_clip, tmp_path, caplog):
    """ImageNet-LT's folders are WordNet's ids."""
    import open_clip

    (tmp_path / "names.txt").write_text(lines(form))
    torch.manual_seed(1)
    clip = randomize(open_clip.create_model(tiny_clip, pretrained=None)).eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        model = LongTailedClassifier(
            backbone=OpenCLIP(tiny_clip), backbone_weights=str(tmp_path / "clip.pt"), head=COSINE, sam=Plain,
            head_init=TextFeatures(names=str(tmp_path / "names.txt")),
            optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
        )  # fmt: skip
        data = ImageNetLTDataModule(root=imagenet_lt_root, image_size=16, batch_size=16, num_workers=0)
        quiet_trainer(limit_train_batches=1, limit_val_batches=0).fit(model, datamodule=data)
    tokens = open_clip.get_tokenizer(tiny_clip)([f"a photo of a {name}." for name in IDS.values()])
    with torch.no_grad():
        assert_close(model.backbone.fc.weight.detach(), F.normalize(clip.encode_text(tokens), dim=1))
    assert '4 prompts, from "a photo of a tench." to "a photo of a black-and-white colobus."' in caplog.text


def test_names_of_folders_are_read_as_words():
    places = ["apartment_building-outdoor", "airport_terminal", "r/restaurant_kitchen"]
    assert readable_names(places) == ["apartment building outdoor", "airport terminal", "r restaurant kitchen"]
    species = ["Nymphalis l-album", "Quercus robur"]
    assert readable_names(species) == species
    assert readable_names(["great_white shark-like"]) == ["great white shark-like"]
    assert readable_names(["aquarium_fish", "cat"]) == ["aquarium fish", "cat"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, r"WordNet's ids for names \(n01440760, n01440761 and 2 more\).*: set head_init.names to a file"),
        ("n01440760 tench\n", "names.txt, which has 1 lines for 4 classes and none for n01440761: write"),
        ("tench\ngoldfish\n", "has 2 lines for 4 classes and none for n01440760"),
        ("n1\nn2\nn3\nn01440761 sea lion", "and none for n01440760"),
        ("n02000000 a\nn02000001 b\nn02000002 c\nn02000003 d", "and none for n01440760"),
        (b"\xff\xfe\x00", "names.txt: it cannot be read"),
    ],
)
def test_names_that_do_not_fit_are_one_line(content, says, tmp_path):
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SettingError, match=says) as error:
        readable_names(list(IDS), path if content is not None else None)
    assert "\n" not in str(error.value)
    with pytest.raises(SettingError, match=r"nowhere.txt: it cannot be read"):
        readable_names(list(IDS), tmp_path / "nowhere.txt")
