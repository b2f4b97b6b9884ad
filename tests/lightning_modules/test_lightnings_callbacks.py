"""Lightning's own callbacks and its tuner, as a user adds them."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EMAWeightAveraging,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.tuner import Tuner

from datamodules import DigitsLTDataModule
from imbsam import ImbSAM
from lightning_modules import LongTailedClassifier
from lightning_modules.backbones import SmallCNN
from lightning_modules.callbacks.plain_weights import PlainWeights
from lightning_modules.resuming.resumable_checkpoint import ResumableCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore")


def model(norm="batch", **settings):
    seed_everything(0)
    return LongTailedClassifier(
        backbone=partial(SmallCNN, width=4, norm=norm),
        sam=partial(ImbSAM, rho=0.1),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        **settings,
    )


def trainer(tmp_path, *callbacks, **settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    defaults = {"accelerator": "cpu", "max_epochs": 2, "default_root_dir": tmp_path, "limit_test_batches": 1}
    return Trainer(**{**defaults, **quiet, **settings}, callbacks=[*callbacks])


@pytest.mark.parametrize(
    "average",
    [partial(EMAWeightAveraging, decay=0.5), WeightAveraging, partial(WeightAveraging, use_buffers=False)],
    ids=["ema", "mean", "mean, without buffers"],
)
def test_averaged_weights_are_those_of_the_steps(tmp_path, average):
    steps = []

    class Watch(LongTailedClassifier):
        def on_train_batch_end(self, *args):
            steps.append([p.detach().clone() for p in self.backbone.parameters()])

    seed_everything(0)
    module = Watch(backbone=partial(SmallCNN, width=4), optimizer=partial(torch.optim.SGD, lr=0.1))
    run = trainer(tmp_path, average(), max_epochs=1, limit_train_batches=4)
    run.fit(module, datamodule=DigitsLTDataModule(batch_size=128))
    if any(isinstance(callback, EMAWeightAveraging) for callback in run.callbacks):
        wanted = steps[0]
        for step in steps[1:]:
            wanted = [0.5 * a + 0.5 * b for a, b in zip(wanted, step, strict=True)]
    else:
        wanted = [torch.stack(values).mean(dim=0) for values in zip(*steps, strict=True)]
    for found, expected in zip(module.backbone.parameters(), wanted, strict=True):
        torch.testing.assert_close(found.detach(), expected)


def test_backbone_finetuning_freezes_and_unfreezes(tmp_path):
    frozen = []

    class Watch(LongTailedClassifier):
        def on_train_epoch_start(self):
            super().on_train_epoch_start()
            frozen.append(all(not p.requires_grad for p in self.backbone.features.parameters()))

    class Features(BackboneFinetuning):
        """Freeze the features alone: the classifier is part of the backbone here."""

        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.backbone.features)

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == self.unfreeze_backbone_at_epoch:
                self.unfreeze_and_add_param_group(pl_module.backbone.features, optimizer, lr=0.01)

    seed_everything(0)

    def optimizer(params):
        return torch.optim.SGD([p for p in params if p.requires_grad], lr=0.1)

    module = Watch(backbone=partial(SmallCNN, width=4, norm="group"), optimizer=optimizer)
    run = trainer(tmp_path, Features(unfreeze_backbone_at_epoch=1))
    run.fit(module, datamodule=DigitsLTDataModule(batch_size=128))
    assert frozen == [True, False]


def test_pruning_leaves_zeros(tmp_path):
    module = model(norm="group")
    run = trainer(tmp_path, ModelPruning("l1_unstructured", amount=0.5, use_lottery_ticket_hypothesis=False))
    run.fit(module, datamodule=DigitsLTDataModule(batch_size=128))
    weights = torch.cat([p.detach().flatten() for n, p in module.backbone.named_parameters() if "weight" in n])
    assert (weights == 0).float().mean() > 0.4


def test_batch_size_and_learning_rate_are_found(tmp_path):
    data = DigitsLTDataModule(batch_size=8)
    run = trainer(tmp_path, BatchSizeFinder(steps_per_trial=1, max_trials=2), max_epochs=1, limit_train_batches=2)
    run.fit(model(), datamodule=data)
    assert data.batch_size == 4
    run = trainer(tmp_path, max_epochs=4)
    module = model()
    finder = Tuner(run).lr_find(module, datamodule=DigitsLTDataModule(batch_size=64), num_training=20)
    assert len(finder.results["loss"]) > 10
    assert len(set(finder.results["loss"])) > 5
    assert module.lr == finder.suggestion()


def test_stochastic_weight_averaging_ends_with_the_average_and_its_statistics(tmp_path):
    starts = []

    class Watch(LongTailedClassifier):
        def on_train_epoch_start(self):
            super().on_train_epoch_start()
            starts.append([p.detach().clone() for p in self.backbone.parameters()])

    seed_everything(0)
    module = Watch(
        backbone=partial(SmallCNN, width=4, norm="batch"),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    )
    average = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)  # Lightning counts it from 1
    run = trainer(tmp_path, average, max_epochs=4)
    run.fit(module, datamodule=DigitsLTDataModule(batch_size=128))
    assert len(starts) == 5  # the last epoch is for BatchNorm's statistics alone
    for found, expected in zip(module.backbone.parameters(), zip(*starts[1:4], strict=True), strict=True):
        torch.testing.assert_close(found.detach(), torch.stack(expected).mean(dim=0))
    norm = next(m for m in module.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert norm.num_batches_tracked == 3  # as the callback counts them anew
    assert torch.isfinite(run.callback_metrics["train/loss_epoch"])


class Crash(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise RuntimeError("power cut")


def test_averaged_weights_are_in_the_checkpoint_and_resume_after_a_crash(tmp_path):
    def fit(folder, module, *callbacks, **settings):
        seed_everything(0)
        keep = ResumableCheckpoint(dirpath=folder, every_seconds=0)  # before every batch
        run = trainer(folder, EMAWeightAveraging(decay=0.9), *callbacks, keep, max_epochs=3)
        run.fit(module, datamodule=DigitsLTDataModule(batch_size=64), **settings)

    whole, rest = model(), model()
    fit(tmp_path / "whole", whole)
    saved = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=False)["state_dict"]
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, model(), Crash())
    fit(tmp_path, rest, ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    for name, wanted in whole.backbone.named_parameters():
        assert torch.equal(rest.backbone.get_parameter(name), wanted)
        assert torch.equal(saved[f"backbone.{name}"], wanted)


@pytest.mark.parametrize("first", [True, False], ids=["plain weights first", "average first"])
def test_plain_weights_are_tested_and_resumed_beside_their_average(tmp_path, first):
    """The plain weights are those of a training that averages nothing."""

    def fit(name, average, epochs, **settings):
        seed_everything(0)
        callbacks = [PlainWeights(), EMAWeightAveraging(decay=0.99)] if average else []
        keep = ResumableCheckpoint(dirpath=tmp_path / name)
        run = trainer(tmp_path / name, *(callbacks if first else callbacks[::-1]), keep, max_epochs=epochs)
        module = model()
        run.fit(module, datamodule=DigitsLTDataModule(), **settings)
        return module, run.test(module, datamodule=DigitsLTDataModule(), verbose=False)[0]

    _, wanted = fit("alone", False, 3)
    _, found = fit("average", True, 3)
    assert not any("plain" in name for name in wanted)
    names = [name for name in wanted if name.startswith("test/") and name != "test/loss"]
    assert len(names) == 12
    assert [found[name.replace("test/", "test/plain_")] for name in names] == [wanted[name] for name in names]
    assert found["test/all"] != found["test/plain_all"]

    run, path = trainer(tmp_path, PlainWeights()), tmp_path / "average/last.ckpt"
    (again,) = run.test(model(), datamodule=DigitsLTDataModule(), ckpt_path=path, verbose=False, weights_only=False)
    assert again == found

    whole, _ = fit("whole", True, 5)
    (tmp_path / "more").mkdir()
    more, _ = fit("more", True, 5, ckpt_path=path, weights_only=False)
    for name, value in whole.backbone.named_parameters():
        assert torch.equal(more.backbone.get_parameter(name), value), name
