"""`imbsam features`, and classifiers trained on its files, against the frozen network on the images."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, seed_everything

from datamodules import DigitsLTDataModule, FeaturesDataModule
from imbsam import ImbSAM, Plain, SettingError
from lightning_modules import LongTailedClassifier, SecondStageClassifier
from lightning_modules.backbones import SmallCNN
from lightning_modules.cli.trainer import CommandTrainer
from lightning_modules.tuning import LoRA
from lightning_modules.tuning.head_init import ClassMeans
from tests.pieces import configs
from tests.pretrained import TIMM_VIT, TinyImages
from tests.training import csv_rows, quiet_trainer, sgd

DIGITS = [*configs("data/digits_lt"), "--model.backbone.width=8"]
QUIET = ["--trainer.enable_model_summary=false", "--trainer.enable_progress_bar=false"]


class FrozenCNN(SmallCNN):
    """The same network, frozen but for its classifier: what the features stand for."""

    def __init__(self, num_classes: int, width: int):
        super().__init__(num_classes, width=width)
        self.features.requires_grad_(False)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """The checkpoint of a network of some training: real weights."""
    path = tmp_path_factory.mktemp("network") / "last.ckpt"
    seed_everything(0)
    run = quiet_trainer(max_epochs=3, enable_checkpointing=True, default_root_dir=path.parent)
    run.fit(LongTailedClassifier(partial(SmallCNN, width=8), optimizer=sgd), datamodule=DigitsLTDataModule())
    run.save_checkpoint(path)
    return path


def features(folder, weights, copies=0, **data):
    """The file of features of the digits."""
    model = LongTailedClassifier(partial(SmallCNN, width=8), backbone_weights=str(weights), many=50, few=10)
    run = CommandTrainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    return run.features(model, DigitsLTDataModule(**data), folder=str(folder), copies=copies)


def fitted(model, data, **settings):
    seed_everything(1)
    quiet_trainer(max_epochs=3, **settings).fit(model, datamodule=data)
    return model


@pytest.mark.parametrize(
    "method", [partial(Plain, tail_weight=2), partial(ImbSAM, rho=0.1), partial(ImbSAM, rho=0.1, adaptive=True)]
)
def test_a_head_on_features_is_the_head_of_the_frozen_network(tmp_path, network, method):
    """Trained for some epochs by the same draws, with a validation part and balanced sampling."""
    path = features(tmp_path, network, augment=False, val_share=0.2)
    heads, losses = [], []
    for backbone, data in (
        (partial(SmallCNN, width=8), FeaturesDataModule(path, batch_size=32, sampling="square_root")),
        (partial(FrozenCNN, width=8), DigitsLTDataModule(augment=False, val_share=0.2, sampling="square_root")),
    ):
        settings = {"backbone_weights": str(network), "sam": method, "optimizer": sgd, "many": 50, "few": 10}
        model = fitted(LongTailedClassifier(backbone, **settings), data)
        heads.append(model.backbone.state_dict())
        losses.append(quiet_trainer().test(model, datamodule=data, verbose=False)[0])
    torch.testing.assert_close(*heads, rtol=1e-4, atol=1e-5)
    before = torch.load(network, weights_only=True)["state_dict"]["backbone.fc.weight"]
    assert float((heads[0]["fc.weight"] - before).abs().max()) > 0.05
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


class Modes(Callback):
    """Which modules are in training mode in a step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.training = [name for name, module in pl_module.backbone.named_modules() if module.training]


def test_only_the_head_trains(tmp_path):
    """BatchNorm is in evaluation mode, so that ImbSAM adds no context samples; nothing else has a gradient."""
    torch.save(SmallCNN(10, width=8, norm="batch").state_dict(), tmp_path / "w.pt")
    model = LongTailedClassifier(partial(SmallCNN, width=8, norm="batch"), backbone_weights=str(tmp_path / "w.pt"))
    run = CommandTrainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    data = FeaturesDataModule(run.features(model, DigitsLTDataModule(), folder=str(tmp_path)), val_share=0.2)
    model = LongTailedClassifier(model.backbone_factory, backbone_weights=str(tmp_path / "w.pt"))
    fitted(model, data, callbacks=[modes := Modes()])
    assert modes.training == ["fc"]
    assert [name for name, p in model.backbone.named_parameters() if p.requires_grad] == ["fc.weight", "fc.bias"]


