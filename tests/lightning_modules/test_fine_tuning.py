"""Trainings that start from a pretrained network: what moves, what a checkpoint holds, how they are resumed."""

import logging
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from imbsam import GSAM, SAM, ImbSAM, Plain, SettingError
from lightning_modules import LongTailedClassifier, SecondStageClassifier
from lightning_modules.backbones import CifarResNet20, CosineClassifier, HuggingFace, Timm
from lightning_modules.callbacks.network_summary import NetworkSummary
from lightning_modules.callbacks.plain_weights import PlainWeights
from lightning_modules.factories import restore
from lightning_modules.resuming.resumable_checkpoint import ResumableCheckpoint
from lightning_modules.tuning import AdaptFormer, All, HeadOnly, LastBlocks, LoRA, Norm
from lightning_modules.tuning.head_init import ClassMeans
from tests.pieces import configs
from tests.pretrained import TIMM_VIT, TinyImages, hf_vit_folder, randomize
from tests.training import quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory):
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "vit.pth"
    torch.save(randomize(TIMM_VIT(num_classes=9)).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory):
    torch.manual_seed(6)
    path = tmp_path_factory.mktemp("weights") / "resnet.pth"
    torch.save(randomize(CifarResNet20(9, width=4)).state_dict(), path)
    return path


IMBSAM = partial(ImbSAM, eta=5, rho=0.1)


def model(file, backbone=TIMM_VIT, sam=IMBSAM, lr=0.05, **settings):
    seed_everything(3, verbose=False)
    weights = None if file is None else str(file)
    return LongTailedClassifier(
        backbone=backbone, backbone_weights=weights, sam=sam, many=8, few=4,
        optimizer=lambda params: torch.optim.SGD(params, lr=lr, momentum=0.9), **settings,
    )  # fmt: skip


def fit(module, ckpt_path=None, data=None, **settings):
    trainer = quiet_trainer(**settings)
    trainer.fit(module, datamodule=data or TinyImages(), ckpt_path=ckpt_path)
    return trainer


def state(module):
    return {name: tensor.detach().clone() for name, tensor in module.backbone.state_dict().items()}


class KillAt(Callback):
    def __init__(self, epoch, batch):
        self.moment = (epoch, batch)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.moment:
            raise RuntimeError("killed")


TUNES = {
    "lora": (TIMM_VIT, "vit_file", LoRA(rank=2, dropout=0.3)),
    "lora_alone": (TIMM_VIT, "vit_file", LoRA(rank=2, dropout=0.3, save_frozen=False, backbone_lr=0.5)),
    "adapters_alone": (TIMM_VIT, "vit_file", AdaptFormer(bottleneck=4, save_frozen=False)),
    "blocks_alone": (partial(CifarResNet20, width=4), "resnet_file", LastBlocks(n=2, save_frozen=False)),
    "all": (TIMM_VIT, "vit_file", All(layer_decay=0.7)),
}


@pytest.mark.parametrize("name", TUNES)
def test_a_killed_run_resumes_bit_identically(name, request, tmp_path):
    backbone, file, tune = TUNES[name]
    file = request.getfixturevalue(file)

    def run(folder, *callbacks, **settings):
        module = model(file, backbone, tune=tune)
        checkpoint = ResumableCheckpoint(every_seconds=0, dirpath=folder)
        run = fit(
            module, max_epochs=3, enable_checkpointing=True, callbacks=[checkpoint, *callbacks],
            default_root_dir=folder, **settings,
        )  # fmt: skip
        return module, run

    whole, trainer = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", KillAt(1, 1))
    again, resumed = run(tmp_path / "killed", ckpt_path=tmp_path / "killed/last.ckpt")
    assert all(torch.equal(tensor, state(again)[key]) for key, tensor in state(whole).items())
    momenta = (tree_leaves(t.optimizers[0].state_dict()) for t in (trainer, resumed))
    assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(*momenta, strict=True))


