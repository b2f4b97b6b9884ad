"""Early stopping: which weights a run ends with, and that stopping and resuming do not change them."""

import logging
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from datamodules import AnomalyDataModule
from imbsam import ImbSAM, SettingError
from lightning_modules import AnomalyDetector, RestoringEarlyStopping
from lightning_modules.resuming.resumable_checkpoint import ResumableCheckpoint


class Watch(Callback):
    """The weights and the validation loss after every epoch; or a crash in the middle of one."""

    def __init__(self, crash=None):
        self.weights, self.losses, self.crash = [], [], crash

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.crash:
            raise RuntimeError("killed")

    def on_validation_end(self, trainer, pl_module):
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if fitting and "val/loss" in trainer.callback_metrics:
            self.weights.append({name: value.clone() for name, value in pl_module.state_dict().items()})
            self.losses.append(float(trainer.callback_metrics["val/loss"]))


def fit(folder, patience=3, max_epochs=30, resume=False, crash=None, **data_settings):
    """Train DevNet on the digits, 2 batches an epoch, at a rate at which the validation loss soon rises."""
    seed_everything(3)
    watch = Watch(crash)
    stopping = RestoringEarlyStopping(patience=patience, passes_without_validation=3)
    trainer = Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[stopping, watch, ResumableCheckpoint(dirpath=folder, every_seconds=0)],
        log_every_n_steps=1,
        enable_model_summary=False,
    )
    settings = {"sampling": "balanced", "batch_size": 64, "batches_per_epoch": 2, "val_share": 0.3, **data_settings}
    data = AnomalyDataModule(**settings)
    optimizer = lambda params: torch.optim.Adam(params, lr=0.05)  # noqa: E731
    module = AnomalyDetector(sam=partial(ImbSAM, rho=0.05), optimizer=optimizer)
    trainer.fit(module, datamodule=data, ckpt_path=folder / "last.ckpt" if resume else None)
    return trainer, module, watch, stopping


def saved(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)


def equal(one, other, but=()):
    return all(torch.equal(one[name], other[name]) for name in one if name not in but)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that ran out of patience, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(folder)


def test_it_ends_with_the_weights_of_the_least_validation_loss(whole):
    folder, (trainer, module, watch, stopping) = whole
    best = min(range(len(watch.losses)), key=watch.losses.__getitem__)
    assert 0 < best == len(watch.losses) - 4 < 26, "patience 3, and not at once"
    assert (stopping.best_epoch, trainer.current_epoch) == (best + 1, best + 4)
    assert equal(module.state_dict(), watch.weights[best], but=["threshold"])
    assert not equal(module.state_dict(), watch.weights[-1], but=["threshold"])
    assert equal(saved(folder)["state_dict"], module.state_dict())
    assert trainer.validate(module, datamodule=trainer.datamodule, verbose=False)[0]["val/loss"] == watch.losses[best]
    module.threshold.fill_(0)
    module.choose_threshold()
    assert module.threshold == saved(folder)["state_dict"]["threshold"], "chosen for the best weights"


def test_killed_in_an_epoch_and_resumed_it_ends_bit_identically(whole, tmp_path):
    folder, (_, _, watch, stopping) = whole
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path, crash=(stopping.best_epoch + 1, 1))  # after the best epoch: its weights are in the checkpoint
    _, _, again, _ = fit(tmp_path, resume=True)
    assert again.losses == watch.losses[-len(again.losses) :]
    assert 0 < len(again.losses) < 3
    one, other = saved(folder), saved(tmp_path)
    assert equal(one["state_dict"], other["state_dict"])
    key = stopping.state_key
    assert equal(one["callbacks"][key]["other"], other["callbacks"][key]["other"], but=["threshold"])  # nan


def test_out_of_patience_it_is_finished(whole, tmp_path, capsys):
    folder, (_, module, *_) = whole
    (tmp_path / "last.ckpt").write_bytes((folder / "last.ckpt").read_bytes())
    _, again, watch, _ = fit(tmp_path, resume=True)
    assert "the run is finished" in capsys.readouterr().out
    assert watch.losses == []
    assert equal(again.state_dict(), module.state_dict())


def test_more_epochs_continue_from_the_latest_weights(whole, tmp_path):
    """Stopped by max_epochs it ends with its best weights, and is resumed from where it was."""
    folder, (*_, watch, stopping) = whole
    _, module, first, _ = fit(tmp_path, max_epochs=stopping.best_epoch + 1)
    assert equal(module.state_dict(), watch.weights[stopping.best_epoch - 1], but=["threshold"])
    _, _, second, _ = fit(tmp_path, resume=True)
    assert first.losses + second.losses == watch.losses
    assert equal(saved(folder)["state_dict"], saved(tmp_path)["state_dict"])


def test_more_patience_continues_too(whole, tmp_path):
    folder, (*_, watch, _) = whole
    (tmp_path / "last.ckpt").write_bytes((folder / "last.ckpt").read_bytes())
    _, _, longer, _ = fit(tmp_path, resume=True, patience=6, max_epochs=len(watch.losses) + 1)
    _, _, at_once, _ = fit(tmp_path / "at_once", patience=6, max_epochs=len(watch.losses) + 1)
    assert watch.losses + longer.losses == at_once.losses
    assert equal(saved(tmp_path)["state_dict"], saved(tmp_path / "at_once")["state_dict"])


def test_one_line_says_which_weights_were_kept(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        _, _, watch, _ = fit(tmp_path, max_epochs=2)
    (line,) = [m for m in caplog.messages if m.startswith("val/loss was")]
    best = 1 + (watch.losses[1] < watch.losses[0])
    assert line == (
        f"val/loss was best after epoch {best} of 2 ({min(watch.losses):.4g}), whose weights are kept; it was "
        "still improving: raise trainer.max_epochs"
    )


def test_without_validation_it_trains_the_passes_asked_for(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        trainer, _, watch, _ = fit(tmp_path, val_share=0.0)
    assert watch.losses == []
    assert trainer.current_epoch == 30  # 3 passes over 1,257 rows are 29.5 epochs of 128
    assert any(m == "val/loss was never logged, so nothing to stop by: trained 30 epochs" for m in caplog.messages)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"patience": 0}, "patience is 0"), ({"passes_without_validation": 0}, "passes_without_validation is 0")],
)
def test_wrong_settings(settings, message):
    with pytest.raises(SettingError, match=message):
        RestoringEarlyStopping(**settings)