def test_classifier_retraining_on_features_is_that_on_images(tmp_path, network):
    path = features(tmp_path, network, augment=False)
    heads = []
    for data in (FeaturesDataModule(path, batch_size=32), DigitsLTDataModule(augment=False)):
        data.sampling = "class_balanced"
        heads.append(fitted(SecondStageClassifier(str(network), sam=Plain, optimizer=sgd), data).backbone.state_dict())
    torch.testing.assert_close(*heads, rtol=1e-4, atol=1e-5)


def test_the_checkpoint_has_the_whole_network(imbsam, network, tmp_path):
    """Trained by the printed pieces; predicts and exports images, and agrees with itself on features."""
    code, out, err = imbsam("features", *DIGITS, f"--model.backbone_weights={network}", "--data.val_share=0.2", *QUIET)
    assert code == 0, err
    path = out.split("features: ")[1].split(".npz")[0]
    assert f"{path}.npz: 16 of each of 267 train, 69 val, 540 test; 0.1 MB" in out
    pieces = out.split("train on them: imbsam fit ")[1].split()
    code, out, err = imbsam("fit", *pieces, *configs("method/sam"), "--trainer.max_epochs=2", *QUIET)
    assert code == 0, err
    assert "many (> 50)" in out  # the groups of the images' config
    name = path.removeprefix("features/")
    last = tmp_path / f"logs/features/{name}_sam/version_0/checkpoints/last.ckpt"
    for number, data in enumerate(([], ["--data=DigitsLTDataModule"])):
        code, _, err = imbsam("predict", "--ckpt_path", last, *data, f"--predictions.path={number}.csv", *QUIET)
        assert code == 0, err
    found = [[[float(row[c]) for c in "0123456789"] for row in csv_rows(f"{n}.csv")] for n in (0, 1)]
    np.testing.assert_allclose(*found, atol=1e-5)
    code, out, err = imbsam("export", "--ckpt_path", last, "--data=DigitsLTDataModule", "--path=m.pt2")
    assert code == 0, err
    for command in ("export", "sharpness"):
        code, _, err = imbsam(command, "--ckpt_path", last)
        assert (code, "data is FeaturesDataModule: features are" in err.splitlines()[-1]) == (2, True)


def test_features_of_a_network_with_adapters(imbsam, tmp_path):
    """Their classifier is trained by the printed pieces; without a checkpoint the adapters do nothing yet."""
    torch.save(TIMM_VIT(num_classes=3).state_dict(), tmp_path / "vit.pth")
    data = TinyImages()
    settings = {"backbone": TIMM_VIT, "backbone_weights": str(tmp_path / "vit.pth"), "many": 8, "few": 4, "sam": Plain}
    settings["optimizer"] = partial(torch.optim.SGD, lr=0.1)
    trainer = quiet_trainer()
    trainer.fit(LongTailedClassifier(**settings, tune=LoRA(rank=2)), datamodule=data)
    trainer.save_checkpoint(tmp_path / "lora.ckpt")
    run = CommandTrainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    for checkpoint in (str(tmp_path / "lora.ckpt"), None):
        model = LongTailedClassifier(**settings, tune=LoRA(rank=2))
        path = run.features(model, TinyImages(), ckpt_path=checkpoint, folder="features")
        piece = f"--config={path.with_suffix('.yaml')}"
        code, _, err = imbsam("fit", *configs("data/features"), piece, "--trainer.max_epochs=1", *QUIET)
        assert code == 0, err


def test_back_on_images_they_have_the_size_of_the_features(tmp_path):
    torch.save(TIMM_VIT(num_classes=3).state_dict(), tmp_path / "vit.pth")
    settings = {"backbone": TIMM_VIT, "backbone_weights": str(tmp_path / "vit.pth"), "many": 8, "few": 4}
    run = CommandTrainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    images = TinyImages(image_size=16, mean=[0.1] * 3)
    path = run.features(LongTailedClassifier(**settings), images, folder=str(tmp_path))
    trainer = quiet_trainer()
    trainer.fit(LongTailedClassifier(**settings, optimizer=sgd), datamodule=FeaturesDataModule(path))
    trainer.save_checkpoint(tmp_path / "head.ckpt")
    data = TinyImages()
    quiet_trainer().test(LongTailedClassifier(**settings), data, ckpt_path=tmp_path / "head.ckpt", verbose=False)
    assert data.used_preprocessing == images.used_preprocessing
    assert data.eval_collate.mean.flatten().tolist() == pytest.approx([25.5] * 3)


