"""Image size, mean and std: a setting wins over the model, and the model over the data set."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from datamodules import CIFAR10LTDataModule, ImageFolderLTDataModule
from imbsam import SettingError

MODEL = {"image_size": 20, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of grey images."""
    root = tmp_path_factory.mktemp("images")
    for label, grey in enumerate((51, 102)):
        (root / str(label)).mkdir()
        for i in range(6):
            Image.fromarray(np.full((30, 30, 3), grey, np.uint8)).save(root / str(label) / f"{i}.png")
    return root


def batches(data):
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.mark.parametrize("before_setup", [True, False])
def test_image_files_take_the_models(folder, before_setup, caplog):
    data = ImageFolderLTDataModule(folder, augment="none", batch_size=12, num_workers=0, mean=[0.5] * 3)
    if not before_setup:
        batches(data)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        data.use_preprocessing(**MODEL)
    assert "images: 20 pixels, mean (0.5, 0.5, 0.5), std (0.4, 0.5, 0.6): as the model was trained" in caplog.text
    assert "except data.mean, which is set" in caplog.text
    for loader in (batches(data).train_dataloader(), data.test_dataloader(), data.train_eval_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape[1:] == (3, 20, 20)
        wanted = ((0.2 + 0.2 * labels)[:, None] - 0.5) / torch.tensor([[0.4, 0.5, 0.6]])
        assert_close(images[:, :, 10, 10], wanted)


def test_what_the_model_does_not_say_is_the_data_sets_with_its_values(folder, caplog):
    data = ImageFolderLTDataModule(folder, std=[0.5] * 3)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        data.use_preprocessing(image_size=20)
    assert caplog.records[0].message == (
        "images: 20 pixels, mean (0.485, 0.456, 0.406), std (0.5, 0.5, 0.5): as the model was trained, "
        "except data.std, which is set, and mean, which is the data set's"
    )


def test_image_files_without_a_model_are_as_before(folder, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        data = ImageFolderLTDataModule(folder)
    assert data.image_size == 224
    assert data.mean == (0.485, 0.456, 0.406)
    assert caplog.text == ""


def test_cifar_is_resized_after_the_augmentation(cifar10_root, tmp_path):
    plain, data = (CIFAR10LTDataModule(cifar10_root, augment=False, ratio=10) for _ in range(2))
    data.use_preprocessing(**{**MODEL, "image_size": 64})
    images, _ = next(iter(batches(data).test_dataloader()))
    before, _ = next(iter(batches(plain).test_dataloader()))
    assert images.shape[1:] == (3, 64, 64)
    mean, std = (torch.tensor(MODEL[name]).view(-1, 1, 1) for name in ("mean", "std"))
    pixels = before * torch.tensor(plain.std).view(-1, 1, 1) + torch.tensor(plain.mean).view(-1, 1, 1)
    wanted = torch.nn.functional.interpolate(pixels, (64, 64), mode="bicubic", antialias=True) / 255
    assert_close(images, (wanted - mean) / std, rtol=1e-3, atol=1e-3)
    file = tmp_path / "image.png"
    Image.fromarray(np.full((32, 32, 3), 51, np.uint8)).save(file)
    data.predict = [str(file)]
    image = next(iter(data.predict_dataloader()))[0]
    assert_close(image, ((0.2 - mean) / std).expand(1, 3, 64, 64), rtol=1e-4, atol=1e-4)


def test_cifars_own_size_may_be_set(cifar10_root):
    data = batches(CIFAR10LTDataModule(cifar10_root, ratio=10, image_size=48))
    assert next(iter(data.train_dataloader()))[0].shape[1:] == (3, 48, 48)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"image_size": 0}, "image_size is 0"),
        ({"mean": [0.5]}, r"mean is \[0.5\]: give 3 numbers in \[0, 1\]"),
        ({"std": [0, 1, 1]}, r"std is \[0, 1, 1\]: give numbers above 0"),
        ({"mean": [125, 123, 114]}, r"give 3 numbers in \[0, 1\]"),
    ],
)
def test_a_setting_out_of_range_is_one_line(folder, settings, says):
    for build in (ImageFolderLTDataModule, CIFAR10LTDataModule):
        with pytest.raises(SettingError, match=says):
            build(folder, **settings)
