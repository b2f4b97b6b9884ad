import contextlib
import gc
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from datamodules import CIFAR100LTDataModule, DigitsLTDataModule, ImageFolderLTDataModule, LongTailedDataModule
from datamodules.image_arrays.dataset import ImageArrays
from datamodules.sampling.samplers import EvalSampler, TrainSampler
from imbsam.errors import SettingError
from tests.training import quiet_trainer

COUNTS = [40, 20, 10]


class Numbered(LongTailedDataModule):
    """Three classes whose images carry the number of their sample; the smallest possible subclass."""

    labels = torch.arange(3).repeat_interleave(torch.tensor([50, 45, 40]))

    def load_datasets(self):
        self.class_names = ["ant", "bee", "cat"]
        images = torch.arange(len(self.labels), dtype=torch.uint8).view(-1, 1, 1, 1)
        self.train_collate = self.eval_collate = collate
        test = ImageArrays(images[:30] + 200, self.labels[:30])
        return ImageArrays(images, self.labels), self.labels, test


def collate(batch):  # at the top of the file for the loader's processes
    return batch[0].flatten().long(), batch[1]


def numbered(**settings):
    data = Numbered(ratio=4, **{"batch_size": 16, "eval_batch_size": 8, **settings})
    data.setup("fit")
    return data


def epoch(loader):
    numbers, labels = map(torch.cat, zip(*loader, strict=True))
    return numbers.tolist(), labels


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("profile", ["exponential", "step"])
def test_counts_of_another_ratio_are_those_of_data_at_that_ratio(seed, profile):
    """The classes are shuffled by the seed, and a validation split leaves the counts as they are."""
    data, other = (
        DigitsLTDataModule(ratio=r, seed=seed, profile=profile, val_share=v) for r, v in ((10, 0.2), (50, 0))
    )
    data.setup()
    other.setup()
    assert torch.equal(data.counts_of_ratio(50), other.class_counts)
    assert len(data.kept_samples) == data.counts_of_ratio(10).sum() > data.class_counts.sum()


def test_data_that_keep_every_sample_have_no_counts_of_a_ratio():
    data = numbered(profile="none")
    with pytest.raises(SettingError, match=r"^Numbered keeps every training sample .* has no ratio: leave it out$"):
        data.counts_of_ratio(10)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict", None])
def test_class_counts_are_known_in_every_stage(stage):
    data = Numbered(ratio=4)
    data.setup(stage)
    assert data.class_counts.tolist() == COUNTS
    assert data.class_counts.dtype == torch.int64
    assert data.class_names == ["ant", "bee", "cat"]
    for loader in (data.train_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert len(next(iter(loader))) == 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_sees_every_training_sample_once_in_a_new_order(num_workers):
    data = numbered(num_workers=num_workers)
    loader = data.train_dataloader()
    first, labels = epoch(loader)
    second, _ = epoch(loader)
    assert torch.bincount(labels).tolist() == COUNTS
    assert len(set(first)) == 70
    assert torch.equal(Numbered.labels[first], labels)
    assert first != second
    assert sorted(first) == sorted(second)
    assert [len(labels) for _, labels in loader] == [16, 16, 16, 16, 6]
    assert loader.persistent_workers == (num_workers > 0)
    del loader
    gc.collect()  # ends the workers here, not in the middle of another test


def test_the_seed_alone_decides_which_samples_are_kept():
    torch.manual_seed(1)
    one = sorted(epoch(numbered().train_dataloader())[0])
    torch.manual_seed(2)
    assert one == sorted(epoch(numbered().train_dataloader())[0])
    assert one != sorted(epoch(numbered(seed=1).train_dataloader())[0])


def test_a_second_setup_changes_nothing():
    data = numbered()
    dataset = data.train_dataloader().dataset.dataset
    data.setup("test")
    assert data.train_dataloader().dataset.dataset is dataset


def test_without_a_share_there_is_no_validation():
    assert numbered().val_dataloader() == []


def test_validation_is_a_part_of_the_long_tail_and_the_counts_are_those_after_it():
    data = numbered(val_share=0.25)
    trained, labels = epoch(data.train_dataloader())
    validated, val_labels = epoch(data.val_dataloader())
    assert torch.bincount(val_labels).tolist() == [10, 5, 2]
    assert data.class_counts.tolist() == torch.bincount(labels).tolist() == [30, 15, 8]
    assert not set(trained) & set(validated)
    assert sorted(trained + validated) == sorted(epoch(numbered().train_dataloader())[0])
    assert [len(labels) for _, labels in data.val_dataloader()] == [8, 8, 1]
    assert epoch(data.val_dataloader())[0] == validated  # in order


def test_test_and_prediction_batches_are_the_test_set_in_order():
    data = numbered()
    assert epoch(data.test_dataloader())[0] == list(range(200, 230))
    assert epoch(data.predict_dataloader())[0] == list(range(200, 230))
    assert [len(labels) for _, labels in data.test_dataloader()] == [8, 8, 8, 6]


def test_profile_none_keeps_every_sample():
    assert numbered(profile="none").class_counts.tolist() == [50, 45, 40]


def test_step_profile():
    assert numbered(profile="step").class_counts.tolist() == [40, 40, 10]


def test_shuffled_classes_get_the_same_counts():
    data = Numbered(ratio=4, seed=2)
    data.shuffle_classes = True
    data.setup("fit")
    assert data.class_counts.tolist() != COUNTS
    assert sorted(data.class_counts.tolist(), reverse=True) == COUNTS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.01}, r"ratio is 0\.01, .* inverse, 100"),
        ({"profile": "exp"}, "profile is 'exp': .* exponential, step, none"),
        ({"val_share": 1.0}, r"val_share is 1\.0: give a number in \[0, 1\)"),
        ({"batch_size": 0}, "^batch_size is 0: give .* from 1$"),
        ({"eval_batch_size": -1}, "^eval_batch_size is -1: give .* from 1$"),
        ({"num_workers": -1}, "^num_workers is -1: give .* from 0$"),
    ],
)
def test_wrong_settings_are_refused_at_construction(settings, message):
    with pytest.raises(SettingError, match=message) as caught:
        Numbered(**settings)
    assert "\n" not in str(caught.value)


