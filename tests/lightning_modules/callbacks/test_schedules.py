"""What changes with the epoch: class weights (deferred re-weighting) and rho."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from datamodules import DigitsLTDataModule
from imbsam import SSESAM, ImbSAM, Plain, SettingError
from imbsam.class_weights import effective_number_weights
from imbsam.losses import LDAM, CrossEntropy, Focal, LogitAdjusted, VectorScaling
from lightning_modules import LongTailedClassifier
from lightning_modules.backbones import CosineClassifier, SmallCNN
from lightning_modules.callbacks.schedules import DeferredReweighting, RhoSchedule, TailStage
from lightning_modules.resuming.csv_logger import ResumableCSVLogger

pytestmark = pytest.mark.filterwarnings("ignore")


class Engine(Callback):
    """The settings of the engine at every step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float, torch.Tensor | None]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append((trainer.current_epoch, pl_module.sam.rho, pl_module.sam.class_weight))


class Radii(Callback):
    """The length of both of SSE-SAM's perturbations at every step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, list[float]]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append((trainer.current_epoch, (pl_module.sam.rho * pl_module.sam.radius).tolist()))


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
            "backbone": partial(SmallCNN, width=4),
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
        tmp_path, (DeferredReweighting(0.999, start_epoch=2), engine), sam=partial(Plain, tail_weight=2.0), loss=LDAM
    )
    counts = run.datamodule.class_counts
    tail = torch.where(counts < 20, 2.0, 1.0).double()
    assert [epoch for epoch, _, _ in engine.seen] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    for epoch, _, weight in engine.seen:
        wanted = tail * effective_number_weights(counts, 0.999) if epoch >= 2 else tail
        torch.testing.assert_close(weight, wanted, rtol=0, atol=0)


def test_without_them_the_engine_keeps_its_weights(tmp_path):
    engine = Engine()
    fit(tmp_path, (engine,), sam=Plain, trainer={"max_steps": 1})
    assert [weight for _, _, weight in engine.seen] == [None]


def test_the_logged_loss_is_the_weighted_one(tmp_path):
    losses = []
    for callbacks in ((), (DeferredReweighting(0.999),)):
        _, run = fit(tmp_path, callbacks, sam=Plain, trainer={"max_steps": 1})
        losses.append(float(run.callback_metrics["train/loss_step"]))
    assert losses[0] != losses[1]


@pytest.mark.parametrize("steps", [4, 8])  # mid-epoch 1, mid-epoch 2, the first with the weights
def test_a_resumed_run_switches_at_the_same_step(tmp_path, steps):
    """See test_resume.py for checkpoints at the end of an epoch."""

    def schedules():
        return DeferredReweighting(0.999, start_epoch=2), RhoSchedule(1, end=0.0, shape="cosine", every_n_steps=2)

    sam = partial(ImbSAM, rho=0.5)
    whole, rest = Engine(), Engine()
    uninterrupted, _ = fit(tmp_path / "whole", (*schedules(), whole), sam=sam)
    with pytest.raises(RuntimeError, match="stopped"):
        fit(tmp_path / "cut", (*schedules(), StopAfter(steps, tmp_path / "cut.ckpt")), sam=sam)
    resumed, _ = fit(tmp_path / "cut", (*schedules(), rest), resume=tmp_path / "cut.ckpt", sam=sam)
    assert len(rest.seen) == 12 - steps
    for (epoch, rho, weight), (epoch_, rho_, weight_) in zip(rest.seen, whole.seen[steps:], strict=True):
        assert (epoch, rho) == (epoch_, rho_)
        assert weight is weight_ is None or torch.equal(weight, weight_)
    for found, wanted in zip(resumed.parameters(), uninterrupted.parameters(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"end": 0.0}, [0.6, 0.4, 0.2, 0.0]),
        ({"end": 0.9}, [0.6, 0.7, 0.8, 0.9]),
        ({"shape": "cosine", "end": 0.0}, [0.3 + 0.3 * math.cos(math.pi * i / 3) for i in range(4)]),
        ({"start_epoch": 1, "end": 0.2}, [0.0, 0.6, 0.4, 0.2]),
        ({"start_epoch": 2}, [0.0, 0.0, 0.6, 0.6]),
        ({"shape": "cosine", "start_epoch": 3, "end": 0.2}, [0.0, 0.0, 0.0, 0.6]),
        (None, [0.6] * 4),
    ],
)
def test_rho_goes_by_the_epoch(tmp_path, settings, expected):
    engine = Engine()
    callbacks = (engine,) if settings is None else (RhoSchedule(**settings), engine)
    fit(tmp_path, callbacks, sam=partial(ImbSAM, rho=0.6), trainer={"limit_train_batches": 1})
    assert [rho for _, rho, _ in engine.seen] == pytest.approx(expected, abs=1e-12)
    header, *rows = (tmp_path / "version_0/metrics.csv").read_text().splitlines()
    if settings is None:
        assert "rho" not in header.split(",")
    else:
        column = header.split(",").index("rho")
        logged = [float(row.split(",")[column]) for row in rows if row.split(",")[column]]
        assert logged == pytest.approx(expected, abs=1e-6)


def test_only_every_third_step_is_perturbed(tmp_path):
    engine = Engine()
    schedule = RhoSchedule(start_epoch=1, every_n_steps=3)
    fit(tmp_path, (schedule, engine), sam=partial(ImbSAM, rho=0.6), data=DigitsLTDataModule(batch_size=48))
    steps = len(engine.seen) // 4
    assert steps % 3 != 0
    assert [rho for _, rho, _ in engine.seen] == [
        0.6 if step >= steps and step % 3 == 0 else 0.0 for step in range(4 * steps)
    ]


class Forwards(Callback):
    """Counts the forward passes of every step."""

    def __init__(self) -> None:
        self.of_step: list[int] = []
        self.passes = 0

    def count(self, module, inputs, output):
        self.passes += module.training

    def on_fit_start(self, trainer, pl_module):
        pl_module.backbone.register_forward_hook(self.count)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.of_step.append(self.passes)
        self.passes = 0


@pytest.mark.parametrize("first_pass", ["whole", "split"])
def test_a_step_without_a_perturbation_is_a_plain_one(tmp_path, first_pass):
    """In cost, one pass, and to the last bit of the weights."""
    forwards, plain = Forwards(), Forwards()
    sam = partial(ImbSAM, rho=0.6, first_pass=first_pass)
    schedule = RhoSchedule(start_epoch=2, every_n_steps=2)
    fit(tmp_path / "schedule", (schedule, forwards), sam=sam)
    assert forwards.of_step == [1] * 6 + [3, 1] * 3
    late, _ = fit(tmp_path / "late", (RhoSchedule(start_epoch=4),), sam=sam)
    never, _ = fit(tmp_path / "plain", (plain,), sam=Plain)
    assert plain.of_step == [1] * 12
    assert all(torch.equal(p, q) for p, q in zip(late.parameters(), never.parameters(), strict=True))


@pytest.mark.parametrize("cut", [None, 4, 8])  # mid-epoch in the first stage, and in the second
def test_sse_sam_perturbs_the_tail_alone_from_its_epoch_on(tmp_path, cut):
    sam, radii = partial(SSESAM, rho=0.5, head_rho=0.2), Radii()
    if cut is None:
        fit(tmp_path, (TailStage(0.5), radii), sam=sam)
    else:
        whole, _ = fit(tmp_path / "whole", (TailStage(0.5),), sam=sam)
        with pytest.raises(RuntimeError, match="stopped"):
            fit(tmp_path / "cut", (TailStage(0.5), StopAfter(cut, tmp_path / "cut.ckpt")), sam=sam)
        resumed, _ = fit(tmp_path / "cut", (TailStage(0.5), radii), resume=tmp_path / "cut.ckpt", sam=sam)
        assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))
    wanted = [(epoch, [0.2, 0.5] if epoch < 2 else [0.0, 0.5]) for epoch in range(4) for _ in range(3)]
    assert radii.seen == wanted[cut or 0 :]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: TailStage(1.1), r"start is 1.1: give a number in \[0, 1\]"),
        (lambda: DeferredReweighting(1.0), r"beta is 1.0: give a number in \[0, 1\)"),
        (lambda: DeferredReweighting(0.9, start_epoch=-1), "start_epoch is -1"),
        (lambda: RhoSchedule(start_epoch=-1), "start_epoch is -1"),
        (lambda: RhoSchedule(shape="step"), "shape is 'step'"),
        (lambda: RhoSchedule(end=-1.0), "end is -1.0"),
        (lambda: RhoSchedule(every_n_steps=0), "every_n_steps is 0"),
    ],
)
def test_schedules_that_cannot_work(settings, message):
    with pytest.raises(SettingError, match=message):
        settings()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"callbacks": (RhoSchedule(end=0.1),), "trainer": {"max_epochs": -1, "max_steps": 3}},
            "trainer.max_epochs -1",
        ),
        ({"callbacks": (TailStage(),)}, "TailStage is the second stage of SSESAM and model.sam is ImbSAM"),
        (
            {"callbacks": (TailStage(),), "sam": SSESAM, "trainer": {"max_epochs": -1, "max_steps": 3}},
            "TailStage's start is 0.7 and trainer.max_epochs -1",
        ),
        ({"loss": partial(Focal, gamma=-1)}, "gamma is -1"),
        ({"loss": partial(Focal, tau=1)}, "loss is Focal: .*tau"),
    ],
)
def test_settings_that_cannot_work(tmp_path, settings, message):
    with pytest.raises(SettingError, match=message):
        fit(tmp_path, **settings)


def test_weights_that_never_come_warn(tmp_path):
    with pytest.warns(UserWarning, match="start_epoch is 9 and the run has 1 epochs"):
        fit(tmp_path, (DeferredReweighting(0.9, 9),), trainer={"max_epochs": 1, "limit_train_batches": 1})


class Mixup(DigitsLTDataModule):
    """Training targets of two classes each."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, targets = batch
        if not self.trainer.training:
            return batch
        one_hot = torch.nn.functional.one_hot(targets, 10).float()
        return 0.7 * images + 0.3 * images.flip(0), 0.7 * one_hot + 0.3 * one_hot.flip(0)


@pytest.mark.parametrize("data", [DigitsLTDataModule, Mixup])
@pytest.mark.parametrize(
    "loss",
    [CrossEntropy, Focal, LDAM, LogitAdjusted, VectorScaling, partial(torch.nn.CrossEntropyLoss, reduction="none")],
)
def test_every_loss_trains(tmp_path, loss, data):
    callbacks = (DeferredReweighting(0.999),)
    model, run = fit(tmp_path, callbacks, loss=loss, data=data(batch_size=128), trainer={"max_epochs": 1})
    assert type(model.loss) is getattr(loss, "func", loss)
    assert 0 < float(run.callback_metrics["train/loss_epoch"]) < math.inf


def test_ldam_without_a_cosine_head_warns(tmp_path):
    with pytest.warns(UserWarning, match="loss is LDAM and the head is not a cosine one"):
        fit(tmp_path, loss=LDAM, trainer={"max_steps": 1})


def test_ldam_with_another_scale_than_its_head_warns(tmp_path):
    settings = {"loss": LDAM, "head": partial(CosineClassifier, scale=16)}
    with pytest.warns(UserWarning, match=r"LDAM's scale is 30 and the cosine head's 16"):
        fit(tmp_path, **settings, trainer={"max_steps": 1})
