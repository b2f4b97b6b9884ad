"""Networks from files: pretrained weights, and timm's names."""

import builtins
import logging
import re
import sys
from functools import partial

import pytest
import torch
from lightning.pytorch import seed_everything

from datamodules import DigitsLTDataModule
from imbsam import Plain, SettingError
from lightning_modules import LongTailedClassifier
from lightning_modules.backbones import SmallCNN, Timm
from lightning_modules.backbones.heads import CosineClassifier, classifier_name, replace_classifier
from lightning_modules.backbones.weights import copy_weights, read_weights
from tests.pretrained import load_weights
from tests.training import quiet_trainer


def network(num_classes=10, norm="batch", **settings):
    return SmallCNN(num_classes, width=4, norm=norm, **settings)


def same(found, wanted, but=()):
    return [name for name, t in wanted.items() if not torch.equal(found[name], t)] == list(but)


@pytest.mark.parametrize("form", ["plain", "state_dict", "model", "module.", "ours", "safetensors"])
def test_every_form_of_file_is_read(tmp_path, form):
    wanted = network().state_dict()
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    if form == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(wanted, path)
    else:
        torch.save(
            {
                "plain": wanted,
                "state_dict": {"state_dict": wanted, "epoch": 3},
                "model": {"model": wanted, "args": {"lr": 0.1}},
                "module.": {f"module.{name}": t for name, t in wanted.items()},
                "ours": {
                    "state_dict": {"loss.prior": torch.ones(3), **{f"backbone.{n}": t for n, t in wanted.items()}}
                },
            }[form],
            path,
        )
    found = network()
    assert load_weights(found, path) == []
    assert same(found.state_dict(), wanted)


def test_the_classifier_is_left_out_where_it_does_not_fit(tmp_path):
    wanted = network(num_classes=7).state_dict()
    torch.save(wanted, tmp_path / "seven.pth")
    torch.save({n: t for n, t in wanted.items() if "fc" not in n and "batches" not in n}, tmp_path / "headless.pth")
    cosine = network(num_classes=7)
    replace_classifier(cosine, CosineClassifier)
    for found, file, left in (
        (network(), "seven.pth", ["fc.weight", "fc.bias"]),
        (network(), "headless.pth", ["fc.weight", "fc.bias"]),
        (cosine, "seven.pth", ["fc.weight"]),
    ):
        before = {n: t.clone() for n, t in found.state_dict().items()}
        assert load_weights(found, tmp_path / file) == left
        assert all(torch.equal(found.state_dict()[n], before[n]) for n in left)
        assert all(torch.equal(found.state_dict()[n], wanted[n]) for n in before if n not in left)


def test_other_weights_are_refused_with_a_short_list(tmp_path):
    torch.save(network(norm="group").state_dict(), tmp_path / "group.pth")
    with pytest.raises(
        SettingError, match=r"does not fit SmallCNN: 6 missing \(features.1.running_mean, .* and 3 more\)"
    ):
        load_weights(network(), tmp_path / "group.pth")
    torch.save(SmallCNN(10, width=8, norm="batch").state_dict(), tmp_path / "wide.pth")
    with pytest.raises(
        SettingError, match=r"of another shape \(features.0.weight is \(8, 1, 3, 3\), not \(4, 1, 3, 3\)"
    ):
        load_weights(network(), tmp_path / "wide.pth")
    torch.save({**network().state_dict(), "extra": torch.ones(1)}, tmp_path / "extra.pth")
    with pytest.raises(SettingError, match="1 unknown"):
        load_weights(network(), tmp_path / "extra.pth")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("no weights at all")
    (tmp_path / "text.safetensors").write_text("no weights at all")
    torch.save(DigitsLTDataModule(), tmp_path / "code.pth")
    torch.save({"lr": 0.1}, tmp_path / "numbers.pth")
    whole = tmp_path / "whole.pth"
    torch.save(network().state_dict(), whole)
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:3000])
    names = ["empty.pth", "text.pth", "text.safetensors", "code.pth", "numbers.pth", "cut.pth", "nowhere.pth", "."]
    for name in names:
        with pytest.raises(SettingError, match=f"backbone_weights is {re.escape(str(tmp_path / name))}") as caught:
            load_weights(network(), tmp_path / name)
        assert "\n" not in str(caught.value)


