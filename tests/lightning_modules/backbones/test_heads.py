"""The cosine classifier, and how the last layer of any network is found."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from imbsam.errors import SettingError
from lightning_modules import LongTailedClassifier
from lightning_modules.backbones import BACKBONES, create_backbone
from lightning_modules.backbones.heads import CosineClassifier, classifier_name, classifier_of, set_head


def test_logits_are_the_scaled_cosine():
    torch.manual_seed(0)
    head = CosineClassifier(6, 4, scale=16).double()
    nn.init.normal_(head.weight)  # lengths other than 1
    features = 3 * torch.randn(5, 6).double()
    expected = 16 * torch.stack([F.cosine_similarity(features, w.expand(5, 6)) for w in head.weight], dim=1)
    assert_close(head(features), expected, rtol=1e-10, atol=1e-12)
    assert [name for name, _ in head.named_parameters()] == ["weight"]


def test_starts_with_rows_of_length_1_and_takes_features_of_0():
    head = CosineClassifier(6, 4).half()
    assert_close(head.weight.float().norm(dim=1), torch.ones(4), rtol=1e-2, atol=0)
    assert head(torch.zeros(2, 6).half()).eq(0).all()
    assert not torch.equal(CosineClassifier(6, 4).weight, CosineClassifier(6, 4).weight)


# one network of every family whose classifier lies elsewhere
PLACES = {
    "resnet18": "fc",
    "vgg11": "classifier.6",
    "densenet121": "classifier",
    "mobilenet_v3_small": "classifier.3",
    "convnext_tiny": "classifier.2",
    "vit_b_32": "heads.head",
    "swin_t": "head",
    "maxvit_t": "classifier.5",
}


@pytest.mark.parametrize(("name", "place"), [*PLACES.items(), *((name, "fc") for name in BACKBONES)])
def test_the_last_layer_of_a_network_is_replaced(name, place):
    with torch.device("meta"):  # shapes without numbers: quick
        network = create_backbone(name, num_classes=7)
        old = classifier_of(network)
        assert (classifier_name(network), old.out_features) == (place, 7)
        set_head(network, "cosine", scale=20)
        new = network.get_submodule(place)
    assert isinstance(new, CosineClassifier)
    assert new is classifier_of(network)
    assert (new.weight.shape, new.scale) == (old.weight.shape, 20)


def test_head_of_the_classifier(tmp_path):
    model = LongTailedClassifier(backbone="small_cnn", head="cosine", head_args={"scale": 16})
    model._learn_classes(torch.tensor([50, 20, 5]), ["a", "b", "c"])
    model.configure_model()
    assert model.backbone.fc.scale == 16
    features = []
    model.backbone.fc.register_forward_hook(lambda module, args, out: features.append(args[0]))
    logits = model(torch.randn(4, 1, 8, 8))
    assert logits.shape == (4, 3)
    assert_close(logits, 16 * F.cosine_similarity(features[0][:, None], model.backbone.fc.weight[None], dim=2))


@pytest.mark.parametrize(
    ("head", "settings", "says"),
    [
        ("cosinus", {}, "head='cosinus'.*linear, cosine"),
        ("cosine", {"scale": 0}, "scale=0"),
        ("cosine", {"scale": float("nan")}, "scale=nan"),
        ("cosine", {"scale": "30"}, "scale='30'"),
        ("cosine", {"bias": True}, "head=cosine has no setting bias=True; it has scale"),
        ("linear", {"scale": 30}, "head=linear has no setting scale=30"),
    ],
)
def test_bad_setting_is_one_line(head, settings, says):
    with pytest.raises(SettingError, match=says):
        set_head(create_backbone("small_cnn", 3), head, **settings)


def test_a_network_without_a_linear_classifier_is_refused():
    with torch.device("meta"):
        network = create_backbone("squeezenet1_1", 3)
    with pytest.raises(SettingError, match="SqueezeNet has no linear classifier"):
        set_head(network, "cosine")
