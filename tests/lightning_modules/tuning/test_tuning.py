"""What is trained, at which rate, in which mode, and what the network computes before the first step."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models import VisionTransformer

from imbsam import SettingError
from lightning_modules.backbones import CifarResNet20, HuggingFace, OpenCLIP, SmallCNN, Timm, Torchvision
from lightning_modules.backbones.blocks import depths, named_blocks
from lightning_modules.tuning import AdaptFormer, All, Bias, HeadOnly, LastBlocks, LoRA, Norm
from lightning_modules.tuning.kinds import count_by_kind
from tests.pretrained import HF_VIT, TIMM_VIT, randomize

pytestmark = pytest.mark.usefixtures("tiny_clip")
NETWORKS = {
    "timm": TIMM_VIT,
    "transformers": HuggingFace("vit", HF_VIT),
    "open_clip": OpenCLIP("tiny-clip"),
    "resnet": partial(CifarResNet20, width=4),
}
TUNES = [
    *(All(), HeadOnly(), Norm(), Bias(), LastBlocks(n=1), LoRA(rank=2), AdaptFormer(bottleneck=4)),
    AdaptFormer(bottleneck=4, scale=1.0, learn_scale=True),
]


def trained(network):
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def build(name, tune):
    network = randomize(NETWORKS[name](num_classes=3))
    tune.apply(network)
    return network


@pytest.mark.parametrize("tune", TUNES, ids=lambda tune: type(tune).__name__)
@pytest.mark.parametrize("name", ["timm", "transformers", "open_clip"])
def test_nothing_changes_before_the_first_step_and_only_the_chosen_part_in_it(name, tune):
    torch.manual_seed(0)
    plain = randomize(NETWORKS[name](num_classes=3)).eval()
    network = NETWORKS[name](num_classes=3).eval()
    network.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, 16, 16)
    tune.apply(network)
    assert_close(network(x), plain(x))
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    network.train()
    tune.set_modes(network)
    optimizer = torch.optim.SGD(tune.parameter_groups(network), lr=1.0)
    for _ in range(2):  # LoRA's A and AdaptFormer's first layer get no gradient as long as the other is 0
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    moved = {n for n, p in network.named_parameters() if not torch.equal(p, before[n])}
    assert moved <= trained(network)
    still = {n for n in trained(network) - moved if "key" not in n and "k_proj.bias" not in n}
    assert not still  # a bias of keys has no gradient: softmax does not see it


def test_the_chosen_parts_are_those_of_their_names():
    everything = trained(build("timm", All()))
    assert trained(build("timm", HeadOnly())) == {"head.weight", "head.bias"}
    norms = {n for n in everything if "norm" in n}
    assert trained(build("timm", Norm())) == norms | {"head.weight", "head.bias"}
    assert trained(build("timm", Bias())) == {n for n in everything if n.endswith("bias")} | {"head.weight"}
    last = {n for n in everything if n.startswith(("blocks.1.", "norm.", "head."))}
    assert trained(build("timm", LastBlocks(n=1))) == last
    lora = trained(build("timm", LoRA(rank=2, targets=["qkv"])))
    assert lora == {
        *(f"blocks.{i}.attn.qkv.lora_{m}.default.weight" for i in (0, 1) for m in "AB"), "head.weight", "head.bias",
    }  # fmt: skip
    adapters = trained(build("timm", AdaptFormer(bottleneck=4))) - {"head.weight", "head.bias"}
    assert adapters == {f"blocks.{i}.mlp.adapter.{j}.{k}" for i in (0, 1) for j in (0, 2) for k in ("weight", "bias")}


def test_lora_is_the_papers_formula():
    tune = LoRA(rank=2, alpha=6, targets=["fc1"])
    network = build("timm", tune)
    layer = network.blocks[0].mlp.fc1
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(5, 16)
    low_rank = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert low_rank.shape == (64, 16)
    wanted = x @ (layer.base_layer.weight + 6 / 2 * low_rank).T + layer.base_layer.bias
    assert_close(layer(x), wanted)


def test_adaptformer_is_the_papers_formula():
    """Equation 3: the block's MLP and the bottleneck see the same normalised input, and both are added to it."""
    network = build("timm", AdaptFormer(bottleneck=4, scale=0.3)).eval()
    block = network.blocks[0]
    down, up = block.mlp.adapter[0], block.mlp.adapter[2]
    nn.init.normal_(up.weight)
    x = torch.randn(2, 17, 16)
    attended = x + block.attn(block.norm1(x))
    normed = block.norm2(attended)
    bottleneck = (normed @ down.weight.T + down.bias).relu() @ up.weight.T + up.bias
    assert_close(block(x), attended + block.mlp.mlp(normed) + 0.3 * bottleneck)


