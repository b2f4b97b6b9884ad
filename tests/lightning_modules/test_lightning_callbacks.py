"""Lightning's own callbacks and tuners on our modules, which optimize manually and learn their classes late."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EMAWeightAveraging,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from torch import Tensor

from datamodules import DigitsLTDataModule
from lightning_modules import LongTailedClassifier
from lightning_modules.interruption import ResumableCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore")


def classifier(**settings: Any) -> LongTailedClassifier:
    torch.manual_seed(0)
    return LongTailedClassifier(
        backbone="small_cnn",
        backbone_args={"width": 4, "norm": "batch"},
        optimizer=lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
        **settings,
    )


def fit(folder: Path, model: LongTailedClassifier, *callbacks: Callback, epochs: int = 3, **settings: Any) -> Trainer:
    checkpointing = any(isinstance(callback, ResumableCheckpoint) for callback in callbacks)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=checkpointing,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        default_root_dir=folder,
    )
    torch.manual_seed(0)  # the network is built in there
    trainer.fit(model, datamodule=DigitsLTDataModule(batch_size=32), **settings)
    return trainer


def weights(model: LongTailedClassifier) -> list[Tensor]:
    return [p.detach().clone() for p in model.backbone.parameters()]


class Record(Callback):
    """The weights after every batch, and at the end of every epoch."""

    def __init__(self) -> None:
        self.batches: list[list[Tensor]] = []
        self.epochs: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.batches.append(weights(pl_module))

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(weights(pl_module))


def test_ema_averages_and_is_what_the_checkpoint_holds(tmp_path):
    model, record, average = classifier(), Record(), EMAWeightAveraging(decay=0.9, use_buffers=False)
    fit(tmp_path, model, average, record, ResumableCheckpoint(dirpath=tmp_path))
    expected = record.batches[0]
    for step in record.batches[1:]:
        expected = [0.9 * e + 0.1 * w for e, w in zip(expected, step, strict=True)]
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    for (name, found), wanted in zip(model.backbone.named_parameters(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)  # the last act of the callback
        torch.testing.assert_close(saved[f"backbone.{name}"], wanted, rtol=1e-4, atol=1e-6)


class Crash(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise RuntimeError("power cut")


def test_ema_resumes_after_a_crash(tmp_path):
    def keep() -> ResumableCheckpoint:
        return ResumableCheckpoint(dirpath=tmp_path, every_seconds=0)  # before every batch

    whole, crashed, rest = classifier(), classifier(), classifier()
    fit(tmp_path / "whole", whole, EMAWeightAveraging(decay=0.9))
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, crashed, EMAWeightAveraging(decay=0.9), Crash(), keep())
    fit(tmp_path, rest, EMAWeightAveraging(decay=0.9), keep(), ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    for found, wanted in zip(weights(rest), weights(whole), strict=True):
        assert torch.equal(found, wanted)


def test_backbone_finetuning_freezes_until_its_epoch(tmp_path):
    model, record = classifier(), Record()
    fit(tmp_path, model, BackboneFinetuning(unfreeze_backbone_at_epoch=1), record)
    convolution = [epoch[0] for epoch in record.epochs]
    assert torch.equal(record.batches[0][0], convolution[0])
    assert not torch.equal(convolution[0], convolution[2])


def test_pruning(tmp_path):
    model = classifier()
    fit(tmp_path, model, ModelPruning("l1_unstructured", amount=0.5, use_lottery_ticket_hypothesis=False))
    zeros = sum(int((p == 0).sum()) for p in model.backbone.parameters())
    assert zeros > 0.5 * sum(p.numel() for p in model.backbone.parameters())


def test_batch_size_finder(tmp_path):
    model = classifier()
    trainer = fit(tmp_path, model, BatchSizeFinder(steps_per_trial=1, max_trials=2, init_val=2))
    assert trainer.datamodule.batch_size == 4
    assert trainer.state.finished


def test_learning_rate_finder(tmp_path):
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    data = DigitsLTDataModule(batch_size=32)
    finder = Tuner(trainer).lr_find(classifier(), datamodule=data, num_training=15, update_attr=False)
    assert len(finder.results["loss"]) == 15
    assert all(loss > 0 for loss in finder.results["loss"])


def test_stochastic_weight_averaging_with_batch_norm_keeps_the_average(tmp_path):
    model, record = classifier(), Record()
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1)
    fit(tmp_path, model, swa, record, epochs=4)
    # Lightning averages at the start of the epochs 1, 2 and 3, and adds one epoch for BatchNorm's statistics
    average = [torch.stack(parts).mean(0) for parts in zip(*record.epochs[:3], strict=True)]
    assert len(record.epochs) == 5
    for found, wanted in zip(weights(model), average, strict=True):
        torch.testing.assert_close(found, wanted)
    statistics = copy.deepcopy(model.backbone.state_dict())
    assert any(name.endswith("running_mean") and value.abs().sum() > 0 for name, value in statistics.items())
