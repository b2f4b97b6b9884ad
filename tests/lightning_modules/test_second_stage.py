"""The second stage: what is trained, what stays, and that it stands on its own afterwards."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from sklearn.metrics import balanced_accuracy_score
from torch.testing import assert_close

from datamodules import DigitsLTDataModule
from imbsam import ImbSAM, Plain, SettingError
from lightning_modules import LongTailedClassifier, SecondStageClassifier
from lightning_modules.backbones import CosineClassifier, SmallCNN
from tests.training import quiet_trainer

NET: dict[str, Any] = {"backbone": partial(SmallCNN, width=8, norm="batch")}
GROUPS: dict[str, Any] = {"many": 50, "few": 10}


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def data(val_share=0.2, **settings):
    return DigitsLTDataModule(val_share=val_share, **settings)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A first stage of ten epochs: its model and checkpoint."""
    folder = tmp_path_factory.mktemp("first")
    seed_everything(0)
    model = LongTailedClassifier(**NET, **GROUPS, sam=Plain, optimizer=sgd)
    run = quiet_trainer(default_root_dir=folder, max_epochs=10, limit_val_batches=0)
    run.fit(model, datamodule=data())
    run.save_checkpoint(folder / "first.ckpt")
    return model, folder / "first.ckpt"


def second(tmp_path, first, data=data, max_epochs=1, **settings):
    seed_everything(1)
    model = SecondStageClassifier(str(first[1]), **{**GROUPS, "sam": Plain, "optimizer": sgd, **settings})
    run = quiet_trainer(default_root_dir=tmp_path, max_epochs=max_epochs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*sampling.*")
        run.fit(model, datamodule=data())
    return model, run


def state(model):
    return {name: t.detach().clone() for name, t in model.backbone.state_dict().items()}


@pytest.mark.parametrize(
    ("stage", "method", "trained"),
    [
        ("crt", partial(ImbSAM, rho=0.5), {"fc.weight", "fc.bias"}),
        ("lws", Plain, {"fc.scale"}),
        ("tau_norm", Plain, set()),
        ("weight_balancing", Plain, {"fc.weight", "fc.bias"}),
    ],
)
def test_only_the_classifier_is_trained(tmp_path, first, stage, trained, method):
    model, _ = second(tmp_path, first, stage=stage, sam=method)
    before, after = state(first[0]), state(model)
    assert {n for n, p in model.backbone.named_parameters() if p.requires_grad} == trained
    assert all(p.grad is None for p in model.backbone.parameters() if not p.requires_grad)
    for name, tensor in before.items():  # BatchNorm's statistics too
        if not name.startswith("fc"):
            assert torch.equal(after[name], tensor), name
    for name in trained:
        assert name not in before or not torch.equal(after[name], before[name])


def test_only_trained_weights_are_perturbed_and_samples_are_independent(tmp_path, first):
    plain, _ = second(tmp_path, first, stage="crt")
    model, _ = second(tmp_path, first, stage="crt", sam=partial(ImbSAM, rho=0.5))
    assert (model.backbone.fc.weight - plain.backbone.fc.weight).norm() > 1e-3
    model.train()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) and m.training for m in model.modules())


def test_fine_tuning_trains_all(tmp_path, first):
    model, _ = second(tmp_path, first, stage="crt", sam=ImbSAM, freeze_backbone=False)
    before = state(first[0])
    assert all(not torch.equal(tensor, before[name]) for name, tensor in state(model).items())
    model.train()
    assert any(isinstance(m, torch.nn.BatchNorm2d) and m.training for m in model.modules())


def test_crt_reinitialises_the_classifier_and_weight_balancing_does_not(tmp_path, first):
    start = state(first[0])["fc.weight"]
    still = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.0)}
    crt = state(second(tmp_path, first, stage="crt", **still)[0])["fc.weight"]
    assert (crt - start).norm() > 0.5 * start.norm()
    balanced = second(tmp_path, first, stage="weight_balancing", **still)[0]
    norms, radius = start.norm(dim=1, keepdim=True), balanced._max_norm.radius
    assert radius == pytest.approx(float(norms.min() + 0.1 * (norms.max() - norms.min())), rel=1e-6)
    assert_close(balanced.backbone.fc.weight.detach(), start * (radius / norms).clamp(max=1))


