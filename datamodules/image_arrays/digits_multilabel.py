"""Canvases of several handwritten digits each: multi-label, real, and inside scikit-learn, so nothing is downloaded."""

from typing import Any

import torch
from torch import Tensor

from datamodules.base.multi_label import MultiLabelDataModule
from datamodules.image_arrays.augmentation import BatchTransform
from datamodules.image_arrays.dataset import ImageArrays
from datamodules.sampling.sample_seeds import random_integers, sample_seeds
from imbsam.checks import check_whole_numbers
from imbsam.errors import SettingError

CELL = 10
"""Side of a quarter of the canvas; a digit of 8 pixels has three places along it."""
_MEAN, _STD = (2.38,), (4.84,)  # of 1,000 training canvases
_RESOLUTION = 2**31


class DigitsMultiLabelDataModule(MultiLabelDataModule):
    """Canvases of (1, 20, 20) with two to four of scikit-learn's digits, different ones, whose classes are long-tailed.

    Every quarter of a canvas holds one digit at most. The first is drawn with probabilities that fall exponentially
    over the classes, by ``ratio`` from the most to the least frequent. Each further one is in half of the cases the
    companion of the last (the class at half its rank, so that rare digits come with frequent ones), otherwise drawn
    with the same probabilities from those not on the canvas. The seed deals the ranks to the digits.

    Everything about a training canvas depends on (seed, sample) alone. Its digits are of the 70 % for training; the
    test canvases, from the other 30 %, are the same for every seed and have all classes equally often.

    Args:
        ratio: Probability of the most frequent over that of the least frequent digit, at least 1.
        samples: Training canvases, before any validation split.
        test_samples: Test canvases.
        batch_size: Images in a training batch.
        augment: Shift each training canvas by up to one pixel at random.
        **settings: The settings of :class:`~datamodules.base.multi_label.MultiLabelDataModule`.

    Raises:
        SettingError: A setting is out of range.
    """

    def __init__(
        self,
        ratio: float = 100,
        samples: int = 1000,
        test_samples: int = 1000,
        batch_size: int = 32,
        augment: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(ratio=ratio, batch_size=batch_size, **settings)
        check_whole_numbers(samples=samples, test_samples=test_samples)
        if not ratio >= 1:
            raise SettingError(f"ratio is {ratio}: give most / least frequent digit, a number from 1")
        self.samples, self.test_samples = samples, test_samples
        self.class_names = [str(digit) for digit in range(10)]
        self.train_collate = BatchTransform(_MEAN, _STD, crop_padding=int(augment))
        self.eval_collate = BatchTransform(_MEAN, _STD)

    def load_datasets(self) -> tuple[ImageArrays, Tensor, ImageArrays]:
        """Draw the training and test canvases."""
        # Imported here because it takes a second that the command line's --help need not wait for.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        images, targets = torch.from_numpy(pixels).to(torch.uint8).view(-1, 8, 8), torch.from_numpy(labels).long()
        parts = train_test_split(torch.arange(len(targets)), test_size=0.3, stratify=labels, random_state=0)
        (train, train_digits), (test, test_digits) = ((images[part], targets[part]) for part in parts)
        rank = torch.randperm(10, generator=torch.Generator().manual_seed(self.seed))
        train_seeds = sample_seeds(self.seed, torch.zeros(self.samples, dtype=torch.int64), torch.arange(self.samples))
        test_seeds = sample_seeds(0, torch.ones(self.test_samples, dtype=torch.int64), torch.arange(self.test_samples))
        own = canvases(train, train_digits, train_seeds, self.ratio, rank)
        others = canvases(test, test_digits, test_seeds, 1.0, rank=None)
        return own, own.labels, others


def canvases(images: Tensor, digits: Tensor, seeds: Tensor, ratio: float, rank: Tensor | None) -> ImageArrays:
    """Put digits on canvases.

    Args:
        images: uint8 (M, 8, 8).
        digits: Their classes, int64 (M,), in 0..9, each at least once.
        seeds: One seed for each canvas, int64 (N,).
        ratio: As for :class:`DigitsMultiLabelDataModule`.
        rank: Rank of each class by its frequency, int64 (10,); None for no companions.

    Returns:
        Canvases, uint8 (N, 1, 20, 20), and labels, int64 (N, 10).
    """
    canvas = torch.zeros(len(seeds), 1, 2 * CELL, 2 * CELL, dtype=torch.uint8)
    labels = torch.zeros(len(seeds), 10, dtype=torch.int64)
    ranks = torch.arange(10) if rank is None else rank
    frequency, companion = ratio ** (-ranks.double() / 9), ranks.argsort()[ranks // 2]
    number = 2 + random_integers(seeds, 3, draw=0)
    quarters = torch.stack([random_integers(seeds, _RESOLUTION, draw=1 + q) for q in range(4)], dim=1).argsort(dim=1)
    every, last = torch.arange(len(seeds)), torch.zeros(len(seeds), dtype=torch.int64)
    for place in range(4):
        draws = [random_integers(seeds, _RESOLUTION, draw=10 * (place + 1) + d) for d in range(5)]
        ends = frequency.where(labels == 0, 0.0).cumsum(dim=1)
        drawn = (draws[0][:, None].double() / _RESOLUTION * ends[:, -1:] >= ends).sum(dim=1)
        if place and rank is not None:
            together = (draws[1] % 2 == 0) & (labels[every, companion[last]] == 0)
            drawn = companion[last].where(together, drawn)
        last = drawn
        for i in (place < number).nonzero().flatten().tolist():
            of_class = (digits == drawn[i]).nonzero().flatten()
            digit = images[of_class[draws[2][i] % len(of_class)]]
            quarter = int(quarters[i, place])
            top, left = (
                CELL * part + int(shift)
                for part, shift in zip(divmod(quarter, 2), (draws[3][i] % 3, draws[4][i] % 3), strict=True)
            )
            canvas[i, 0, top : top + 8, left : left + 8] = digit
            labels[i, drawn[i]] = 1
    return ImageArrays(canvas, labels)
