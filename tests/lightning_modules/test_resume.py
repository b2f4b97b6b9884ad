"""A run that was interrupted and goes on ends bit-identically to one that was not."""

import gc
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau, StepLR
from torch.utils._pytree import tree_flatten_with_path, keystr

from datamodules import DigitsLTDataModule
from imbsam import SettingError
from lightning_modules import LongTailedClassifier
from lightning_modules.checkpoint import LAST, PREVIOUS, AtomicCheckpointIO, check_checkpoint, newest_checkpoint
from lightning_modules.csv_logger import ResumableCSVLogger
from lightning_modules.interruption import Interrupted, ResumableCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore")


class Stop(Callback):
    """Do something after a batch of an epoch."""

    def __init__(self, epoch: int, batch: int, action: Any) -> None:
        self.moment, self.action = (epoch, batch), action

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.moment:
            self.action()


def killed():
    raise RuntimeError("killed")


def fit(
    folder: Path,
    resume: bool = False,
    callbacks: tuple[Callback, ...] = (),
    every_seconds: float = 0,
    data: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **settings: Any,
) -> Trainer:
    seed_everything(3, workers=True)
    module = LongTailedClassifier(
        **{
            "backbone": "small_cnn",
            "backbone_args": {"width": 4, "dropout": 0.3, "norm": "batch"},
            "many": 50,
            "few": 10,
            "rho": 0.5,
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
        callbacks=[*callbacks, ResumableCheckpoint(every_seconds=every_seconds)],
    )
    path = newest_checkpoint(folder) if resume else None
    datamodule = DigitsLTDataModule(**{"batch_size": 64, "val_share": 0.3, **(data or {})})
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=path)
    finally:
        gc.collect()  # ends the workers
    return trainer


def result(folder: Path) -> dict[str, Any]:
    """What must be equal: the last checkpoint but for paths, and the log."""
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
    "by step, by plateau": {
        "model": {"lr_scheduler": lambda o: ReduceLROnPlateau(o, patience=0, threshold=0.5), "start_epoch": 2}
    },
    "max_steps, cosine by step": {
        "max_epochs": -1,
        "max_steps": 11,
        "model": {"lr_scheduler": lambda o: CosineAnnealingLR(o, 11), "lr_interval": "step"},
    },
    "accumulate": {"model": {"accumulate_grad_batches": 3}, "data": {"batch_size": 32}},
    "validation amid the epoch": {"val_check_interval": 0.5},
    "no validation, momentum of Adam": {
        "data": {"val_share": 0.0},
        "model": {"optimizer": lambda p: torch.optim.AdamW(p, lr=0.01)},
    },
    "max_steps, validation amid the epoch": {"max_epochs": -1, "max_steps": 9, "val_check_interval": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_goes_on_as_if_nothing_had_happened(tmp_path, case):
    """Killed in the middle of an epoch, after its last batch but one, after its last, and after the first of the next."""
    settings = CASES[case]
    whole = fit(tmp_path / "whole", every_seconds=1e9, **settings)
    batches = whole.num_training_batches
    wanted = result(tmp_path / "whole")
    for epoch, batch in ((0, 2), (0, batches - 1), (1, 0), (1, 1), (1, batches - 2)):
        folder = tmp_path / f"{epoch}-{batch}"
        with pytest.raises(RuntimeError, match="killed"):
            fit(folder, callbacks=(Stop(epoch, batch, killed),), **settings)
        fit(folder, resume=True, **settings)
        assert_same(result(folder), wanted)
