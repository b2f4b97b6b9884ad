from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.testing import assert_close

from imbsam.errors import SettingError
from lightning_modules.backbones import CifarResNet20, CifarResNet32, CifarResNet34, SmallCNN, Torchvision
from lightning_modules.backbones.cifar_resnet import PadShortcut
from lightning_modules.backbones.heads import CosineClassifier
from lightning_modules.backbones.network import create_network
from lightning_modules.backbones.normalization import norm_layer

SIZES = {CifarResNet20: (3, 32), CifarResNet32: (3, 32), CifarResNet34: (3, 32), SmallCNN: (1, 8)}


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def images(rows, channels=3, size=32):
    return torch.randn(rows, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("build", "millions"), [(CifarResNet20, "0.27"), (CifarResNet32, "0.46")])
def test_parameters_are_the_papers(build, millions):
    """He et al., table 6."""
    assert f"{parameters(build(10)) / 1e6:.2f}" == millions


@pytest.mark.parametrize(("build", "layers"), [(CifarResNet20, 20), (CifarResNet32, 32), (CifarResNet34, 34)])
def test_number_of_weighted_layers_is_in_the_name(build, layers):
    model = build(10, width=4)
    weighted = [m for m in model.modules() if isinstance(m, nn.Linear) or getattr(m, "kernel_size", 0) == (3, 3)]
    assert len(weighted) == layers


def test_resnet34_is_torchvisions_but_for_the_stem():
    reference = torchvision.models.resnet34(weights=None, num_classes=10)
    reference.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    reference.maxpool = nn.Identity()
    model = CifarResNet34(10)
    theirs, ours = reference.state_dict(), model.state_dict()
    assert len(theirs) == len(ours)
    # Both register their layers in the order of the forward pass.
    model.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    x = images(2, size=16)
    with torch.no_grad():
        assert_close(model(x), reference(x), rtol=1e-4, atol=1e-5)


