import numpy as np
import pytest
import torch

from datamodules import CIFAR10LTDataModule, CIFAR100LTDataModule
from datamodules.image_arrays.dataset import ImageArrays
from datamodules.image_arrays.packed_images import PackedImages, pack_images, read_packed
from imbsam import SettingError


def packed(root, path, **settings):
    data = CIFAR10LTDataModule(root, **settings)
    pack_images(path, data)
    return data


def epoch(data):
    torch.manual_seed(0)
    images, labels = map(torch.cat, zip(*data.train_dataloader(), strict=True))
    return images, labels


def test_a_packed_file_trains_and_tests_as_the_whole_set_does(cifar10_root, tmp_path):
    path = tmp_path / "cifar10_lt.npz"
    whole = packed(cifar10_root, path, ratio=5)
    data = CIFAR10LTDataModule(path, ratio=5)
    data.prepare_data()
    data.setup()
    assert data.class_names == whole.class_names
    for found, wanted in zip(epoch(data), epoch(whole), strict=True):
        assert torch.equal(found, wanted)
    for (images, labels), (others, theirs) in zip(data.test_dataloader(), whole.test_dataloader(), strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, theirs)


def test_a_larger_ratio_and_a_validation_share_are_in_it_and_other_seeds_are_not(cifar10_root, tmp_path):
    path = tmp_path / "cifar10_lt.npz"
    packed(cifar10_root, path, ratio=5)
    whole = CIFAR10LTDataModule(cifar10_root, ratio=10, val_share=0.5)
    data = CIFAR10LTDataModule(path, ratio=10, val_share=0.5)
    for each in (whole, data):
        each.setup()
    assert torch.equal(epoch(data)[0], epoch(whole)[0])
    for settings in ({"seed": 1}, {"ratio": 2}, {"profile": "none"}):
        other = CIFAR10LTDataModule(path, **{"ratio": 5, **settings})
        other.setup()
        with pytest.raises(
            SettingError, match=r"samples drawn are not in the packed file.*set data\.seed, data\.profile and"
        ):
            epoch(other)


def test_the_real_split_is_below_60_mib(cifar100_root, tmp_path):
    data = CIFAR100LTDataModule(cifar100_root, ratio=100)
    path = tmp_path / "cifar100_lt.npz"
    pack_images(path, data)
    assert path.stat().st_size < 60 * 2**20
    train, test, names = read_packed(path)
    whole, _, whole_test = data.load_datasets()
    indices = data.kept_samples.tolist()
    assert len(indices) == 10_847
    for found, wanted in zip(train.__getitems__(indices), whole.__getitems__(indices), strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(test.images, whole_test.images)
    assert names == data.class_names


def test_one_image(tmp_path):
    images = ImageArrays(torch.randint(256, (4, 1, 2, 2), dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    data = PackedImages(images.images[[3, 1]], torch.tensor([3, 1]), images.labels)
    image, label = data[1]
    assert torch.equal(image, images.images[1])
    assert label == 1
    with pytest.raises(SettingError, match="1 of the samples drawn are not in the packed file"):
        data[0]


@pytest.mark.parametrize("spoil", ["missing", "cut", "another", "pickle"])
def test_a_file_that_cannot_be_read_is_one_line(spoil, cifar10_root, tmp_path):
    path = tmp_path / "cifar10_lt.npz"
    if spoil in ("cut", "pickle"):
        packed(cifar10_root, path, ratio=5)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    if spoil == "another":
        np.savez(path, x=np.zeros(3))
    if spoil == "pickle":
        np.savez(path, train_images=np.array([{}], dtype=object))
    data = CIFAR10LTDataModule(path)
    data.prepare_data()
    with pytest.raises(
        SettingError, match=r"data\.root is .*, which cannot be read \(.*\): make the file again"
    ) as caught:
        data.setup()
    assert "\n" not in str(caught.value)


def test_a_file_of_another_data_set(cifar10_root, tmp_path):
    path = tmp_path / "cifar10_lt.npz"
    packed(cifar10_root, path, ratio=5)
    with pytest.raises(SettingError, match="has 10 classes, and CIFAR100 has 100: give a file packed from CIFAR100"):
        CIFAR100LTDataModule(path).setup()
