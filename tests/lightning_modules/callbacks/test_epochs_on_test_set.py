"""The test accuracy after every epoch, on the digits."""

from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from datamodules import DigitsLTDataModule
from imbsam import SettingError
from imbsam.group_names import GROUPS
from imbsam.report.comparison import columns, group_runs, logged
from imbsam.report.exports import comma_separated
from imbsam.report.runs import read_run
from lightning_modules import EpochsOnTestSet, LongTailedClassifier
from lightning_modules.backbones import SmallCNN
from tests.pieces import configs
from tests.training import csv_rows, quiet_trainer, sgd

NAMES = [f"epochs_on_test_set/{prefix}{group}" for prefix in ("", "mirrored_") for group in GROUPS]
EPOCHS = 3


class Digits(DigitsLTDataModule):
    """The test loader is PyTorch's own, which draws a seed from the default generator."""

    def test_dataloader(self):
        loader = super().test_dataloader()
        return DataLoader(loader.dataset, batch_size=128, collate_fn=loader.collate_fn)


def fit(folder, callbacks, saves=False):
    """A training with dropout and BatchNorm, and its test; the trainer, the model and the log of every epoch."""
    torch.manual_seed(0)
    model = LongTailedClassifier(
        backbone=partial(SmallCNN, width=8, norm="batch", dropout=0.2), optimizer=sgd, many=50, few=10
    )
    logger = CSVLogger(folder, name="", version=0)
    trainer = quiet_trainer(max_epochs=EPOCHS, logger=logger, callbacks=callbacks, enable_checkpointing=saves)
    data = Digits(batch_size=64)
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    rows = csv_rows(folder / "version_0/metrics.csv")
    return trainer, model, rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("run"), [EpochsOnTestSet()])


def test_every_epoch_is_logged_and_the_last_one_is_what_is_tested(run, tmp_path):
    trainer, model, rows = run
    tested = [row for row in rows if row[NAMES[0]]]
    assert [int(row["epoch"]) for row in tested] == list(range(EPOCHS))
    last = {name: float(tested[-1][name]) for name in NAMES}
    final = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert [last[f"epochs_on_test_set/{group}"] for group in GROUPS] == [final[f"test/{group}"] for group in GROUPS]
    model.hparams["flip_tta"] = True
    mirrored = quiet_trainer().test(model, datamodule=DigitsLTDataModule(batch_size=64), verbose=False)[0]
    assert [last[f"epochs_on_test_set/mirrored_{group}"] for group in GROUPS] == [
        mirrored[f"test/{group}"] for group in GROUPS
    ]
    assert last["epochs_on_test_set/all"] != last["epochs_on_test_set/mirrored_all"]


def test_the_training_is_not_changed(run, tmp_path):
    """Weights, BatchNorm's statistics and the masks of dropout are those of a training without it."""
    _, model, _ = run
    _, plain, rows = fit(tmp_path, [])
    for (name, found), wanted in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(found, wanted), name
    assert not set(NAMES) & set(rows[0])


def test_nothing_can_be_chosen_by_it(run, tmp_path):
    assert not any("epochs_on_test_set" in name for name in run[0].callback_metrics)
    best = ModelCheckpoint(tmp_path, monitor=NAMES[3], mode="max")
    with pytest.warns(UserWarning, match="could not find the monitored key"):
        fit(tmp_path, [EpochsOnTestSet(), best], saves=True)
    assert best.best_model_score is None


def test_no_table_of_the_report_shows_it(imbsam, tmp_path):
    pieces = configs("data/digits_lt", "trainer/test_every_epoch")
    code, _, err = imbsam("fit", *pieces, "--trainer.max_epochs=2", "--trainer.limit_test_batches=1")
    assert code == 0, err
    run = read_run(next(tmp_path.glob("logs/*/*/version_0")))
    assert all(name in run.final for name in NAMES)
    groups = group_runs([run])
    task = groups[0].task
    shown = {**columns(groups), **logged(groups, {**task.measures, **task.details, **task.distributions}), **run.curves}
    assert not any("epochs_on_test_set" in name for name in shown)
    assert "epochs_on_test_set" not in comma_separated(groups)


def test_a_module_without_group_accuracies_is_refused():
    with pytest.raises(SettingError, match="model is LightningModule, which has no accuracy of class groups"):
        EpochsOnTestSet().on_fit_start(quiet_trainer(), LightningModule())


def test_frozen_layers_stay_in_evaluation_mode(run, tmp_path):
    class Frozen(LongTailedClassifier):
        def on_train_epoch_start(self):
            super().on_train_epoch_start()
            if self.current_epoch == 0:
                next(m for m in self.modules() if isinstance(m, torch.nn.BatchNorm2d)).eval()

    torch.manual_seed(0)
    model = Frozen(backbone=partial(SmallCNN, width=2, norm="batch"), optimizer=sgd)
    quiet_trainer(max_epochs=2, callbacks=[EpochsOnTestSet()]).fit(model, datamodule=DigitsLTDataModule(batch_size=64))
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert [norm.training for norm in norms] == [False] + [True] * (len(norms) - 1)