def test_cifar_resnet_is_the_papers_function():
    """Section 4.2 written out: stem, 3 stages of n blocks, option A, average pooling, classifier."""
    model = CifarResNet20(7, width=4, norm="group").double()
    weights = iter(model.parameters())

    def conv_norm(x, stride=1):
        x = F.conv2d(x, next(weights), stride=stride, padding=1)
        return F.group_norm(
            x,
            model.norm1.num_groups if x.shape[1] == 4 else max(1, x.shape[1] // 8),
            next(weights),
            next(weights),
        )

    x = images(2).double()
    out = F.relu(conv_norm(x))
    for channels in (4, 8, 16):
        for _ in range(3):
            stride = channels // out.shape[1]
            inner = conv_norm(F.relu(conv_norm(out, stride)))
            shortcut = torch.zeros_like(inner)
            shortcut[:, : out.shape[1]] = out[:, :, ::stride, ::stride]
            out = F.relu(inner + shortcut)
    assert out.shape == (2, 16, 8, 8)
    expected = F.linear(out.mean((2, 3)), next(weights), next(weights))
    assert next(weights, None) is None
    assert_close(model(x), expected, rtol=1e-10, atol=1e-12)


def test_pad_shortcut_has_no_parameters_and_keeps_the_signal():
    shortcut = PadShortcut(new_channels=3, stride=2)
    x = images(2, channels=3, size=6)
    out = shortcut(x)
    assert out.shape == (2, 6, 3, 3)
    assert parameters(shortcut) == 0
    assert torch.equal(out[:, :3], x[:, :, ::2, ::2])
    assert out[:, 3:].abs().sum() == 0


def test_small_cnn_is_small():
    assert parameters(SmallCNN(10)) < 60_000


@pytest.mark.parametrize("build", SIZES)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_settings_reach_the_network(build, norm):
    _, size = SIZES[build]
    model = build(5, width=6, norm=norm, in_channels=2)
    out = model(images(3, channels=2, size=size))
    assert out.shape == (3, 5)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    wanted, other = (nn.BatchNorm2d, nn.GroupNorm) if norm == "batch" else (nn.GroupNorm, nn.BatchNorm2d)
    kinds = [type(m) for m in model.modules()]
    assert wanted in kinds
    assert other not in kinds


@pytest.mark.parametrize("build", SIZES)
def test_with_groupnorm_rows_do_not_see_each_other(build):
    channels, size = SIZES[build]
    model = build(5, width=8, norm="group").double().train()
    x = images(4, channels, size).double()
    assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("channels", [1, 3, 6, 8, 16, 20, 34, 64, 100, 512])
def test_groupnorm_takes_any_number_of_channels(channels):
    norm = norm_layer("group", channels)
    norm(torch.randn(2, channels, 3, 3))
    assert norm.num_groups <= 32
    assert norm.num_groups == 1 or channels // norm.num_groups >= 8


def test_dropout_acts_in_training_alone():
    model = SmallCNN(10, width=8, dropout=0.5)
    x = images(4, 1, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_torchvision_names_are_known():
    model = Torchvision("squeezenet1_1", {"dropout": 0.1})(num_classes=3)
    assert isinstance(model, torchvision.models.SqueezeNet)
    assert model(images(2, size=64)).shape == (2, 3)


def test_torchvision_networks_with_auxiliary_logits_return_logits(recwarn):
    model = Torchvision("googlenet")(num_classes=3)
    assert isinstance(model.train()(images(2, size=64)), torch.Tensor)
    assert not [w for w in recwarn if "googlenet" in str(w.message).lower() or "init" in str(w.message)]
    with pytest.raises(SettingError, match="aux_logits"):
        Torchvision("googlenet", {"aux_logits": True})(num_classes=3)


@pytest.mark.parametrize(
    ("name", "suggests"),
    [
        ("resnet_50", "resnet50"),
        ("RESNET50", "resnet50"),
        ("zzzz", "see the library"),
        ("fasterrcnn_resnet50_fpn", "resnet"),
    ],
)
def test_unknown_name_is_one_line_with_the_closest(name, suggests):
    with pytest.raises(SettingError, match=f"{name}.*{suggests}") as caught:
        Torchvision(name)(10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (partial(SmallCNN, width=0), "width is 0"),
        (partial(SmallCNN, width=2.5), "width is 2.5"),
        (partial(CifarResNet32, in_channels=-1), "in_channels is -1"),
        (partial(CifarResNet32, norm="layer"), "norm is layer: choose one of batch, group"),
        (partial(SmallCNN, dropout=1.0), "dropout is 1.0"),
        (partial(SmallCNN, dropout=float("nan")), "dropout is nan"),
        (Torchvision("squeezenet1_1", {"wdth": 3}), "squeezenet1_1.*wdth"),
        (Torchvision("squeezenet1_1", {"weights": "DEFAULT"}), "weights is DEFAULT"),
        (partial(CifarResNet20, depth=3), "backbone or head: .*depth"),
        (torch.nn.Linear(3, 4), "already built"),
    ],
)
def test_bad_setting_is_one_line_with_its_name(build, says):
    with pytest.raises(SettingError, match=says) as caught:
        create_network(build, 10)
    assert "\n" not in str(caught.value)


def test_a_line_that_names_its_setting_stays_as_it_is():
    for build, line in (
        (Torchvision("resnet_50"), "backbone.name is resnet_50"),
        (partial(SmallCNN, width=0), "width is 0"),
    ):
        with pytest.raises(SettingError, match=f"^{line}"):
            create_network(build, 10)


def test_a_function_is_a_backbone_too():
    network = create_network(torchvision.models.resnet18, 5, partial(CosineClassifier, scale=16))
    assert network.fc.weight.shape == (5, 512)
    assert isinstance(create_network(lambda classes: nn.Linear(3, classes), 4), nn.Linear)


@pytest.mark.parametrize("num_classes", [0, -1, 2.0, True, None])
def test_bad_num_classes_is_refused(num_classes):
    with pytest.raises(SettingError, match="num_classes is "):
        CifarResNet20(num_classes)
