"""What changes with the epoch: class weights (deferred re-weighting) and rho."""

import math
from typing import Any, get_args, get_type_hints

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from datamodules import DigitsLTDataModule
from imbsam import SettingError
from imbsam.class_weights import effective_number_weights
from lightning_modules import LongTailedClassifier
from lightning_modules.classifier import LOSSES
from lightning_modules.csv_logger import ResumableCSVLogger

pytestmark = pytest.mark.filterwarnings("ignore")


class Engine(Callback):
    """The settings of the engine at every step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float, torch.Tensor | None]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append((trainer.current_epoch, pl_module.sam.rho, pl_module.sam.class_weight))


class StopAfter(Callback):
    """Save a checkpoint after a number of steps and end."""

    def __init__(self, steps: int, path: Any) -> None:
        self.steps, self.path = steps, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path)
            raise RuntimeError("stopped")


def fit(
    folder: Any,
    callbacks: tuple[Callback, ...] = (),
    resume: Any = None,
    trainer: dict[str, Any] | None = None,
    data: DigitsLTDataModule | None = None,
    **model: Any,
):
    seed_everything(0, workers=True)
    module = LongTailedClassifier(
        **{
            "backbone": "small_cnn",
            "backbone_args": {"width": 4},
            "optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
            "many": 50,
            "few": 10,
            **model,
        }
    )
    run = Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 4,
            "logger": ResumableCSVLogger(folder, version=0, resume=False),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "log_every_n_steps": 1,
            "use_distributed_sampler": False,
            **(trainer or {}),
        },
        callbacks=[*callbacks],
    )
    run.fit(module, datamodule=data or DigitsLTDataModule(batch_size=128), ckpt_path=resume)  # 3 batches an epoch
    return module, run


def test_deferred_weights_are_switched_at_their_epoch(tmp_path):
    engine = Engine()
    _, run = fit(
        tmp_path, (engine,), method="sgd", loss="ldam", tail_weight=2.0, class_balanced_beta=0.999, drw_start_epoch=2
    )
    counts = run.datamodule.class_counts
    tail = torch.where(counts < 20, 2.0, 1.0).double()
    assert [epoch for epoch, _, _ in engine.seen] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    for epoch, _, weight in engine.seen:
        wanted = tail * effective_number_weights(counts, 0.999) if epoch >= 2 else tail
        torch.testing.assert_close(weight, wanted, rtol=0, atol=0)


def test_without_them_the_engine_keeps_its_weights(tmp_path):
    engine = Engine()
    fit(tmp_path, (engine,), method="sgd", trainer={"max_steps": 1})
    assert [weight for _, _, weight in engine.seen] == [None]


def test_the_logged_loss_is_the_weighted_one(tmp_path):
    losses = []
    for beta in (None, 0.999):
        _, run = fit(tmp_path, method="sgd", class_balanced_beta=beta, trainer={"max_steps": 1})
        losses.append(float(run.callback_metrics["train/loss_step"]))
    assert losses[0] != losses[1]


@pytest.mark.parametrize("steps", [4, 8])  # amid epoch 1, amid epoch 2, the first with the weights
def test_a_resumed_run_switches_at_the_same_step(tmp_path, steps):
    """See test_resume.py for checkpoints at the end of an epoch."""
    settings = {
        "rho": 0.5,
        "class_balanced_beta": 0.999,
        "drw_start_epoch": 2,
        "rho_schedule": "cosine",
        "start_epoch": 1,
    }
    whole, rest = Engine(), Engine()
    uninterrupted, _ = fit(tmp_path / "whole", (whole,), **settings)
    with pytest.raises(RuntimeError, match="stopped"):
        fit(tmp_path / "cut", (StopAfter(steps, tmp_path / "cut.ckpt"),), **settings)
    resumed, _ = fit(tmp_path / "cut", (rest,), resume=tmp_path / "cut.ckpt", **settings)
    assert len(rest.seen) == 12 - steps
    for (epoch, rho, weight), (epoch_, rho_, weight_) in zip(rest.seen, whole.seen[steps:], strict=True):
        assert (epoch, rho) == (epoch_, rho_)
        assert torch.equal(weight, weight_)
    for found, wanted in zip(resumed.parameters(), uninterrupted.parameters(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rho_schedule": "linear"}, [0.6, 0.4, 0.2, 0.0]),
        ({"rho_schedule": "linear", "rho_end": 0.9}, [0.6, 0.7, 0.8, 0.9]),
        ({"rho_schedule": "cosine"}, [0.3 + 0.3 * math.cos(math.pi * i / 3) for i in range(4)]),
        ({"rho_schedule": "linear", "start_epoch": 1, "rho_end": 0.2}, [0.0, 0.6, 0.4, 0.2]),
        ({"rho_schedule": "cosine", "start_epoch": 3, "rho_end": 0.2}, [0.0, 0.0, 0.0, 0.6]),
        ({"rho_schedule": "linear", "method": "sgd", "rho_end": 0.2}, [0.0] * 4),
        ({}, [0.6] * 4),
    ],
)
def test_rho_goes_by_the_epoch(tmp_path, settings, expected):
    engine = Engine()
    fit(tmp_path, (engine,), rho=0.6, trainer={"limit_train_batches": 1}, **settings)
    assert [rho for _, rho, _ in engine.seen] == pytest.approx(expected, abs=1e-12)
    header, *rows = (tmp_path / "version_0/metrics.csv").read_text().splitlines()
    if not settings:
        assert "rho" not in header.split(",")
    else:
        column = header.split(",").index("rho")
        logged = [float(row.split(",")[column]) for row in rows if row.split(",")[column]]
        assert logged == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "hinge"}, "loss is 'hinge': choose one of cross_entropy, focal"),
        ({"class_balanced_beta": 1.0}, r"class_balanced_beta=1.0 is outside \[0, 1\)"),
        ({"class_balanced_beta": 1.0, "drw_start_epoch": 3}, r"class_balanced_beta=1.0 is outside \[0, 1\)"),
        ({"drw_start_epoch": 3}, "drw_start_epoch is 3 and there are no weights"),
        ({"drw_start_epoch": -1, "class_balanced_beta": 0.9}, "drw_start_epoch is -1"),
        ({"rho_schedule": "step"}, "rho_schedule is 'step'"),
        ({"rho_schedule": "linear", "rho_end": -1.0}, "rho_end is -1.0"),
        ({"rho_end": 0.1}, "rho_end is 0.1 and rho_schedule constant"),
        ({"rho_schedule": "linear", "trainer": {"max_epochs": -1, "max_steps": 3}}, "trainer.max_epochs -1"),
        ({"loss": "focal", "loss_args": {"gamma": -1}}, "gamma=-1"),
        ({"loss": "focal", "loss_args": {"tau": 1}}, "loss_args is {'tau': 1}"),
    ],
)
def test_settings_that_cannot_work(tmp_path, settings, message):
    with pytest.raises(SettingError, match=message):
        fit(tmp_path, **settings)


def test_weights_that_never_come_warn(tmp_path):
    with pytest.warns(UserWarning, match="drw_start_epoch is 9 and the run has 1 epochs"):
        fit(tmp_path, class_balanced_beta=0.9, drw_start_epoch=9, trainer={"max_epochs": 1, "limit_train_batches": 1})


class Mixup(DigitsLTDataModule):
    """Training targets of two classes each."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, targets = batch
        if not self.trainer.training:
            return batch
        one_hot = torch.nn.functional.one_hot(targets, 10).float()
        return 0.7 * images + 0.3 * images.flip(0), 0.7 * one_hot + 0.3 * one_hot.flip(0)


@pytest.mark.parametrize("data", [DigitsLTDataModule, Mixup])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(tmp_path, loss, data):
    model, run = fit(
        tmp_path, loss=loss, class_balanced_beta=0.999, data=data(batch_size=128), trainer={"max_epochs": 1}
    )
    assert type(model.loss) is LOSSES[loss][0]
    assert 0 < float(run.callback_metrics["train/loss_epoch"]) < math.inf


def test_the_command_line_offers_every_loss():
    assert list(get_args(get_type_hints(LongTailedClassifier.__init__)["loss"])) == list(LOSSES)


def test_ldam_without_a_cosine_head_warns(tmp_path):
    with pytest.warns(UserWarning, match="loss is ldam and the head is not a cosine one"):
        fit(tmp_path, loss="ldam", trainer={"max_steps": 1})


def test_ldam_with_another_scale_than_its_head_warns(tmp_path):
    settings = {"loss": "ldam", "head": "cosine", "head_args": {"scale": 16}}
    with pytest.warns(UserWarning, match=r"ldam's scale is 30 and the cosine head's 16"):
        fit(tmp_path, **settings, trainer={"max_steps": 1})
