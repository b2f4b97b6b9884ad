"""An interrupted and resumed run ends bit-identically to an uninterrupted one."""

import gc
import os
import resource
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau, StepLR
from torch.utils._pytree import keystr, tree_flatten_with_path

import lightning_modules.backward_passes
from datamodules import DigitsLTDataModule
from imbsam import ImbSAM, SettingError
from imbsam.capture.graphs import DirectCalls
from lightning_modules import LongTailedClassifier
from lightning_modules.backbones import SmallCNN
from lightning_modules.callbacks.schedules import DeferredReweighting, RhoSchedule
from lightning_modules.resuming.checkpoint_files import (
    LAST,
    PREVIOUS,
    AtomicCheckpointIO,
    check_checkpoint,
    newest_checkpoint,
)
from lightning_modules.resuming.csv_logger import ResumableCSVLogger
from lightning_modules.resuming.resumable_checkpoint import ResumableCheckpoint
from lightning_modules.resuming.signals import STOP_SIGNALS, Interrupted

pytestmark = pytest.mark.filterwarnings("ignore")


class Stop(Callback):
    """Do something after a batch of an epoch."""

    def __init__(self, epoch: int, batch: int, action: Any) -> None:
        self.moment, self.action = (epoch, batch), action

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.moment:
            self.action()


class Watch(Callback):
    """The batches that were trained."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append((trainer.current_epoch, batch_idx))


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch):
    """Skip fsync: here processes die, not machines."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(autouse=True)
def _direct_calls(monkeypatch):
    """The stand-in for CUDA graphs, where `capture` is set."""
    monkeypatch.setattr(lightning_modules.backward_passes, "graphs_on", DirectCalls)


def killed():
    raise RuntimeError("killed")


def fit(
    folder: Path,
    resume: bool = False,
    callbacks: tuple[Callback, ...] = (),
    every_seconds: float = 0,
    data: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    schedules: Callable[[], list[Callback]] = list,
    **settings: Any,
) -> Trainer:
    seed_everything(3, workers=True)
    module = LongTailedClassifier(
        **{
            "backbone": partial(SmallCNN, width=4, dropout=0.3, norm="batch"),
            "many": 50,
            "few": 10,
            "sam": partial(ImbSAM, rho=0.5),
            "optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
            "lr_scheduler": lambda o: StepLR(o, 1, 0.7),
            **(model or {}),
        }
    )
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 3,
        "log_every_n_steps": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": True,  # Lightning leaves our samplers alone
    }
    trainer = Trainer(
        **{**defaults, **settings},
        logger=ResumableCSVLogger(folder, version=0, resume=resume),
        callbacks=[*schedules(), *callbacks, ResumableCheckpoint(every_seconds=every_seconds)],
    )
    path = newest_checkpoint(folder) if resume else None
    datamodule = DigitsLTDataModule(**{"batch_size": 64, "val_share": 0.3, **(data or {})})
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=path)
    finally:
        gc.collect()  # ends the workers
    return trainer