def test_a_checkpoint_of_the_trained_part_is_small_and_tests_alike(vit_file, tmp_path):
    module = model(vit_file, tune=LoRA(rank=2, save_frozen=False))
    trainer = fit(module)
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    saved = torch.load(tmp_path / "small.ckpt", weights_only=True)
    names = {n.removeprefix("backbone.") for n in saved["state_dict"] if n.startswith("backbone.")}
    assert names == {n for n, p in module.backbone.named_parameters() if p.requires_grad}
    wanted = torch.cat(trainer.predict(module, TinyImages()))
    again = model(vit_file, tune=LoRA(rank=2, save_frozen=False))
    found = torch.cat(quiet_trainer().predict(again, TinyImages(), ckpt_path=tmp_path / "small.ckpt"))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("average", [partial(EMAWeightAveraging, decay=0.5), WeightAveraging], ids=["ema", "mean"])
def test_averages_of_the_trained_part_alone_resume_and_predict(average, vit_file, tmp_path):
    """As with the frozen weights in the checkpoint, which then holds neither them nor their average."""

    def run(name, save_frozen, *callbacks, **settings):
        module = model(vit_file, tune=AdaptFormer(bottleneck=4, save_frozen=save_frozen))
        keep = ResumableCheckpoint(every_seconds=0, dirpath=tmp_path / name)
        callbacks = [average(), PlainWeights(), keep, *callbacks]
        trainer = fit(
            module, enable_checkpointing=True, callbacks=callbacks, max_epochs=3, default_root_dir=tmp_path, **settings
        )
        return module, trainer.test(module, TinyImages(), verbose=False)[0]

    whole, wanted = run("whole", True)
    with pytest.raises(RuntimeError, match="killed"):
        run("small", False, KillAt(1, 1))
    again, found = run("small", False, ckpt_path=tmp_path / "small/last.ckpt")
    assert found == wanted
    assert all(torch.equal(tensor, state(again)[key]) for key, tensor in state(whole).items())
    saved = torch.load(tmp_path / "small/last.ckpt", weights_only=True)
    trained = {f"backbone.{name}" for name, p in whole.backbone.named_parameters() if p.requires_grad}
    for weights in (saved["state_dict"], saved["current_model_state"]):
        assert {name for name in weights if name.startswith("backbone.")} == trained
    other = model(vit_file, tune=AdaptFormer(bottleneck=4, save_frozen=False))
    trainer, evaluated = quiet_trainer(callbacks=[PlainWeights()]), {"ckpt_path": tmp_path / "small/last.ckpt"}
    assert trainer.test(other, TinyImages(), **evaluated, verbose=False)[0] == wanted
    predicted = torch.cat(quiet_trainer().predict(other, TinyImages(), **evaluated))
    assert torch.equal(predicted, torch.cat(quiet_trainer().predict(whole, TinyImages())))  # the average


def test_other_frozen_weights_and_none_are_refused(vit_file, tmp_path):
    tune = HeadOnly(save_frozen=False)
    fit(model(vit_file, tune=tune)).save_checkpoint(tmp_path / "small.ckpt")
    torch.manual_seed(8)
    torch.save(TIMM_VIT(num_classes=9).state_dict(), tmp_path / "other.pth")
    for file, says in (
        (tmp_path / "other.pth", r"those of backbone_weights, .*other.pth, are not the ones"),
        (tmp_path / "gone.pth", r"backbone_weights is .*gone.pth: there is no such file"),
    ):
        with pytest.raises(SettingError, match=says):
            quiet_trainer().test(model(file, tune=tune), TinyImages(), ckpt_path=tmp_path / "small.ckpt", verbose=False)
    with pytest.raises(SettingError, match=r"tune.save_frozen is false and backbone_weights is null"):
        fit(model(None, tune=tune))


