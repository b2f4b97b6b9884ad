import pytest
import torch
from torch.utils.data import DataLoader, Subset

from datamodules.image_arrays.dataset import ImageArrays
from imbsam.errors import SettingError


@pytest.fixture
def arrays():
    return ImageArrays(torch.arange(24, dtype=torch.uint8).view(6, 1, 2, 2), torch.arange(6))


def test_one_image_and_a_batch_agree(arrays):
    images, labels = arrays.__getitems__([4, 1, 1])
    assert len(arrays) == 6
    assert torch.equal(images, torch.stack([arrays[4][0], arrays[1][0], arrays[1][0]]))
    assert torch.equal(images[0], torch.tensor([[[16, 17], [18, 19]]], dtype=torch.uint8))
    assert labels.tolist() == [4, 1, 1]
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)


@pytest.mark.parametrize("subset", [False, True])
def test_the_loader_hands_a_gathered_batch_to_collate(arrays, subset):
    dataset = Subset(arrays, [5, 3, 0]) if subset else arrays
    batches = list(DataLoader(dataset, batch_size=2, collate_fn=lambda batch: batch))
    assert all(isinstance(images, torch.Tensor) and images.dim() == 4 for images, _ in batches)
    assert torch.cat([labels for _, labels in batches]).tolist() == ([5, 3, 0] if subset else list(range(6)))


def test_a_batch_is_a_copy(arrays):
    arrays.__getitems__([0])[0].zero_()
    arrays.__getitems__([1])[0].zero_()
    assert arrays.images.sum() == sum(range(24))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64), "images is torch.float32"),
        (torch.zeros(2, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), r"shape \(2, 2, 2\)"),
        (
            torch.zeros(2, 1, 2, 2, dtype=torch.uint8),
            torch.zeros(3, dtype=torch.int64),
            "each of the 2 images",
        ),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2), "labels is torch.float32"),
    ],
)
def test_other_tensors_are_refused(images, labels, message):
    with pytest.raises(SettingError, match=message):
        ImageArrays(images, labels)