def result(folder: Path) -> dict[str, Any]:
    """What must be equal: the last checkpoint except for paths, and the log."""
    checkpoint = torch.load(folder / "version_0/checkpoints" / LAST, weights_only=True)
    del checkpoint["callbacks"]
    values = {keystr(path): value for path, value in tree_flatten_with_path(checkpoint)[0]}
    return {**values, "metrics.csv": (folder / "version_0/metrics.csv").read_bytes()}


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert set(found) == set(wanted)
    different = [
        (name, found[name], wanted[name])
        for name in wanted
        if not (
            torch.equal(found[name], wanted[name])
            if isinstance(wanted[name], torch.Tensor)
            else found[name] == wanted[name]
        )
    ]
    assert different == []


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "plateau": {"model": {"lr_scheduler": lambda o: ReduceLROnPlateau(o, patience=0, threshold=0.5)}},
    "max_steps, cosine by step": {
        "max_epochs": -1,
        "max_steps": 11,
        "model": {"lr_scheduler": lambda o: CosineAnnealingLR(o, 11), "lr_interval": "step"},
    },
    "accumulate": {"model": {"accumulate_grad_batches": 3}, "data": {"batch_size": 32}},
    "validation mid-epoch": {"val_check_interval": 0.5},
    "no validation, momentum of Adam": {
        "data": {"val_share": 0.0},
        "model": {"optimizer": lambda p: torch.optim.AdamW(p, lr=0.01)},
    },
    "class weights and rho by the epoch": {
        "schedules": lambda: [
            DeferredReweighting(0.999, start_epoch=1),
            RhoSchedule(start_epoch=1, end=0.2, every_n_steps=2),
        ]
    },
    # the extra passes of a full batch, which is captured, are padded to more rows than those of the last, which is not
    "captured": {"model": {"capture": True, "sam": partial(ImbSAM, rho=0.5, context_rows=3)}},
    "captured, accumulate": {
        "model": {"capture": True, "sam": partial(ImbSAM, rho=0.5, context_rows=3), "accumulate_grad_batches": 2},
        "data": {"batch_size": 32},
    },
    "max_steps, validation mid-epoch": {"max_epochs": -1, "max_steps": 9, "val_check_interval": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_resumes_as_if_nothing_had_happened(tmp_path, case):
    """Killed in the middle of an epoch, after its last batch, after the first of the next."""
    settings = CASES[case]
    watch = Watch()
    whole = fit(tmp_path / "whole", every_seconds=1e9, callbacks=(watch,), **settings)
    wanted, last = result(tmp_path / "whole"), whole.num_training_batches - 1
    for epoch, batch in ((0, 2), (0, last), (1, 0)) if case == "plain" else ((0, last), (1, 2)):
        folder = tmp_path / f"{epoch}-{batch}"
        with pytest.raises(RuntimeError, match="killed"):
            fit(folder, callbacks=(Stop(epoch, batch, killed),), **settings)
        again = Watch()
        fit(folder, resume=True, callbacks=(again,), **settings)
        assert_same(result(folder), wanted)
        step = settings.get("model", {}).get("accumulate_grad_batches", 1)
        begin = watch.batches.index((epoch, batch - batch % step))
        assert again.batches == watch.batches[begin:]


def test_a_run_that_resumes_with_smaller_batches_captures_them(tmp_path, monkeypatch):
    seen = []
    run = DirectCalls.record
    monkeypatch.setattr(DirectCalls, "record", lambda self, passes: seen.append(passes._slots) or run(self, passes))
    model = {"capture": True}
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path, callbacks=(Stop(1, 0, killed),), model=model)
    sizes = {slot.size for slots in seen for slot in slots}
    seen.clear()
    fit(tmp_path, resume=True, model=model, data={"batch_size": 32})
    assert (sizes, {slot.size for slots in seen for slot in slots}) == ({64}, {32})


def test_with_workers_and_a_second_interruption(tmp_path):
    data = {"num_workers": 2}
    fit(tmp_path / "whole", every_seconds=1e9)
    for epoch, batch, resume in ((0, 1, False), (1, 2, True)):
        with pytest.raises(RuntimeError, match="killed"):
            fit(tmp_path / "killed", resume, (Stop(epoch, batch, killed),), data=data)
    fit(tmp_path / "killed", resume=True, data=data)
    found, wanted = result(tmp_path / "killed"), result(tmp_path / "whole")
    for values in (found, wanted):
        del values["['datamodule_hyper_parameters']['num_workers']"]
    assert_same(found, wanted)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_saves_after_the_batch_and_stops(tmp_path, monkeypatch, name):
    """Under SLURM's environment too, where Lightning would save inside the handler."""
    slurm = {"JOB_ID": 1, "NTASKS": 1, "JOB_NAME": "test", "PROCID": 0, "LOCALID": 0, "NODEID": 0}
    for variable, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{variable}", str(value))
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    stop = Stop(1, 1, lambda: os.kill(os.getpid(), signal.Signals[name]))
    with pytest.raises(Interrupted, match=f"^interrupted by {name} after epoch 1, batch 2; resume with"):
        fit(tmp_path / "stopped", callbacks=(stop,), every_seconds=1e9)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert not list(tmp_path.rglob("hpc_ckpt*"))
    fit(tmp_path / "stopped", resume=True)
    fit(tmp_path / "whole", every_seconds=1e9)
    assert_same(result(tmp_path / "stopped"), result(tmp_path / "whole"))