@pytest.mark.parametrize(
    ("tune", "says"),
    [
        (
            LoRA(rank=2),
            r", which has layers of LoRA or AdaptFormer: set model.tune as in .*, or start from what .*, .*vit\.pth",
        ),
        (
            AdaptFormer(bottleneck=4, save_frozen=False),
            ": a checkpoint of the trained part alone",
        ),
        (
            LastBlocks(n=1, save_frozen=False),
            r": a checkpoint of the trained part alone \(tune.save_frozen is false\): ",
        ),
    ],
    ids=["lora", "adapters_alone", "blocks_alone"],
)
def test_weights_of_a_tuned_part_are_one_line_with_the_reason(tune, says, vit_file, tmp_path):
    first = model(vit_file, tune=tune)
    fit(first, max_steps=1).save_checkpoint(tmp_path / "first.ckpt")
    with pytest.raises(SettingError, match=rf"backbone_weights is .*first\.ckpt{says}") as error:
        fit(model(tmp_path / "first.ckpt"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("save_frozen", [True, False])
def test_the_same_tune_starts_from_the_adapters_of_another_run(save_frozen, vit_file, tmp_path):
    first = model(vit_file, tune=LoRA(rank=2))
    fit(first).save_checkpoint(tmp_path / "first.ckpt")
    tune = LoRA(rank=2, save_frozen=save_frozen)
    again = model(tmp_path / "first.ckpt", tune=tune, lr=0.0)
    fit(again).save_checkpoint(tmp_path / "again.ckpt")
    tested = model(tmp_path / "first.ckpt", tune=tune)
    quiet_trainer().test(tested, TinyImages(), ckpt_path=tmp_path / "again.ckpt", verbose=False)
    for found in (state(again), state(tested)):
        assert all(torch.equal(tensor, found[name]) for name, tensor in state(first).items())
    assert {n for n, p in again.backbone.named_parameters() if p.requires_grad} == {
        n for n, p in first.backbone.named_parameters() if p.requires_grad
    }


def test_a_file_with_adapters_is_one_line_too(vit_file, tmp_path):
    first = model(vit_file, tune=LoRA(rank=2))
    fit(first, max_steps=1)
    torch.save(first.backbone.state_dict(), tmp_path / "lora.pth")
    with pytest.raises(
        SettingError, match=r"lora\.pth, which has layers of LoRA or AdaptFormer: set model.tune as in the run"
    ):
        fit(model(tmp_path / "lora.pth"))


def test_a_checkpoint_with_all_weights_needs_no_file(vit_file, tmp_path):
    copy = tmp_path / "copy.pth"
    copy.write_bytes(vit_file.read_bytes())
    first = model(copy, tune=AdaptFormer(bottleneck=4))
    fit(first).save_checkpoint(tmp_path / "own.ckpt")
    copy.unlink()
    again = model(copy, tune=AdaptFormer(bottleneck=4))
    fit(again, ckpt_path=tmp_path / "own.ckpt", max_epochs=2)
    assert torch.equal(again.backbone.blocks[0].mlp.mlp.fc1.weight, first.backbone.blocks[0].mlp.mlp.fc1.weight)
    with pytest.raises(SettingError, match=r"copy\.pth: there is no such file"):
        fit(model(copy, tune=AdaptFormer(bottleneck=4)))


def test_another_choice_than_the_checkpoints_is_refused(vit_file, tmp_path):
    fit(model(vit_file, tune=LoRA(rank=2))).save_checkpoint(tmp_path / "own.ckpt")
    with pytest.raises(SettingError, match=r"model.tune.*rank is 3, and the checkpoint's is 2"):
        quiet_trainer().test(model(vit_file, tune=LoRA(rank=3)), TinyImages(), ckpt_path=tmp_path / "own.ckpt")


@pytest.mark.parametrize(
    ("tune", "sam"),
    [
        (HeadOnly(), partial(SAM, rho=0.5)),
        (Norm(), partial(ImbSAM, eta=5, rho=0.5, perturb="norm")),
        (LoRA(rank=2), partial(ImbSAM, eta=5, rho=0.5, perturb="classifier")),
        (AdaptFormer(bottleneck=4), partial(GSAM, rho=0.5)),
    ],
    ids=["head", "norm", "lora", "adaptformer"],
)
def test_frozen_weights_are_never_written(tune, sam, vit_file):
    module = model(vit_file, tune=tune, sam=sam)
    found = {}

    class Remember(Callback):
        def on_train_start(self, trainer, pl_module):
            found["frozen"] = [p for p in pl_module.backbone.parameters() if not p.requires_grad]
            found["versions"] = [p._version for p in found["frozen"]]
            found["before"] = [p.clone() for p in found["frozen"]]

    fit(module, callbacks=[Remember()])
    assert [p._version for p in found["frozen"]] == found["versions"]  # each write in place would count up
    assert all(map(torch.equal, found["frozen"], found["before"]))
    assert all(p.grad is None for p in found["frozen"])


def test_learning_rates_by_group_follow_the_optimizers(vit_file):
    module = model(vit_file, tune=All(backbone_lr=0.1, layer_decay=0.5), lr=0.2)
    rates = [group["lr"] for group in fit(module).optimizers[0].param_groups]
    assert rates == pytest.approx([0.2, 0.0025, 0.005, 0.01, 0.02])
    module = model(vit_file, tune=HeadOnly(), lr=0.2)
    module.lr = 0.3  # as lr_find sets it
    (group,) = fit(module).optimizers[0].param_groups
    assert group["lr"] == 0.3
    assert len(group["params"]) == 2


def test_class_means_are_those_of_the_training_features(vit_file):
    data = TinyImages()
    module = model(vit_file, head=partial(CosineClassifier, scale=25), head_init=ClassMeans(), lr=0.0, sam=Plain)
    fit(module, data=data)
    images, labels = (torch.cat(parts) for parts in zip(*data.train_eval_dataloader(), strict=True))
    with torch.no_grad():
        features = module.backbone.eval().forward_head(module.backbone.forward_features(images), pre_logits=True)
    means = torch.stack([features[labels == c].mean(0) for c in range(3)])
    assert_close(module.backbone.head.weight.detach(), F.normalize(means, dim=1))


def test_class_means_of_a_batch_norm_network_that_is_trained_whole_use_its_running_statistics(resnet_file):
    module = model(resnet_file, partial(CifarResNet20, width=4), head_init=ClassMeans(), lr=0.0)
    fit(module)  # at a learning rate of 0
    data, network = TinyImages(), partial(CifarResNet20, width=4)(9)
    network.load_state_dict(torch.load(resnet_file, weights_only=True))
    network.fc = torch.nn.Identity()
    data.setup()
    images, labels = next(iter(data.train_eval_dataloader()))
    with torch.no_grad():
        features = network.eval()(images)
    means = torch.stack([features[labels == c].mean(dim=0) for c in range(3)])
    assert_close(module.backbone.fc.weight.detach(), F.normalize(means, dim=1), rtol=1e-4, atol=1e-5)
    assert module.backbone.training  # as before


def test_class_means_are_set_once_and_not_when_a_run_resumes(vit_file, tmp_path):
    settings = {"head_init": ClassMeans(), "tune": HeadOnly()}
    first = model(vit_file, **settings)
    fit(first).save_checkpoint(tmp_path / "own.ckpt")
    again = model(vit_file, lr=0.0, **settings)
    fit(again, ckpt_path=tmp_path / "own.ckpt", max_epochs=1)  # finished: nothing more is trained
    assert torch.equal(again.backbone.head.weight, first.backbone.head.weight)


def test_the_data_take_the_models_preprocessing_and_the_checkpoint_keeps_it(tmp_path, caplog):
    folder = hf_vit_folder(tmp_path / "vit")
    module = model(folder, HuggingFace(str(folder)), tune=HeadOnly(), sam=Plain)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit(module, data=(data := TinyImages(std=[0.25] * 3)))
    assert "images: 16 pixels, mean (0.4, 0.4, 0.4), std (0.25, 0.25, 0.25)" in caplog.text
    assert "except data.std, which is set" in caplog.text
    assert data.eval_collate.mean.flatten().tolist() == pytest.approx([0.4 * 255] * 3)
    assert data.train_collate.std.flatten().tolist() == pytest.approx([0.25 * 255] * 3)
    fit(module, data=TinyImages()).save_checkpoint(tmp_path / "own.ckpt")
    saved = torch.load(tmp_path / "own.ckpt", weights_only=True)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    data = TinyImages()
    again = model(folder, restore(saved["hyper_parameters"]["backbone"]), tune=HeadOnly(), sam=Plain)
    quiet_trainer().test(again, data, ckpt_path=tmp_path / "own.ckpt", verbose=False)
    assert data.eval_collate.mean.flatten().tolist() == pytest.approx([0.4 * 255] * 3)


def test_frozen_weights_that_are_random_are_a_warning(vit_file):
    for file, tune, warns in ((None, HeadOnly(), True), (vit_file, HeadOnly(), False), (None, All(), False)):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            fit(model(file, tune=tune), max_steps=1)
        assert any("tune is HeadOnly and backbone_weights is null" in str(w.message) for w in seen) == warns


def test_random_weights_leave_the_data_as_they_are():
    fit(model(None), data=(data := TinyImages()))
    assert not hasattr(data, "used")


def test_bfloat16_for_frozen_weights_float32_for_trained_ones(vit_file, tmp_path):
    tune = AdaptFormer(bottleneck=4, frozen_precision="bfloat16")
    module = model(vit_file, tune=tune)
    dtypes = {}

    class Remember(Callback):
        def on_train_start(self, trainer, pl_module):
            dtypes.update({n: p.dtype for n, p in pl_module.backbone.named_parameters()})

    trainer = fit(module, precision="bf16-mixed", callbacks=[Remember()])
    assert dtypes["blocks.0.attn.qkv.weight"] == torch.bfloat16
    assert dtypes["blocks.0.norm1.weight"] == torch.float32
    assert dtypes["blocks.0.mlp.adapter.0.weight"] == dtypes["head.weight"] == torch.float32
    assert module._half is None  # so nothing warns that perturbations are lost
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    again = model(vit_file, tune=tune)
    quiet_trainer().test(again, TinyImages(), ckpt_path=tmp_path / "own.ckpt", verbose=False)
    assert {p.dtype for p in again.backbone.parameters()} == {torch.float32}
    with pytest.raises(SettingError, match=r"frozen_precision is bfloat16 and trainer.precision is 32-true"):
        fit(model(vit_file, tune=tune))


@pytest.mark.parametrize("sam", [partial(SAM, rho=0.3), partial(ImbSAM, eta=5, rho=0.3)], ids=["sam", "imbsam"])
def test_gradient_checkpointing_gives_the_same_training(sam, vit_file):
    """With dropout: the passes see the same masks, drawn again in the backward pass."""
    found = []
    for checkpointing in (False, True):
        module = model(vit_file, tune=LoRA(rank=2, dropout=0.4), sam=sam, gradient_checkpointing=checkpointing)
        fit(module, max_epochs=2)
        found.append(state(module))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_gradient_checkpointing_keeps_fewer_activations(vit_file):
    sizes = []
    for checkpointing in (False, True):
        module = model(vit_file, gradient_checkpointing=checkpointing)
        fit(module, max_steps=1)
        sizes.append(0)

        def keep(tensor):
            sizes[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            module.backbone(torch.randn(4, 3, 16, 16))
    assert sizes[1] < sizes[0] / 3


def test_the_summary_says_what_is_trained(vit_file, capsys):
    fit(model(vit_file, tune=LoRA(rank=2)), callbacks=[NetworkSummary()], max_steps=1)
    table = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line.split("│")[2:4] for line in table.splitlines() if line.count("│") == 4}
    assert [cell.strip() for cell in rows["adapters"]] == [
        "1,024",
        "0",
    ]  # 2 blocks, rank 2: 2 * 2 * (16 + 48 + 16 + 16 + 16 + 64 + 64 + 16)
    assert [cell.strip() for cell in rows["classifier"]] == ["51", "0"]
    fit(model(vit_file), callbacks=[NetworkSummary()], max_steps=1)
    assert "adapters" not in capsys.readouterr().out


def test_a_second_stage_builds_on_a_tuned_first_one(vit_file, tmp_path):
    first = model(vit_file, tune=LoRA(rank=2, save_frozen=False))
    fit(first).save_checkpoint(tmp_path / "first.ckpt")
    seed_everything(1, verbose=False)
    second = SecondStageClassifier(
        checkpoint=str(tmp_path / "first.ckpt"), many=8, few=4, sam=Plain,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
    )  # fmt: skip
    fit(second)
    after, before = state(second), state(first)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"head.weight", "head.bias"}


def test_a_checkpoint_of_imbsam_is_read_with_its_own_preprocessing(imbsam, image_folder_root, tmp_path, caplog):
    """With the size that was set, from random weights as from pretrained ones; a setting still wins."""
    network = ["--model.backbone=Timm", "--model.backbone.name=test_resnet"]
    data = [f"--data.root={image_folder_root}", "--data.val_share=0", "--data.num_workers=0", "--data.batch_size=4"]
    few = [f"--trainer.limit_{part}_batches=1" for part in ("train", "test")]
    run = ["fit", *configs("data/image_folder"), *network, *data, *few, "--trainer.max_epochs=1"]

    def fitted(*more):
        caplog.clear()
        with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
            code, _, err = imbsam(*run, *more)
        assert code == 0, err
        checkpoint = max(tmp_path.glob("logs/**/last.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        return checkpoint, torch.load(checkpoint, weights_only=True)["preprocessing"]["image_size"]

    first, size = fitted("--data.image_size=32")
    assert size == 32
    assert "images: " not in caplog.text  # as the data set has them
    second, size = fitted(f"--model.backbone_weights={first}")
    assert size == 32
    assert "its classifier too: fc.weight, fc.bias, for the same classes" in caplog.text
    assert "images: 32 pixels, mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225): as the model was trained" in (
        caplog.text
    )
    _, size = fitted(f"--model.backbone_weights={second}", "--data.image_size=40")
    assert size == 40
    assert "except data.image_size, which is set" in caplog.text


def test_a_size_that_was_set_is_the_checkpoints(tmp_path, caplog):
    """Not that of the library's configuration; for a test on other data too."""
    choice = Timm("test_resnet")
    torch.save(choice(num_classes=3).state_dict(), tmp_path / "published.pth")
    trainer = fit(module := model(tmp_path / "published.pth", choice), data=TinyImages(image_size=24))
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    mean, std = (choice.preprocessing("")[name] for name in ("mean", "std"))
    saved = torch.load(tmp_path / "own.ckpt", weights_only=True)["preprocessing"]
    assert saved == {"image_size": 24, "mean": tuple(mean), "std": tuple(std)}
    for tested, ckpt_path in ((module, None), (model(None, choice), tmp_path / "own.ckpt")):
        other = TinyImages()
        quiet_trainer().test(tested, other, ckpt_path=ckpt_path, verbose=False)
        assert other.eval_collate.image_size == 24
    caplog.clear()
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        same = TinyImages(image_size=24, mean=mean, std=std)
        quiet_trainer().test(model(None, choice), same, ckpt_path=tmp_path / "own.ckpt", verbose=False)
    assert "images: " not in caplog.text  # nothing to take over


def test_a_checkpoints_preprocessing_is_handed_on(tmp_path):
    folder = hf_vit_folder(tmp_path / "vit")
    settings = {"backbone": HuggingFace(str(folder)), "tune": HeadOnly(), "sam": Plain}
    fit(model(folder, **settings)).save_checkpoint(tmp_path / "first.ckpt")
    (folder / "preprocessor_config.json").unlink()
    fit(model(tmp_path / "first.ckpt", **settings), data=(data := TinyImages()))
    assert (data.used.image_size, data.used.mean, data.used.std) == (16, (0.4,) * 3, (0.2,) * 3)
    larger = HuggingFace(str(folder), {"image_size": 32})
    fit(model(tmp_path / "first.ckpt", **{**settings, "backbone": larger}), data=(data := TinyImages()))
    assert (data.used.image_size, data.used.mean) == (32, (0.4,) * 3)