def test_weight_balancing_stays_in_the_ball(tmp_path, first):
    model, _ = second(tmp_path, first, stage="weight_balancing", max_norm_threshold=0.3)
    norms = model.backbone.fc.weight.detach().norm(dim=1)
    assert norms.max() <= model._max_norm.radius * (1 + 1e-6)
    assert float(norms.max()) == pytest.approx(model._max_norm.radius, rel=1e-5)


def test_lws_scales_the_logits_of_each_class(tmp_path, first):
    model, _ = second(tmp_path, first, stage="lws")
    images = torch.randn(6, 1, 8, 8)
    scale = model.backbone.fc.scale
    assert not torch.equal(scale, torch.ones(10))
    with torch.no_grad():
        assert_close(model.eval()(images), scale * first[0].eval()(images))


def test_tau_norm_divides_by_the_norm_to_the_tau(tmp_path, first):
    model, run = second(tmp_path, first, stage="tau_norm", tau=0.7, max_epochs=5)
    start = state(first[0])["fc.weight"]
    assert_close(model.backbone.fc.weight, start / start.norm(dim=1, keepdim=True) ** 0.7)
    assert torch.equal(model.backbone.fc.bias, torch.zeros(10))
    assert run.global_step == 0


def test_tau_is_the_best_of_the_validation_set(tmp_path, first):
    model, _ = second(tmp_path, first, stage="tau_norm")
    network, split = first[0].backbone.eval(), data()
    split.setup()
    images, targets = (torch.cat(parts) for parts in zip(*split.val_dataloader(), strict=True))
    weight, features = state(first[0])["fc.weight"], []
    hook = network.fc.register_forward_hook(lambda module, args, out: features.append(args[0]))
    with torch.no_grad():
        network(images)
    hook.remove()
    accuracies = {}
    for tenth in range(21):
        logits = features[0] @ (weight / weight.norm(dim=1, keepdim=True) ** (tenth / 10)).T
        accuracies[tenth / 10] = balanced_accuracy_score(targets, logits.argmax(dim=1))
    assert accuracies[model.tau_applied] == max(accuracies.values())
    assert len(set(accuracies.values())) > 2
    with pytest.raises(SettingError, match="tau is null and there is no validation set"):
        second(tmp_path, first, stage="tau_norm", data=lambda: data(val_share=0.0))


