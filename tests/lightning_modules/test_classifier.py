"""LongTailedClassifier: the same steps as a plain loop around the engine, and what Lightning adds to them."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_calibration_error

from datamodules import DigitsLTDataModule
from imbsam import SAM, FocalSAM, ImbSAM, Plain, SettingError
from imbsam.losses import LDAM
from lightning_modules import LongTailedClassifier
from lightning_modules.backbones import SmallCNN
from lightning_modules.callbacks.evaluation_files import EvaluationFiles
from tests.training import csv_rows

SMALL: dict[str, Any] = {"backbone": partial(SmallCNN, width=8), "many": 50, "few": 10}


def trainer(tmp_path, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": CSVLogger(tmp_path),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
    }
    return Trainer(**{**defaults, **settings})


def fit(
    tmp_path, data: LightningDataModule | None = None, trainer_settings: dict[str, Any] | None = None, **settings: Any
):
    seed_everything(0)
    model = LongTailedClassifier(**{**SMALL, **settings})
    run = trainer(tmp_path, **(trainer_settings or {}))
    run.fit(model, datamodule=data or DigitsLTDataModule())
    return model, run


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    "method",
    [Plain, partial(SAM, rho=0.1), partial(ImbSAM, rho=0.1), partial(FocalSAM, rho=0.1)],
    ids=["plain", "sam", "imbsam", "focal_sam"],
)
def test_trains_like_a_plain_loop(tmp_path, method):
    model, run = fit(tmp_path, sam=partial(method, tail_weight=2.0), optimizer=sgd)

    seed_everything(0)
    data = DigitsLTDataModule()
    data.setup()
    plain = SmallCNN(num_classes=10, width=8)
    optimizer = sgd(plain.parameters())
    model.backbone, backbone = plain, model.backbone
    model.backbone = plain
    engine = model.sam_factory(plain, data.class_counts)
    engine.first_pass = "split"  # the LightningModules' default
    loader = data.train_dataloader()
    for _ in range(2):
        for x, y in loader:
            engine.backward(lambda rows, x=x, y=y: F.cross_entropy(plain(x[rows]), y[rows], reduction="none"), y)
            optimizer.step()
            optimizer.zero_grad()

    assert run.global_step == 2 * 11
    for (name, found), wanted in zip(backbone.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, msg=name)


def test_methods_differ(tmp_path):
    weights = {}
    methods = {"sgd": Plain, "sam": partial(SAM, rho=0.5), "imbsam": partial(ImbSAM, rho=0.5)}
    methods["focal_sam"] = partial(FocalSAM, rho=0.5)
    for method, sam in methods.items():
        model, _ = fit(tmp_path, sam=sam, optimizer=sgd)
        weights[method] = torch.cat([p.detach().flatten() for p in model.backbone.parameters()])
    for method in ("sam", "imbsam", "focal_sam"):
        assert (weights[method] - weights["sgd"]).norm() > 1e-3
    assert (weights["sam"] - weights["imbsam"]).norm() > 1e-3


def test_tail_weight_is_for_every_method(tmp_path):
    losses = []
    for weight in (1.0, 2.0):
        _, run = fit(tmp_path, sam=partial(Plain, tail_weight=weight), trainer_settings={"max_steps": 1})
        losses.append(float(run.callback_metrics["train/loss_step"]))
    assert losses[1] > losses[0]


def test_logs(tmp_path):
    model, run = fit(tmp_path, data=DigitsLTDataModule(val_share=0.3), optimizer=sgd)
    logged = run.callback_metrics
    assert {
        "train/loss_step",
        "train/loss_epoch",
        "train/tail_rows",
        "lr",
        "val/loss",
        "val/many",
        "val/medium",
        "val/few",
        "val/all",
    } <= set(logged)
    assert logged["lr"] == pytest.approx(0.1)
    run.test(model, datamodule=run.datamodule, verbose=False)
    assert {"test/loss", "test/many", "test/medium", "test/few", "test/all"} <= set(run.callback_metrics)


def test_only_the_steps_that_the_trainer_writes_are_logged(tmp_path, monkeypatch):
    logged = []
    log = LongTailedClassifier.log
    monkeypatch.setattr(
        LongTailedClassifier, "log", lambda self, name, *a, **k: (logged.append(name), log(self, name, *a, **k))
    )
    _, run = fit(tmp_path, trainer_settings={"log_every_n_steps": 4})
    assert logged.count("train/loss_step") == 22 // 4
    steps = [int(row["step"]) for row in csv_rows(f"{run.log_dir}/metrics.csv") if row["train/loss_step"]]
    assert steps == [3, 7, 11, 15, 19]


def test_tail_rows_counts_the_samples_of_tail_classes(tmp_path):
    data = DigitsLTDataModule(batch_size=10_000)
    _, run = fit(tmp_path, data=data, sam=partial(ImbSAM, eta=20), trainer_settings={"max_epochs": 1})
    assert run.callback_metrics["train/tail_rows"] == data.class_counts[data.class_counts < 20].sum()


def test_accumulated_batches_count_as_one(tmp_path):
    """4 batches of 8 samples are one of 32, for the perturbation too (GroupNorm)."""

    class Fixed(DigitsLTDataModule):
        def train_dataloader(self):
            return DataLoader(TensorDataset(*self.rows), batch_size=self.batch_size)

    weights = []
    for batch_size, accumulate in ((32, 1), (8, 4)):
        data = Fixed(batch_size=batch_size)
        data.setup()
        x, y = next(iter(DigitsLTDataModule.train_dataloader(DigitsLTDataModuleWith(batch_size=70))))
        data.rows = (x.double(), y)
        model = LongTailedClassifier(
            **SMALL, accumulate_grad_batches=accumulate, optimizer=sgd, sam=partial(ImbSAM, rho=0.5)
        )
        seed_everything(0)
        run = trainer(tmp_path, precision="64-true", max_epochs=1)
        run.fit(model, datamodule=data)
        assert run.global_step == 3  # 32 + 32 + 6 samples
        weights.append(torch.cat([p.detach().flatten() for p in model.backbone.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-12)


def DigitsLTDataModuleWith(**settings: Any) -> DigitsLTDataModule:
    seed_everything(0)
    data = DigitsLTDataModule(**settings)
    data.setup()
    return data


@pytest.mark.parametrize(
    ("interval", "expected"), [("epoch", [0.1] * 11 + [0.05] * 11), ("step", [0.1 / 2**i for i in range(22)])]
)
def test_scheduler_steps_by_epoch_or_by_optimizer_step(tmp_path, interval, expected):
    rates = []

    class Watch(LongTailedClassifier):
        def on_before_optimizer_step(self, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    seed_everything(0)
    model = Watch(**SMALL, optimizer=sgd, lr_scheduler=lambda o: StepLR(o, 1, 0.5), lr_interval=interval)
    trainer(tmp_path).fit(model, datamodule=DigitsLTDataModule())
    assert rates == pytest.approx(expected)


def test_reduce_lr_on_plateau_monitors_the_training_loss_without_a_validation_split(tmp_path):
    model, run = fit(
        tmp_path,
        optimizer=lambda p: torch.optim.SGD(p, lr=1e-5),
        lr_scheduler=lambda o: ReduceLROnPlateau(o, patience=0, threshold=0.5),
        trainer_settings={"max_epochs": 3},
    )
    assert model.lr_schedulers().best == pytest.approx(float(run.callback_metrics["train/loss_epoch"]), rel=0.1)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-5 * 0.1**2)


def test_cosine_of_another_length_than_the_run_warns(tmp_path):
    with pytest.warns(UserWarning, match="T_max is 7 and the run has 2 epochs"):
        fit(tmp_path, lr_scheduler=lambda o: CosineAnnealingLR(o, 7))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*T_max.*")
        fit(tmp_path, lr_scheduler=lambda o: CosineAnnealingLR(o, 2))


@pytest.mark.parametrize("precision", ["32", "16-mixed"])
def test_clips_the_unscaled_gradient(tmp_path, precision):
    moved = []

    class Watch(LongTailedClassifier):
        def on_train_batch_start(self, batch, batch_idx):
            self.before = [p.detach().clone() for p in self.backbone.parameters()]

        def on_train_batch_end(self, outputs, batch, batch_idx):
            steps = [b - p.detach() for p, b in zip(self.backbone.parameters(), self.before, strict=True)]
            flat = torch.cat([s.flatten() for s in steps])
            moved.append(float(flat.norm()))

    plugins = []
    if precision == "16-mixed":  # on the CPU Lightning's own setting of that name is bf16 without a scaler
        plugins = [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))]
    seed_everything(0)
    model = Watch(
        **SMALL,
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        gradient_clip_val=1e-3,
    )
    run = trainer(tmp_path, plugins=plugins, max_epochs=1)
    run.fit(model, datamodule=DigitsLTDataModule())
    assert max(moved) == pytest.approx(1e-3, rel=0.01)
    assert min(moved) > 0


def test_cosine_by_step_counts_accumulated_batches_once(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*T_max.*")
        fit(
            tmp_path,
            lr_scheduler=lambda o: CosineAnnealingLR(o, 6),  # 2 epochs of 11 batches, 4 at a time
            lr_interval="step",
            accumulate_grad_batches=4,
        )


def test_an_interrupted_step_leaves_no_batches_behind(tmp_path):
    rows = []

    class Interrupted(LongTailedClassifier):
        stop = True

        def forward(self, images):
            rows.append(len(images))
            if self.stop and len(rows) == 2:
                raise ValueError("stopped")
            return super().forward(images)

    seed_everything(0)
    model = Interrupted(**SMALL, sam=Plain, optimizer=sgd)
    with pytest.raises(ValueError, match="stopped"):
        trainer(tmp_path).fit(model, datamodule=DigitsLTDataModule())
    rows.clear()
    model.stop = False
    trainer(tmp_path, max_steps=3).fit(model, datamodule=DigitsLTDataModule())
    assert rows == [32, 32, 32]


def test_a_fit_stopped_mid_accumulation_leaves_no_batches_behind(tmp_path):
    rows = []

    class Stopped(LongTailedClassifier):
        stop = True

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.stop and batch_idx == 1:
                raise ValueError("stopped")

        def forward(self, images):
            rows.append(len(images))
            return super().forward(images)

    seed_everything(0)
    model = Stopped(**SMALL, sam=Plain, optimizer=sgd, accumulate_grad_batches=4)
    with pytest.raises(ValueError, match="stopped"):
        trainer(tmp_path).fit(model, datamodule=DigitsLTDataModule())
    model.stop = False
    run = trainer(tmp_path, max_steps=1)
    run.fit(model, datamodule=DigitsLTDataModule())
    assert rows == [32] * 4
    assert run.fit_loop.total_batch_idx + 1 == 4


@pytest.mark.parametrize("hooks", ["after", "before and after"])
def test_data_may_transform_batches_in_lightnings_hooks(tmp_path, hooks):
    class Mixing(DigitsLTDataModule):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            images, targets = batch
            soft = F.one_hot(targets, 10).float()
            return images, 0.8 * soft + 0.02 if self.trainer.training else targets

    class Negative(Mixing):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            images, targets = batch
            return -images, targets

    data = (Mixing if hooks == "after" else Negative)(batch_size=10_000)
    _, run = fit(tmp_path, data=data, sam=partial(ImbSAM, eta=20), trainer_settings={"max_epochs": 1})
    tail = data.class_counts < 20
    expected = 0.8 * data.class_counts[tail].sum() + 0.02 * tail.sum() * data.class_counts.sum()
    assert float(run.callback_metrics["train/tail_rows"]) == pytest.approx(float(expected), rel=1e-4)


def test_checkpoint_brings_its_classes(tmp_path):
    model, run = fit(tmp_path, data=DigitsLTDataModule(ratio=10), optimizer=sgd)
    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = LongTailedClassifier.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert torch.equal(loaded.class_counts, run.datamodule.class_counts)
    assert loaded.class_names == [str(i) for i in range(10)]
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    # the groups stay those of the training it went through
    other = DigitsLTDataModule(seed=1)
    trainer(tmp_path).test(loaded, datamodule=other, verbose=False)
    assert torch.equal(loaded.class_counts, run.datamodule.class_counts)
    fresh = LongTailedClassifier(**SMALL)
    with pytest.warns(UserWarning, match="not those that the checkpoint was trained with"):
        trainer(tmp_path).test(
            fresh, datamodule=other, ckpt_path=tmp_path / "model.ckpt", verbose=False, weights_only=True
        )
    for accuracy in (loaded.test_accuracy, fresh.test_accuracy):
        assert torch.equal(accuracy.class_counts, run.datamodule.class_counts)
    # trained further on other data, it takes that data's
    trainer(tmp_path, max_steps=1).fit(loaded, datamodule=other)
    assert torch.equal(loaded.test_accuracy.class_counts, other.class_counts)


def test_groups_of_another_ratio_last_through_checkpoint_and_test(tmp_path):
    """At ratio 10 no digit has fewer than 10 training samples; at ratio 50 four have."""
    data, other = DigitsLTDataModule(ratio=10, groups_of_ratio=50), DigitsLTDataModule(ratio=50)
    other.setup()
    few = other.class_counts < 10
    model, run = fit(tmp_path, data)
    assert data.class_counts.min() >= 10
    assert torch.equal(model.test_accuracy.masks["few"], few)
    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = LongTailedClassifier.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert torch.equal(loaded.test_accuracy.masks["few"], few)
    assert torch.equal(loaded.class_counts, data.class_counts)
    for ratio, wanted in ((None, few), (10, torch.zeros(10, dtype=torch.bool))):  # the checkpoint's; the data's own
        fresh, same = LongTailedClassifier(**SMALL), DigitsLTDataModule(ratio=10, groups_of_ratio=ratio)
        trainer(tmp_path).test(fresh, same, ckpt_path=tmp_path / "model.ckpt", verbose=False, weights_only=True)
        assert torch.equal(fresh.test_accuracy.masks["few"], wanted)


class Unnamed(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 1, 8, 8), self.labels), batch_size=4)


@pytest.mark.parametrize(
    ("profile", "ratio", "message"),
    [
        ("none", 100, "groups_of_ratio is 100: .* has no ratio: leave it out"),
        ("exponential", 0.5, "groups_of_ratio is 0.5: ratio is 0.5, .*: give its inverse, 2 "),
        ("exponential", 999, "groups_of_ratio is 999: ratio is 999, .*: give at most 122"),
    ],
)
def test_groups_of_a_ratio_that_the_data_do_not_have_are_refused(profile, ratio, message):
    with pytest.raises(SettingError, match=f"^{message}"):
        DigitsLTDataModule(profile=profile, groups_of_ratio=ratio).setup()


@pytest.mark.parametrize("method", [partial(ImbSAM, eta=4), SAM, Plain], ids=["imbsam", "sam", "plain"])
@pytest.mark.parametrize(
    ("counts", "labels", "message"),
    [
        (None, [0, 1] * 4, r"the data \(Unnamed\) has no class_counts"),
        ([5, 3], [0, 1, 2, 1] * 2, "targets holds the label 2: with 2 classes"),
        ([5, 3], [0, 1, -1, 1] * 2, "targets holds the label -1"),
    ],
)
def test_unsuitable_data_are_refused(tmp_path, counts, labels, message, method):
    data = Unnamed()
    data.labels = torch.tensor(labels)
    if counts:
        data.class_counts, data.class_names = torch.tensor(counts), ["a", "b"]
    with pytest.raises(SettingError, match=message):
        trainer(tmp_path).fit(LongTailedClassifier(**SMALL, sam=method), datamodule=data)


def test_model_of_other_classes(tmp_path):
    _, run = fit(tmp_path)
    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = LongTailedClassifier.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    data = Unnamed()
    data.labels, data.class_counts, data.class_names = torch.tensor([0, 1] * 4), torch.tensor([4, 4]), ["a", "b"]
    with pytest.raises(SettingError, match=r"the model knows 0, 1, 2, 3, 4 and 5 more, which the data lack"):
        trainer(tmp_path).fit(loaded, datamodule=data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sam": partial(ImbSAM, rho=-1.0)}, "rho is -1.0"),
        ({"sam": partial(ImbSAM, rho=float("nan"))}, "rho is nan"),
        ({"gradient_clip_val": -1.0}, "gradient_clip_val is -1.0"),
        ({"backbone": torch.nn.Linear(3, 4)}, "backbone is a Linear that is already built"),
        ({"backbone": partial(SmallCNN, wdth=3)}, "backbone or head: .*wdth=3"),
        ({"optimizer": lambda p: torch.optim.SGD(p, lr=-1.0)}, "Invalid learning rate"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches is 0"),
        ({"loss": partial(LDAM, tauu=1)}, "loss is LDAM: .*tauu"),
        ({"backbone": "resnet9000"}, "resnet9000"),
        ({"sam": partial(ImbSAM, tail_classes=[10])}, "tail_classes"),
    ],
)
def test_settings_that_cannot_work(tmp_path, settings, message):
    with pytest.raises(SettingError, match=message):
        fit(tmp_path, **settings)


@pytest.mark.parametrize(("eta", "message"), [(1, "leaves no tail class"), (1000, "makes every class a tail class")])
def test_eta_without_effect_warns(tmp_path, eta, message):
    with pytest.warns(UserWarning, match=message):
        fit(tmp_path, sam=partial(ImbSAM, eta=eta), trainer_settings={"max_steps": 1})


def test_channels_last_takes_the_same_steps(tmp_path):
    plain, last = (
        fit(tmp_path, optimizer=sgd, channels_last=c, sam=partial(ImbSAM, rho=0.1))[0] for c in (False, True)
    )
    weight = last.backbone.get_parameter("features.3.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    seen = []
    last.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0].stride()))
    last(torch.zeros(2, 2, 8, 8)[:, :1])
    assert seen == [(64, 1, 8, 1)]
    for name, parameter in last.backbone.named_parameters():
        torch.testing.assert_close(parameter, plain.backbone.get_parameter(name), rtol=1e-3, atol=1e-4)


def test_balanced_sampling_with_eta_warns(tmp_path):
    sampled = DigitsLTDataModule(sampling="class_balanced")
    with pytest.warns(UserWarning, match=r"data\.sampling is class_balanced.*% of the training samples and 50\.0 %"):
        fit(tmp_path, sampled, {"max_epochs": 1}, optimizer=sgd)
    for settings in ({"sam": Plain}, {"sam": partial(ImbSAM, tail_classes=[3])}):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "data.sampling")
            fit(tmp_path, DigitsLTDataModule(sampling="class_balanced"), {"max_epochs": 1}, optimizer=sgd, **settings)


def test_mixed_targets_count_by_their_part_of_tail_classes(tmp_path):
    data = DigitsLTDataModule(mixup=1.0, batch_size=400)  # a batch for all
    model, run = fit(tmp_path, data, {"max_epochs": 1}, optimizer=sgd)
    assert model.class_counts is not None
    tail = model.class_counts[model.class_counts < 20].sum()
    torch.testing.assert_close(run.callback_metrics["train/tail_rows"], tail.float())  # mixing moves parts of rows only
    _, targets = next(iter(data.train_dataloader()))
    assert int((targets[:, model.class_counts < 20] > 0).any(1).sum()) > 1.5 * tail  # which are in twice as many rows


@pytest.mark.slow
def test_compiled_backbone_takes_the_same_steps(tmp_path):
    runs = [fit(tmp_path, optimizer=sgd, compile=compiled)[0] for compiled in (False, True)]
    eager, compiled = (torch.cat([p.detach().flatten() for p in model.backbone.parameters()]) for model in runs)
    torch.testing.assert_close(compiled, eager, rtol=1e-2, atol=1e-4)
    assert list(runs[1].state_dict()) == list(runs[0].state_dict())


def test_plateau_scheduler_by_step_is_refused(tmp_path):
    with pytest.raises(SettingError, match="lr_interval is step: ReduceLROnPlateau"):
        fit(tmp_path, lr_scheduler=ReduceLROnPlateau, lr_interval="step")


def test_calibration_error_and_flip_of_a_test(tmp_path):
    """On all groups, of the logits of image and mirror image; validation sees the image alone."""
    data = DigitsLTDataModule(val_share=0.2)
    model, run = fit(tmp_path, data, {"callbacks": [EvaluationFiles()], "limit_val_batches": 0}, flip_tta=True)
    model.eval()
    images, targets = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    with torch.no_grad():
        logits = (model(images) + model(images.flip(3))) / 2
    loss = run.test(model, datamodule=data, verbose=False)[0]["test/loss"]
    assert loss == pytest.approx(float(F.cross_entropy(logits, targets)), rel=1e-5)
    for name, mask in model.test_accuracy.masks.items():
        error = multiclass_calibration_error(logits[mask[targets]], targets[mask[targets]], num_classes=10, n_bins=15)
        assert float(run.callback_metrics[f"test/ece_{name}"]) == pytest.approx(float(error), abs=1e-6)
    found = torch.cat(run.predict(model, datamodule=data))
    torch.testing.assert_close(found, logits.softmax(dim=1))
    images, targets = (torch.cat(parts) for parts in zip(*data.val_dataloader(), strict=True))
    with torch.no_grad():
        wanted = F.cross_entropy(model(images), targets)
    run.limit_val_batches = 1.0
    assert run.validate(model, datamodule=data, verbose=False)[0]["val/loss"] == pytest.approx(float(wanted), rel=1e-5)


def test_images_of_other_channels_are_one_line(tmp_path):
    with pytest.raises(SettingError, match=r"takes images of 3 channels and these have 1: set backbone"):
        fit(tmp_path, backbone=partial(SmallCNN, in_channels=3))
