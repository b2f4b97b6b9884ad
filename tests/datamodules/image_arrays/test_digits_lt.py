import pytest
import torch
from sklearn.datasets import load_digits

from datamodules import DigitsLTDataModule


@pytest.fixture(scope="module")
def digits():
    data = DigitsLTDataModule()
    data.setup("fit")
    return data


def images(loader):
    return torch.cat([images for images, _ in loader])


def test_the_counts_are_dealt_to_the_digits(digits):
    # 70 % of the rarest digit is 122 images
    assert sorted(digits.class_counts.tolist(), reverse=True) == [122, 78, 51, 33, 21, 13, 8, 5, 3, 2]
    assert digits.class_counts.tolist() != sorted(digits.class_counts.tolist(), reverse=True)
    other = DigitsLTDataModule(seed=1)
    other.setup("fit")
    assert sorted(other.class_counts.tolist()) == sorted(digits.class_counts.tolist())
    assert other.class_counts.tolist() != digits.class_counts.tolist()
    assert digits.class_names == list("0123456789")


def test_the_batches_are_normalised_digits(digits):
    batch, labels = next(iter(digits.train_dataloader()))
    assert (batch.shape, batch.dtype) == ((32, 1, 8, 8), torch.float32)
    assert (labels.shape, labels.dtype) == ((32,), torch.int64)
    test = images(digits.test_dataloader())
    assert abs(test.mean()) < 0.05
    assert abs(test.std() - 1) < 0.05


def test_the_test_part_is_thirty_percent_of_every_digit_for_every_seed(digits):
    labels = torch.cat([labels for _, labels in digits.test_dataloader()])
    assert len(labels) == 540
    share = torch.bincount(labels) / torch.bincount(torch.from_numpy(load_digits().target))
    assert share.sub(0.3).abs().max() < 0.01
    other = DigitsLTDataModule(seed=7)
    other.setup("test")
    assert torch.equal(images(other.test_dataloader()), images(digits.test_dataloader()))


def test_no_test_image_is_trained_on(digits):
    plain = DigitsLTDataModule(profile="none", augment=False)
    plain.setup("fit")
    trained, tested = images(plain.train_dataloader()), images(plain.test_dataloader())
    originals = torch.from_numpy(load_digits().images).float()
    assert len(trained) + len(tested) == len(originals) == 1797
    everything = torch.cat([trained, tested]).mul(6.02).add(4.88).flatten(1).round()
    # the same 1,797 images, so none is on both sides
    order = [sorted(map(tuple, pixels.tolist())) for pixels in (everything, originals.flatten(1))]
    assert order[0] == order[1]


def test_augmentation_shifts_training_images_by_one_pixel():
    batches = {}
    for augment in (False, True):
        data = DigitsLTDataModule(augment=augment)
        data.setup("fit")
        collate = data.train_dataloader().collate_fn.collate
        one = torch.randint(1, 17, (1, 1, 8, 8), dtype=torch.uint8)
        batches[augment] = collate((one.expand(300, -1, -1, -1), torch.zeros(300)))[0].unique(dim=0)
    assert len(batches[False]) == 1
    assert len(batches[True]) == 9