def test_the_name_holds_what_the_features_depend_on(network, tmp_path, capsys):
    path = features(tmp_path, network)
    written = path.stat().st_mtime_ns
    assert features(tmp_path, network, augment=False, batch_size=7, eval_batch_size=100, sampling="square_root") == path
    assert path.stat().st_mtime_ns == written
    assert "computed before" in capsys.readouterr().out
    others = [
        {"ratio": 10},
        {"seed": 1},
        {"val_share": 0.2},
        {"copies": 1},
        {"copies": 2},
        {"copies": 2, "augment": False},
    ]
    found = {path, *(features(tmp_path, network, **other) for other in others)}
    weights = torch.load(network, weights_only=True)["state_dict"]
    weights["backbone.features.0.weight"][0, 0, 0, 0] += 1e-3
    torch.save(
        {name.removeprefix("backbone."): w for name, w in weights.items() if "backbone." in name}, tmp_path / "w.pt"
    )
    assert len(found | {features(tmp_path, tmp_path / "w.pt")}) == len(others) + 2


def test_copies_are_of_their_samples_and_augmented(tmp_path, network, capsys):
    """Without augmentation every copy is the sample itself, so that none is in another one's place."""
    for augment in (False, True):
        path = features(tmp_path, network, copies=2, augment=augment)
        assert "and 2 augmented copies" in capsys.readouterr().out
        with np.load(path) as file:
            copies = file["train_features"]
        assert copies.shape == (336, 3, 16)
        differ = [~np.isclose(copies[:, i], copies[:, j], atol=1e-5).all(axis=1) for i, j in ((0, 1), (1, 2))]
        assert all(share.mean() > 0.5 if augment else share.mean() == 0 for share in differ)


def test_class_means_start_a_head_on_features(tmp_path, network):
    """Those of the samples without augmentation, though the file has copies; at a learning rate of 0."""
    path = features(tmp_path, network, copies=1)
    settings = {"backbone_weights": str(network), "head_init": ClassMeans(), "sam": Plain}
    settings["optimizer"] = lambda params: torch.optim.SGD(params, lr=0.0)
    model = fitted(LongTailedClassifier(partial(SmallCNN, width=8), **settings), FeaturesDataModule(path))
    with np.load(path) as file:
        first, labels = torch.from_numpy(file["train_features"][:, 0]), torch.from_numpy(file["train_labels"])
    means = torch.stack([first[labels == label].mean(dim=0) for label in range(10)])
    torch.testing.assert_close(model.backbone.fc.weight.detach(), F.normalize(means, dim=1))
    assert not model.backbone.fc.bias.any()


def test_features_of_other_weights_and_views_are_one_line(imbsam, network, tmp_path):
    path = features(tmp_path, network)
    pieces = [*configs("data/features"), f"--config={path.with_suffix('.yaml')}", "--trainer.max_epochs=1", *QUIET]
    code, _, err = imbsam("fit", *pieces, "--model.backbone_weights=null")
    assert (code, err.splitlines()[-1].count("its features are of other weights (SmallCNN, 16 features)")) == (2, 1)
    code, _, err = imbsam("fit", *pieces, "--model.backbone.width=4", "--model.backbone_weights=null")
    assert (code, "its features are of other weights" in err.splitlines()[-1]) == (2, True)
    code, _, err = imbsam("fit", *pieces, "--model.crop_tta=2")
    assert (code, "model.crop_tta is 2: features have no views" in err.splitlines()[-1]) == (2, True)
    run = CommandTrainer(accelerator="cpu", logger=False)
    with pytest.raises(SettingError, match="model is SecondStageClassifier: features are computed by a LongTailed"):
        run.features(SecondStageClassifier(str(network)), DigitsLTDataModule())
    code, _, err = imbsam("features", *DIGITS, "--model.backbone_weights=nowhere.pt")
    assert (code, "backbone_weights is nowhere.pt: there is no such file" in err) == (2, True)


def test_a_test_refuses_features_of_other_weights_than_the_checkpoints(network, tmp_path):
    path = features(tmp_path, network, val_share=0.2)
    other = tmp_path / "other.ckpt"
    contents = torch.load(network, weights_only=True)
    contents["state_dict"]["backbone.features.0.weight"] *= 1.01
    torch.save(contents, other)
    data, run = FeaturesDataModule(path), quiet_trainer()
    for command in (run.test, run.validate, run.predict):
        with pytest.raises(SettingError, match="its features are of other weights"):
            command(LongTailedClassifier(partial(SmallCNN, width=8)), data, ckpt_path=other)