def test_a_ratio_that_empties_a_class_is_refused():
    with pytest.raises(SettingError, match=r"ratio is 41, .* at most 40"):
        Numbered(ratio=41).setup("fit")


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_outside_the_classes_are_refused(label):
    data = Numbered()
    data.labels = torch.tensor([0, 1, 2, label])
    with pytest.raises(SettingError, match=rf"Numbered: training labels \[{label}\] are outside \[0, 3\)"):
        data.setup("fit")


def test_loaders_before_setup_say_what_to_call():
    with pytest.raises(RuntimeError, match=r"call prepare_data\(\) and setup\(\)"):
        Numbered().train_dataloader()


class Linear(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.validated = 0

    def setup(self, stage):
        assert self.trainer.datamodule.class_counts.shape == (10,)

    def forward(self, batch):
        return self.layer(batch[0].flatten(1))

    def training_step(self, batch):
        return F.cross_entropy(self(batch), batch[1])

    def validation_step(self, batch):
        self.validated += len(batch[1])

    def test_step(self, batch):
        self.log("accuracy", (self(batch).argmax(1) == batch[1]).float().mean())

    def predict_step(self, batch):
        return self(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize(("val_share", "validated"), [(0.0, 0), (0.3, 101)])
def test_the_trainer_runs_every_stage(val_share, validated):
    run, model = quiet_trainer(num_sanity_val_steps=0, enable_checkpointing=False), Linear()
    data = DigitsLTDataModule(val_share=val_share)
    run.fit(model, datamodule=data)
    assert run.global_step == -(-int(data.class_counts.sum()) // 32)
    assert model.validated == validated
    assert "accuracy" in run.test(model, datamodule=data, verbose=False)[0]
    assert sum(map(len, run.predict(model, datamodule=data))) == 540


@pytest.mark.filterwarnings("ignore")
def test_lightning_leaves_our_samplers_in_place():
    run, model = quiet_trainer(strategy="ddp", enable_checkpointing=False), Linear()
    assert run._accelerator_connector.use_distributed_sampler
    try:
        run.fit(model, datamodule=DigitsLTDataModule(val_share=0.3))
        assert isinstance(run.train_dataloader.sampler, TrainSampler)
        assert isinstance(run.val_dataloaders.sampler, EvalSampler)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_settings_are_logged_and_restored_from_the_checkpoint(tmp_path):
    run = quiet_trainer(
        max_steps=1,
        enable_checkpointing=True,
        logger=CSVLogger(tmp_path),
        default_root_dir=tmp_path,
        limit_train_batches=1,
    )
    run.fit(Linear(), datamodule=DigitsLTDataModule(ratio=20, seed=3))
    path = tmp_path / "checkpoint.ckpt"
    run.save_checkpoint(path)
    torch.load(path, weights_only=True)
    again = DigitsLTDataModule.load_from_checkpoint(path, batch_size=8)
    assert (again.ratio, again.seed, again.batch_size) == (20, 3, 8)
    assert "ratio: 20" in next(tmp_path.rglob("hparams.yaml")).read_text()
    assert CIFAR100LTDataModule(Path("sets")).hparams["root"] == "sets"  # weights_only refuses a Path
    assert CIFAR100LTDataModule(predict=[Path("a.jpg")]).hparams_initial["predict"] == ["a.jpg"]


def command_line(*arguments, data=None):
    return LightningCLI(
        Linear,
        data or LongTailedDataModule,
        subclass_mode_data=data is None,
        run=False,
        save_config_callback=None,
        parser_kwargs={"exit_on_error": False},
        args=list(arguments),
    )


@pytest.mark.filterwarnings("ignore")
def test_the_command_line_makes_and_refuses_datamodules():
    data = command_line("--data=datamodules.DigitsLTDataModule", "--data.ratio=20", "--data.profile=step").datamodule
    assert (type(data), data.ratio, data.profile, data.batch_size) == (DigitsLTDataModule, 20, "step", 32)
    assert (data.hparams["ratio"], data.hparams["profile"]) == (20, "step")
    data = command_line("--data.root=sets", "--data.augment=false", data=CIFAR100LTDataModule).datamodule
    assert (str(data.root), data.train_collate.flip) == ("sets", False)
    with pytest.raises(SettingError, match=r"ratio is 0\.01, "):
        command_line("--data.ratio=0.01", data=DigitsLTDataModule)
    # jsonargparse wraps what a subclass's constructor raises
    with pytest.raises(ValueError, match=r"ratio is 0\.01, ") as caught:
        command_line("--data=datamodules.DigitsLTDataModule", "--data.ratio=0.01")
    assert isinstance(caught.value.__cause__, SettingError)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("data", [DigitsLTDataModule, CIFAR100LTDataModule, ImageFolderLTDataModule])
def test_the_command_lines_help_documents_every_setting(data):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        command_line("--help", data=data)
    shown = " ".join(text.getvalue().split())
    for setting in (
        "ratio",
        "profile",
        "val_share",
        "batch_size",
        "eval_batch_size",
        "num_workers",
        "seed",
        "augment",
    ):
        documented = shown.split(f"--data.{setting} ", 1)[1].split("--")[0]
        assert documented.split(" ", 1)[1].split(" (type")[0].strip(), setting