def test_training_starts_from_the_file_and_a_checkpoint_does_not_need_it(tmp_path):
    path = tmp_path / "weights.pth"
    wanted = SmallCNN(5, width=4).state_dict()
    torch.save(wanted, path)
    settings = {"backbone": partial(SmallCNN, width=4), "backbone_weights": str(path), "sam": Plain}

    def model():
        seed_everything(0)
        return LongTailedClassifier(**settings, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))

    run, first = quiet_trainer(default_root_dir=tmp_path, max_epochs=1), model()
    run.fit(first, datamodule=DigitsLTDataModule())
    assert same(first.backbone.state_dict(), {n: t for n, t in wanted.items() if "fc" not in n})
    run.save_checkpoint(tmp_path / "own.ckpt")
    path.unlink()
    quiet_trainer(default_root_dir=tmp_path).test(
        model(), datamodule=DigitsLTDataModule(), ckpt_path=tmp_path / "own.ckpt", verbose=False
    )
    again = model()
    quiet_trainer(default_root_dir=tmp_path, max_epochs=2).fit(
        again, datamodule=DigitsLTDataModule(), ckpt_path=tmp_path / "own.ckpt"
    )
    assert same(again.backbone.state_dict(), first.backbone.state_dict())
    with pytest.raises(SettingError, match=r"weights\.pth: there is no such file"):
        quiet_trainer(default_root_dir=tmp_path, max_epochs=1).fit(model(), datamodule=DigitsLTDataModule())


def test_timm_by_name():
    pytest.importorskip("timm")
    for name, place in (("resnet18", "fc"), ("convnext_atto", "head.fc"), ("vit_tiny_patch16_224", "head")):
        with torch.device("meta"):
            model = Timm(name)(num_classes=7)
        assert classifier_name(model) == place
        replace_classifier(model, CosineClassifier)
        assert isinstance(model.get_classifier(), CosineClassifier)
    model = Timm("test_resnet", {"in_chans": 1})(num_classes=3)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 3)
    with pytest.raises(SettingError, match=r"backbone.name is resnet_50: timm has no such network; did you mean "):
        Timm("resnet_50")(3)
    with pytest.raises(SettingError, match=r"pretrained is True: leave it out .*backbone_weights"):
        Timm("resnet18", {"pretrained": True})(3)
    with pytest.raises(SettingError, match=r"backbone.settings of resnet18 is wdth=3: .*wdth"):
        Timm("resnet18", {"wdth": 3})(3)


def test_missing_timm_is_one_line(monkeypatch):
    original = builtins.__import__

    def without_timm(name, *args, **kwargs):
        if name == "timm":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_timm)
    with pytest.raises(SettingError, match=r"pip install timm"):
        Timm("resnet18")(3)


def test_a_classifier_of_as_many_classes_is_announced(tmp_path, caplog):
    torch.save(network().state_dict(), tmp_path / "ten.pth")
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        assert load_weights(network(), tmp_path / "ten.pth") == []
    assert "its classifier too: fc.weight, fc.bias; if it was trained on these classes with more images" in caplog.text


@pytest.mark.parametrize(
    ("names", "taken", "says"),
    [
        (["ant", "bee", "cat"], True, "its classifier too: fc.weight, fc.bias, for the same classes"),
        (["ant", "cat", "bee"], False, "for other classes, or in another order: ant, bee, cat)"),
        (["car", "bus", "van"], False, "for other classes, or in another order: ant, bee, cat)"),
    ],
)
def test_a_checkpoints_classifier_is_for_its_classes(names, taken, says, tmp_path, caplog):
    own = {f"backbone.{n}": t for n, t in network(3).state_dict().items()}
    torch.save({"state_dict": own, "class_names": ["ant", "bee", "cat"], "hyper_parameters": {}}, tmp_path / "own.ckpt")
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        found = copy_weights(network(3), read_weights(tmp_path / "own.ckpt"), names)
    assert found == ([] if taken else ["fc.weight", "fc.bias"])
    assert says in caplog.text
