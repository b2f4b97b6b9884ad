"""What all data sets of image files share, on ImageFolderLTDataModule."""

import gc
import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer

from datamodules import ImageFolderLTDataModule, ImageListLTDataModule
from imbsam import SettingError
from lightning_modules.callbacks.predictions import PredictionsCSV

SMALL = {"image_size": 8, "batch_size": 32, "num_workers": 0}


def ready(root, **settings):
    data = ImageFolderLTDataModule(root, **{**SMALL, **settings})
    data.prepare_data()
    data.setup("fit")
    return data


def epoch(loader):
    images, labels = map(torch.cat, zip(*(batch[:2] for batch in loader), strict=True))
    return images, labels


@pytest.fixture
def damaged_root(image_folder_root, tmp_path):
    """Damaged: one of 3 training images of class dog, a validation and a test image of class cat."""
    root = tmp_path / "damaged"
    shutil.copytree(image_folder_root, root)
    for name in ("train/dog/train 1.jpg", "val/cat/val 0.jpg", "test/cat/test 2.jpg"):
        (root / name).write_bytes(b"")
    return root


def test_batches(image_folder_root):
    data = ready(image_folder_root)
    images, labels = epoch(data.train_dataloader())
    assert (images.shape, images.dtype) == ((158, 3, 8, 8), torch.float32)
    assert torch.bincount(labels).tolist() == data.class_counts.tolist() == [120, 30, 5, 3]
    assert torch.bincount(epoch(data.val_dataloader())[1]).tolist() == [2, 2, 2, 2]
    assert torch.bincount(epoch(data.test_dataloader())[1]).tolist() == [3, 3, 3, 3]
    assert torch.bincount(epoch(data.train_eval_dataloader())[1]).tolist() == [120, 30, 5, 3]


@pytest.mark.parametrize("augment", ["standard", "randaugment", "autoaugment"])
def test_augmentation_depends_on_seed_epoch_and_image_alone(image_folder_root, augment):
    torch.manual_seed(0)
    main = ready(image_folder_root, augment=augment).train_dataloader()
    first, second = epoch(main)[0], epoch(main)[0]
    torch.manual_seed(1)
    loader = ready(image_folder_root, augment=augment, num_workers=2).train_dataloader()
    assert loader.persistent_workers
    assert torch.equal(epoch(loader)[0], first)
    assert torch.equal(epoch(loader)[0], second)
    assert not torch.equal(first.sum(dim=0), second.sum(dim=0))  # not the order alone
    del loader
    gc.collect()


def test_only_training_is_augmented(image_folder_root):
    data = ready(image_folder_root, augment="randaugment")
    for loader in (data.val_dataloader, data.test_dataloader, data.train_eval_dataloader, data.predict_dataloader):
        assert torch.equal(epoch(loader())[0], epoch(loader())[0])
    plain = ready(image_folder_root, augment="none")
    assert torch.equal(epoch(plain.train_dataloader())[0].sum(0), epoch(plain.train_dataloader())[0].sum(0))


def test_validation_images_held_out_of_training_are_not_augmented(image_folder_root):
    data = ready(image_folder_root / "train", val_share=0.25)
    assert data.class_counts.tolist() == [72, 18, 3, 1]  # after the test part and the validation part
    assert torch.equal(epoch(data.val_dataloader())[0], epoch(data.val_dataloader())[0])
    train, val, test = ({*map(bytes, part.paths)} for part in (data._train, data._val, data._test))
    assert len(train | val | test) == len(train) + len(val) + len(test) == 158


def test_damaged_images_are_skipped(damaged_root, capsys):
    data = ready(damaged_root, corrupt_images="skip")
    with pytest.warns(UserWarning, match="dog/train 1.jpg is corrupt: the file is empty; another image of its class"):
        images, labels = epoch(data.train_dataloader())
    assert (len(images), torch.bincount(labels).tolist()) == (158, [120, 30, 5, 3])
    with pytest.warns(UserWarning, match="val/cat/val 0.jpg is corrupt: the file is empty; it is left out"):
        assert torch.bincount(epoch(data.val_dataloader())[1]).tolist() == [2, 2, 1, 2]
    with pytest.warns(UserWarning, match="test/cat/test 2.jpg is corrupt"):
        assert torch.bincount(epoch(data.test_dataloader())[1]).tolist() == [3, 3, 2, 3]
    data.teardown("fit")
    data.teardown("test")
    assert capsys.readouterr().out.splitlines() == [
        "corrupt_images=skip: training images replaced by others of their classes: 1 (rank 0)",
        "corrupt_images=skip: validation images left out: 1 (rank 0)",
        "corrupt_images=skip: test images left out: 1 (rank 0)",
    ]