def test_adaptformer_as_in_lifts_code():
    """The bottleneck goes by the number of classes and blocks, and the scale is trained from 1."""
    tune = AdaptFormer(bottleneck=None, scale=1.0, learn_scale=True)
    network = TIMM_VIT(num_classes=37)
    tune.apply(network)
    assert network.blocks[0].mlp.adapter[0].out_features == 8  # 37 / (2 * 2 blocks) is 9.25
    assert {n for n in trained(network) if n.endswith("scale")} == {f"blocks.{i}.mlp.adapter.3.scale" for i in (0, 1)}
    x, mlp = torch.randn(5, 16), network.blocks[0].mlp
    nn.init.normal_(mlp.adapter[2].weight)
    once = mlp(x) - mlp.mlp(x)
    mlp.adapter[3].scale.data.fill_(-0.5)
    assert_close(mlp(x) - mlp.mlp(x), -0.5 * once)


def torch_vit(num_classes):
    """With nn.MultiheadAttention."""
    return VisionTransformer(16, 4, 2, 2, 32, 64, num_classes=num_classes)


def test_lora_beside_torchs_attention_adapts_the_mlps():
    torch.manual_seed(0)
    network = torch_vit(3)
    nn.init.normal_(network.heads.head.weight)
    LoRA(rank=2).apply(network)
    first = "encoder.layers.encoder_layer_0."
    added = {n: p for n, p in network.named_parameters() if "lora_" in n}
    assert {n.partition(".lora_")[0].removeprefix(first) for n in added if n.startswith(first)} == {"mlp.0", "mlp.3"}
    network(torch.randn(2, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in added.items() if "lora_B" in n)  # A's is 0 at B = 0


def test_dora_by_pefts_own_setting():
    assert any("magnitude" in n for n in trained(build("timm", LoRA(rank=2, peft={"use_dora": True}))))


@pytest.mark.parametrize(
    ("network", "tune", "says"),
    [
        (CifarResNet20, LoRA(), "tune is LoRA, and the blocks of CifarResNet20 have no linear layer"),
        (
            torch_vit,
            LoRA(targets=["out_proj"]),
            "chooses .*encoder_layer_0.self_attention or a layer in it",
        ),
        (torch_vit, LoRA(targets=["self_attention"]), "not work in nn.MultiheadAttention; choose layers of the MLPs"),
        (TIMM_VIT, LoRA(targets=["query"]), r"tune is LoRA with targets \['query'\]: .*query"),
        (TIMM_VIT, LoRA(peft={"use_doora": True}), "use_doora"),
        (CifarResNet20, AdaptFormer(), "CifarResNet20 has no blocks with an mlp"),
        (CifarResNet20, LastBlocks(n=10), "tune.n is 10, and CifarResNet20 has 9 blocks: give at most 9"),
        (SmallCNN, LastBlocks(n=1), "SmallCNN has 0 blocks"),
    ],
)
def test_a_network_without_such_a_part_is_one_line(network, tune, says):
    with pytest.raises(SettingError, match=says) as error:
        tune.apply(network(num_classes=3))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (partial(LoRA, rank=0), "rank is 0"),
        (partial(LoRA, dropout=1.0), "dropout is 1.0"),
        (partial(AdaptFormer, bottleneck=-1), "bottleneck is -1"),
        (partial(AdaptFormer, scale=0), "scale is 0"),
        (partial(All, backbone_lr=0), "backbone_lr is 0"),
        (partial(All, layer_decay=1.5), "layer_decay is 1.5"),
        (partial(All, frozen_precision="8"), "frozen_precision is '8'"),
        (partial(LastBlocks, n=0), "n is 0"),
    ],
)
def test_a_setting_out_of_range_is_one_line(build, says):
    with pytest.raises(SettingError, match=says):
        build()