def test_how_often_it_saves(tmp_path, monkeypatch):
    written = []
    original = AtomicCheckpointIO.save_checkpoint

    def save(io, checkpoint, path, *args, **kw):
        if str(path).endswith("last.ckpt"):  # best.ckpt is written once the epoch was better
            written.append(path)
        return original(io, checkpoint, path, *args, **kw)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save)
    trainer = fit(tmp_path / "a", every_seconds=1e9)
    assert len(written) == 1  # the last epoch's
    assert not (tmp_path / "a/version_0/checkpoints" / PREVIOUS).exists()
    fit(tmp_path / "b")
    assert len(written) == 1 + 3 * trainer.num_training_batches + 1


def test_a_damaged_checkpoint_is_refused_and_the_previous_one_named(tmp_path):
    last, previous = tmp_path / LAST, tmp_path / PREVIOUS
    for value in range(2):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.full((1000,), value)}, last)
    check_checkpoint(last)
    assert torch.load(previous, weights_only=True)["weights"][0] == 0
    whole = last.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    for content, reason in ((whole[:-10], "cut off"), (whole[:100], "cut off"), (b"", "cut off"), (damaged, "damaged")):
        last.write_bytes(content)
        with pytest.raises(SettingError, match=rf"{LAST}: it is {reason}.*; the previous one is whole: .*{PREVIOUS}$"):
            check_checkpoint(last)
    previous.write_bytes(b"")
    with pytest.raises(SettingError, match=r"start over without --ckpt_path$"):
        check_checkpoint(last)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LAST, PREVIOUS]


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path):
    """A limit on file size for this process; the last write is in `close`, which has no file name."""
    last, limit = tmp_path / LAST, resource.getrlimit(resource.RLIMIT_FSIZE)
    AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(1000)}, last)
    before = last.read_bytes()
    for size in (1000, len(before) - 100):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        try:
            with pytest.raises(OSError, match=rf"File too large: '.*/{LAST}'$"):
                AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(1000)}, last)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {LAST: before}


def test_the_newest_run_with_a_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for run, name in (("version_2", PREVIOUS), ("version_10", LAST), ("version_10", PREVIOUS), ("version_x", LAST)):
        (tmp_path / run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (tmp_path / run / "checkpoints" / name).touch()
    (tmp_path / "version_11").mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "version_10/checkpoints" / LAST
    (tmp_path / "version_10/checkpoints" / LAST).unlink()
    assert newest_checkpoint(tmp_path) == tmp_path / "version_10/checkpoints" / PREVIOUS


def test_the_log_is_truncated_and_continued(tmp_path):
    logger = ResumableCSVLogger(tmp_path, version=0)
    logger.log_metrics({"a": 1.0}, step=0)
    assert logger.experiment.sync() == 1
    one = (tmp_path / "version_0/metrics.csv").read_bytes()
    logger.log_metrics({"b": 2.0}, step=1)
    logger.save()
    with (tmp_path / "version_0/metrics.csv").open("a") as file:
        file.write("3,")  # killed while writing
    again = ResumableCSVLogger(tmp_path, version=0, resume=True)
    assert again.experiment.rows == 2
    again.experiment.cut(1)
    assert (tmp_path / "version_0/metrics.csv").read_bytes() == one
    again.log_metrics({"b": 2.0}, step=1)
    again.save()
    assert (tmp_path / "version_0/metrics.csv").read_text().split() == ["a,b,step", "1.0,,0", ",2.0,1"]
    again.experiment.cut(0)
    assert not (tmp_path / "version_0/metrics.csv").exists()
    again.log_metrics({"b": 2.0}, step=1)
    again.save()
    assert ResumableCSVLogger(tmp_path, version=0).experiment.rows == 0  # as Lightning's: it deletes what is there
