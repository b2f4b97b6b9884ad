"""The cosine classifier, and locating the last layer of any network."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from imbsam.errors import SettingError
from lightning_modules import LongTailedClassifier
from lightning_modules.backbones import CifarResNet20, CifarResNet32, CifarResNet34, SmallCNN, Torchvision
from lightning_modules.backbones.heads import CosineClassifier, classifier, classifier_name, replace_classifier


def test_logits_are_the_scaled_cosine():
    torch.manual_seed(0)
    head = CosineClassifier(6, 4, scale=16).double()
    nn.init.normal_(head.weight)  # lengths other than 1
    features = 3 * torch.randn(5, 6).double()
    expected = 16 * torch.stack([F.cosine_similarity(features, w.expand(5, 6)) for w in head.weight], dim=1)
    assert_close(head(features), expected, rtol=1e-10, atol=1e-12)
    assert [name for name, _ in head.named_parameters()] == ["weight"]


def test_starts_with_unit_weights_and_maps_zero_features_to_zero():
    head = CosineClassifier(6, 4).half()
    assert_close(head.weight.float().norm(dim=1), torch.ones(4), rtol=1e-2, atol=0)
    assert head(torch.zeros(2, 6).half()).eq(0).all()
    assert not torch.equal(CosineClassifier(6, 4).weight, CosineClassifier(6, 4).weight)


# one network of each family, whose classifiers have other names
NAMES = {
    "resnet18": "fc",
    "vgg11": "classifier.6",
    "densenet121": "classifier",
    "mobilenet_v3_small": "classifier.3",
    "convnext_tiny": "classifier.2",
    "vit_b_32": "heads.head",
    "swin_t": "head",
    "maxvit_t": "classifier.5",
}


OURS = [CifarResNet20, CifarResNet32, CifarResNet34, SmallCNN]


@pytest.mark.parametrize(
    ("build", "place"), [*((Torchvision(name), place) for name, place in NAMES.items()), *((b, "fc") for b in OURS)]
)
def test_the_last_layer_of_a_network_is_replaced(build, place):
    with torch.device("meta"):  # shapes without numbers: quick
        network = build(num_classes=7)
        old = classifier(network)
        assert (classifier_name(network), old.out_features) == (place, 7)
        replace_classifier(network, partial(CosineClassifier, scale=20))
        new = network.get_submodule(place)
    assert isinstance(new, CosineClassifier)
    assert new is classifier(network)
    assert (new.weight.shape, new.scale) == (old.weight.shape, 20)


def test_head_of_the_classifier(tmp_path):
    model = LongTailedClassifier(backbone=SmallCNN, head=partial(CosineClassifier, scale=16))
    model._learn_classes(torch.tensor([50, 20, 5]), ["a", "b", "c"])
    model.configure_model()
    assert model.backbone.fc.scale == 16
    features = []
    model.backbone.fc.register_forward_hook(lambda module, args, out: features.append(args[0]))
    logits = model(torch.randn(4, 1, 8, 8))
    assert logits.shape == (4, 3)
    assert_close(logits, 16 * F.cosine_similarity(features[0][:, None], model.backbone.fc.weight[None], dim=2))


def test_your_own_head_is_found_by_its_sizes():
    class Doubled(nn.Linear):
        def forward(self, features):
            return 2 * super().forward(features)

    network = SmallCNN(3)
    replace_classifier(network, Doubled)
    assert classifier(network) is network.fc
    assert isinstance(network.fc, Doubled)


@pytest.mark.parametrize("scale", [0, float("nan"), "30"])
def test_bad_scale_is_one_line(scale):
    with pytest.raises(SettingError, match=f"scale is {scale!r}"):
        CosineClassifier(4, 3, scale=scale)


def test_a_network_without_a_linear_classifier_is_refused():
    with torch.device("meta"):
        network = Torchvision("squeezenet1_1")(3)
    with pytest.raises(SettingError, match="backbone is SqueezeNet, which has no linear classifier"):
        replace_classifier(network, CosineClassifier)