def test_frozen_layers_are_in_evaluation_mode():
    tune = LastBlocks(n=1)
    network = build("resnet", tune).train()
    tune.set_modes(network)
    modes = {name: m.training for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {name for name, training in modes.items() if training} == {"stages.2.2.norm1", "stages.2.2.norm2"}
    statistics = {n: b.clone() for n, b in network.named_buffers() if "running" in n}
    network(torch.randn(4, 3, 16, 16))
    changed = {
        n.rpartition(".")[0] for n, b in network.named_buffers() if n in statistics and not b.equal(statistics[n])
    }
    assert changed == {"stages.2.2.norm1", "stages.2.2.norm2"}
    assert {n for n in network.state_dict() if n not in tune.frozen_tensors(network)} == {
        n for n in network.state_dict() if n.startswith(("stages.2.2.", "fc."))
    }


def test_batch_norm_of_trained_layers_is_frozen_by_choice():
    tune = All(freeze_batch_norm=True)
    network = build("resnet", tune).train()
    tune.set_modes(network)
    assert not any(m.training for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    assert all(m.training for m in network.modules() if isinstance(m, nn.Conv2d))
    assert network.norm1.weight.requires_grad
    assert set(tune.frozen_tensors(network)) == {n for n, _ in network.named_buffers()}


def test_learning_rates_fall_from_the_head_to_the_input():
    """BEiT's rule, written out: decay ** (L + 1 - depth) with the final norm at L + 1."""
    tune = All(backbone_lr=0.1, layer_decay=0.5)
    network = build("timm", tune)
    groups = tune.parameter_groups(network)
    names = {id(p): n for n, p in network.named_parameters()}
    found = {names[id(p)]: group["lr_factor"] for group in groups for p in group["params"]}
    assert groups[0]["lr_factor"] == 1.0
    assert found.keys() == {n for n, _ in network.named_parameters()}
    expected = {"head.weight": 1, "norm.bias": 0.1, "blocks.1.attn.qkv.weight": 0.05, "blocks.0.mlp.fc1.bias": 0.025}
    expected |= {"cls_token": 0.0125, "pos_embed": 0.0125, "patch_embed.proj.weight": 0.0125}
    assert {n: found[n] for n in expected} == pytest.approx(expected)


def test_parameters_by_kind_are_all_of_them():
    for name in NETWORKS:
        network = build(name, Norm())
        counts = count_by_kind(network)
        assert sum(map(sum, counts.values())) == sum(p.numel() for p in network.parameters())
        assert sum(t for t, _ in counts.values()) == sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert count_by_kind(build("timm", AdaptFormer(bottleneck=4)))["adapters"] == (2 * (16 * 4 + 4 + 4 * 16 + 16), 0)


@pytest.mark.parametrize(
    ("network", "number", "last"),
    [
        (Timm("convnext_atto"), 12, "stages.3.blocks.1"),
        (Timm("tf_efficientnet_lite0"), 16, "blocks.6.0"),
        (Torchvision("efficientnet_b0"), 16, "features.7.0"),
        (Torchvision("resnet50"), 16, "layer4.2"),
        (Torchvision("swin_t"), 12, "features.7.1"),
        (Torchvision("vit_b_16"), 12, "encoder.layers.encoder_layer_11"),
        (HuggingFace("swin"), 12, "model.swin.encoder.layers.3.blocks.1"),
        (HuggingFace("resnet"), 16, "model.resnet.encoder.stages.3.layers.2"),
        (HuggingFace("clip"), 12, "visual.vision_model.encoder.layers.11"),
    ],
    ids=str,
)
def test_blocks_are_the_architectures(network, number, last):
    with torch.device("meta"):
        built = network(num_classes=2)
    blocks = named_blocks(built)
    assert (len(blocks), blocks[-1][0]) == (number, last)
    depth = list(depths(built).values())
    assert (min(depth), max(depth)) == (0, number + 1)
