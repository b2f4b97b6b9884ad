import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from datamodules import DigitsMultiLabelDataModule
from imbsam import SettingError


@pytest.fixture(scope="module")
def digits():
    data = DigitsMultiLabelDataModule(samples=600, test_samples=300, val_share=0.2)
    data.setup("fit")
    return data


def test_two_to_four_different_digits_on_a_canvas_each_in_its_quarter(digits):
    images, labels = digits._train.dataset.images, digits._train.dataset.labels
    assert (images.shape, images.dtype, labels.shape) == ((600, 1, 20, 20), torch.uint8, (600, 10))
    assert set(labels.sum(1).tolist()) == {2, 3, 4}
    quarters = images.view(600, 2, 10, 2, 10).amax(dim=(2, 4)) > 0
    assert torch.equal(quarters.sum(dim=(1, 2)), labels.sum(1))


def test_the_digits_are_scikit_learns_and_training_and_test_share_none(digits):
    pixels, target = load_digits(return_X_y=True)
    parts = train_test_split(range(len(target)), test_size=0.3, stratify=target, random_state=0)
    known = [{pixels[i].astype("uint8").tobytes(): target[i] for i in part} for part in parts]
    for dataset, own, other in ((digits._train.dataset, *known), (digits._test, *known[::-1])):
        for image, label in list(zip(dataset.images, dataset.labels, strict=True))[:50]:
            found = set()
            for quarter in image[0].unfold(0, 10, 10).unfold(1, 10, 10).reshape(4, 10, 10):
                windows = quarter.unfold(0, 8, 1).unfold(1, 8, 1).reshape(9, 64)
                names = [own[w.numpy().tobytes()] for w in windows if w.numpy().tobytes() in own]
                assert not any(w.numpy().tobytes() in other for w in windows)
                found.update(names)
            assert found == set(label.nonzero().flatten().tolist())


def test_the_tail_is_long_and_rare_digits_come_with_frequent_ones(digits):
    labels = digits._train.dataset.labels.double()
    counts = labels.sum(0)
    order = counts.argsort(descending=True)
    assert counts[order[0]] / counts[order[-1]] > 15
    # in half of the cases the companion, the class at half the rank, follows: more often than by chance
    pairs = [(order[k], order[k // 2]) for k in range(4, 10)]
    together = sum(float((labels[:, j] * labels[:, k]).sum()) for j, k in pairs)
    assert together > 1.05 * sum(float(counts[j] * counts[k] / len(labels)) for j, k in pairs)
    assert digits._test.labels.sum(0).min() > 60


def test_a_canvas_depends_on_seed_and_sample_alone(digits):
    fewer = DigitsMultiLabelDataModule(samples=400, test_samples=300)
    fewer.setup()
    assert torch.equal(fewer._train.dataset.images, digits._train.dataset.images[:400])
    other = DigitsMultiLabelDataModule(samples=400, test_samples=300, seed=1)
    other.setup()
    assert not torch.equal(other._train.dataset.labels, fewer._train.dataset.labels)
    assert torch.equal(other._test.images, digits._test.images)


def test_batches_are_normalised(digits):
    images, labels = next(iter(digits.test_dataloader()))
    assert images.dtype == torch.float32
    assert abs(images.mean()) < 0.1
    assert abs(images.std() - 1) < 0.1
    assert labels.shape == (300, 10)


@pytest.mark.parametrize(("setting", "value"), [("ratio", 0.5), ("samples", 0), ("test_samples", 1.5)])
def test_settings_are_checked(setting, value):
    with pytest.raises(SettingError, match=f"^{setting} is {value}"):
        DigitsMultiLabelDataModule(**{setting: value})
