"""Long-tailed handwritten digits: real, and inside scikit-learn, so nothing is downloaded."""

from typing import Any

import torch
from torch import Tensor

from datamodules.image_arrays.augmentation import BatchTransform
from datamodules.image_arrays.base import ImageArraysDataModule
from datamodules.image_arrays.dataset import ImageArrays

_MEAN, _STD = (4.88,), (6.02,)  # of the 1,797 images


class DigitsLTDataModule(ImageArraysDataModule):
    """Scikit-learn's 1,797 digits, images of (1, 8, 8), with a long-tailed training part.

    The test part is the same stratified 30 % for every seed, so no model is ever tested on images that
    another seed trained it on. The seed deals the class counts to the digits.

    Args:
        ratio: Imbalance ratio, largest class / smallest class, at least 1.
        batch_size: Images in a training batch.
        augment: Shift each training image by up to one pixel at random.
        **settings: The settings of :class:`~datamodules.image_arrays.base.ImageArraysDataModule`.
    """

    shuffle_classes = True

    def __init__(self, ratio: float = 50, batch_size: int = 32, augment: bool = True, **settings: Any) -> None:
        super().__init__(ratio=ratio, batch_size=batch_size, **settings)
        self.class_names = [str(digit) for digit in range(10)]
        self.train_collate = BatchTransform(_MEAN, _STD, crop_padding=int(augment))
        self.eval_collate = BatchTransform(_MEAN, _STD)

    def load_datasets(self) -> tuple[ImageArrays, Tensor, ImageArrays]:
        """Split the digits into a training set, 70 %, and a test set."""
        # Imported here because it takes a second that the command line's --help need not wait for.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        images, targets = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 8, 8), torch.from_numpy(labels).long()
        indices = train_test_split(torch.arange(len(targets)), test_size=0.3, stratify=labels, random_state=0)
        train, test = (ImageArrays(images[part], targets[part]) for part in indices)
        return train, train.labels, test