def test_damaged_images_are_fatal(damaged_root):
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        with pytest.raises(SettingError, match=r"is corrupt: the file is empty: .* set data.corrupt_images to skip"):
            list(getattr(ready(damaged_root), loader)())


def test_prediction_names_the_files(image_folder_root, damaged_root):
    data = ready(image_folder_root, eval_batch_size=5)
    names = [name for _, _, names in data.predict_dataloader() for name in names]
    assert names == sorted(os.path.relpath(path, image_folder_root) for path in image_folder_root.glob("test/*/*"))
    data = ready(image_folder_root, predict=damaged_root / "test", corrupt_images="skip", eval_batch_size=1)
    with pytest.warns(UserWarning, match="cat/test 2.jpg"):
        batches = list(data.predict_dataloader())
    assert [list(names) for _, _, names in batches][6:10] == [
        ["cat/test 0.jpg"],
        ["cat/test 1.jpg"],
        [],
        ["dog/test 0.jpg"],
    ]
    assert batches[8][0].shape == (0, 3, 8, 8)
    (image_folder_root / "empty").mkdir(exist_ok=True)
    with pytest.raises(SettingError, match=r"data.predict is .*empty, which has no images"):
        ready(image_folder_root, predict=image_folder_root / "empty").predict_dataloader()


class Brightness(LightningModule):
    def predict_step(self, batch):
        return batch[0].flatten(1).mean(dim=1)

    def prediction_table(self, predictions):
        return ["brightness"], ([float(b)] for b in torch.cat(list(predictions)))


@pytest.mark.filterwarnings("ignore")
def test_the_predictions_file_has_a_column_of_paths(damaged_root, tmp_path):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(accelerator="cpu", callbacks=PredictionsCSV(str(tmp_path / "found.csv")), **quiet)
    for _ in range(2):  # the second has its own rows alone
        trainer.predict(Brightness(), datamodule=ready(damaged_root, corrupt_images="skip", eval_batch_size=4))
    header, *rows = (tmp_path / "found.csv").read_text().splitlines()
    assert header == "path,brightness"
    wanted = sorted(os.path.relpath(path, damaged_root) for path in damaged_root.glob("test/*/*"))
    assert [row.split(",")[0] for row in rows] == [name for name in wanted if name != "test/cat/test 2.jpg"]


class NamedAsOurColumns(Brightness):
    def prediction_table(self, predictions):
        return ["predicted", "path", "predicted", "row"], (["path", 1, 0, 0] for _ in torch.cat(list(predictions)))


@pytest.mark.filterwarnings("ignore")
def test_no_two_columns_of_the_predictions_have_one_name(image_folder_root, tmp_path):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(accelerator="cpu", callbacks=PredictionsCSV(str(tmp_path / "found.csv")), **quiet)
    trainer.predict(NamedAsOurColumns(), datamodule=ready(image_folder_root))
    assert (tmp_path / "found.csv").read_text().splitlines()[0] == "path,predicted,class path,class predicted,row"


def test_images_in_two_parts_are_warned_of(image_list, tmp_path):
    lines = image_list.read_text().splitlines()
    test = next(line for line in lines if line.endswith(",test"))
    table = image_list.with_name("shared.csv")
    table.write_text("\n".join([*lines, test.replace(",test", ",train")]) + "\n")
    data = ImageListLTDataModule(table, split_column="split", **SMALL)
    with pytest.warns(
        UserWarning, match=f"1 images are in .* and in .*, such as {test.split(',')[0]}: the model is evaluated"
    ):
        data.prepare_data()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "images are in")
        ImageListLTDataModule(image_list, split_column="split", **SMALL).prepare_data()


def test_the_paths_are_bytes_and_not_objects(image_folder_root):
    data = ready(image_folder_root)
    assert data._train.paths.dtype.kind == "S"
    assert isinstance(data._train.paths, np.ndarray)


def test_workers_are_as_many_as_cores_unless_set():
    assert 1 <= ImageFolderLTDataModule("data").num_workers <= 8
    assert ImageFolderLTDataModule("data", num_workers=3).num_workers == 3