@pytest.mark.parametrize("stage", ["crt", "lws", "tau_norm", "weight_balancing"])
def test_its_own_checkpoint_needs_no_first_stage(tmp_path, first, stage):
    gone = tmp_path / "gone.ckpt"
    gone.write_bytes(first[1].read_bytes())
    model, run = second(tmp_path, (None, gone), stage=stage)
    run.test(model, datamodule=data(), verbose=False)
    wanted = run.callback_metrics["test/all"]
    run.save_checkpoint(tmp_path / "own.ckpt")
    gone.unlink()

    def again():
        return SecondStageClassifier(str(gone), stage=stage, sam=Plain, optimizer=sgd, **GROUPS)

    tested = quiet_trainer(default_root_dir=tmp_path)
    tested.test(again(), datamodule=data(), ckpt_path=tmp_path / "own.ckpt", verbose=False)
    assert tested.callback_metrics["test/all"] == wanted
    loaded = SecondStageClassifier.load_from_checkpoint(tmp_path / "own.ckpt")
    assert all(torch.equal(t, state(model)[name]) for name, t in state(loaded).items())
    resumed, run = again(), quiet_trainer(default_root_dir=tmp_path, max_epochs=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(sampling|last.ckpt).*")
        run.fit(resumed, datamodule=data(), ckpt_path=tmp_path / "own.ckpt")
    assert run.global_step == (0 if stage == "tau_norm" else 2 * 9)
    if stage == "tau_norm":
        assert torch.equal(resumed.backbone.fc.weight, model.backbone.fc.weight)
    elif stage == "weight_balancing":
        assert resumed._max_norm.radius == model._max_norm.radius
    with pytest.raises(SettingError, match=r"gone\.ckpt: no such file"):
        quiet_trainer(default_root_dir=tmp_path).fit(again(), datamodule=data())


def test_from_crt_to_tau_norm_and_not_from_lws(tmp_path, first):
    for stage in ("crt", "lws"):
        _, run = second(tmp_path, first, stage=stage)
        run.save_checkpoint(tmp_path / f"{stage}.ckpt")
    model, _ = second(tmp_path, (None, tmp_path / "crt.ckpt"), stage="tau_norm", tau=1.0)
    assert_close(model.backbone.fc.weight.norm(dim=1), torch.ones(10))
    with pytest.raises(SettingError, match="it is of stage lws"):
        second(tmp_path, (None, tmp_path / "lws.ckpt"), stage="crt")


def test_a_cosine_head(tmp_path):
    seed_everything(0)
    model = LongTailedClassifier(**NET, head=partial(CosineClassifier, scale=16), sam=Plain, optimizer=sgd)
    run = quiet_trainer(default_root_dir=tmp_path)
    run.fit(model, datamodule=data())
    run.save_checkpoint(tmp_path / "cosine.ckpt")
    crt, _ = second(tmp_path, (None, tmp_path / "cosine.ckpt"), stage="crt")
    assert crt.backbone.fc.scale == 16
    for stage in ("tau_norm", "weight_balancing"):
        with pytest.raises(SettingError, match=f"stage is {stage} and the first stage's head is cosine"):
            second(tmp_path, (None, tmp_path / "cosine.ckpt"), stage=stage)


def test_unsuitable_checkpoints_and_data_are_refused(tmp_path, first):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(SettingError, match="not one of LongTailedClassifier"):
        second(tmp_path, (None, tmp_path / "other.ckpt"))
    checkpoint = torch.load(first[1], weights_only=True)
    torch.save({**checkpoint, "class_names": ["a", "b"]}, tmp_path / "two.ckpt")
    with pytest.raises(SettingError, match=r"first stage \(.*two.ckpt\) knows a, b, which the data lack"):
        second(tmp_path, (None, tmp_path / "two.ckpt"))
    with pytest.warns(UserWarning, match="class_counts are not those of the first stage"):
        second(tmp_path, first, data=lambda: data(val_share=0.3))
    with pytest.raises(SettingError, match=r"checkpoint of a first stage: name it with model\.checkpoint"):
        quiet_trainer(default_root_dir=tmp_path).fit(
            SecondStageClassifier(str(first[1])), datamodule=data(), ckpt_path=first[1]
        )


def test_sampling_that_does_not_balance_warns(tmp_path, first):
    natural, balanced = data(), data()
    natural.sampling, balanced.sampling = "instance_balanced", "class_balanced"
    with pytest.warns(UserWarning, match="data.sampling is instance_balanced: .* set data.sampling to class_balanced"):
        quiet_trainer(default_root_dir=tmp_path).fit(
            SecondStageClassifier(str(first[1]), stage="crt"), datamodule=natural
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="stage is crt")
        quiet_trainer(default_root_dir=tmp_path).fit(
            SecondStageClassifier(str(first[1]), stage="crt"), datamodule=balanced
        )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"stage": "ncm"}, "stage is 'ncm': choose one of crt"),
        ({"stage": "tau_norm", "tau": -1.0}, "tau is -1.0"),
        ({"stage": "crt", "tau": 1.0}, "tau belongs to tau_norm"),
        ({"stage": "weight_balancing", "max_norm_threshold": -1.0}, "threshold is -1.0"),
    ],
)
def test_bad_settings(settings, says):
    with pytest.raises(SettingError, match=says):
        SecondStageClassifier("nowhere.ckpt", **settings)
