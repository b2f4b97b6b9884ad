"""Samples and batches whose random augmentation depends on (seed, epoch, draw) alone."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from datamodules.sampling.sample_seeds import sample_seeds, seeded
from datamodules.sampling.samplers import Key


def innermost(dataset: Dataset[Any]) -> Any:
    """The data set inside any ``Subset`` s, which have ``__getitems__`` whether it does or not."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


class SeededSamples(Dataset[Any]):
    """Reads a data set by (epoch, draw), and returns the samples with one seed for each.

    A data set that reads whole batches (``__getitems__``) should be deterministic, with what is random in the
    ``collate_fn``. Any other data set is read sample by sample, each under its own seed of torch's default
    generator, so that torchvision's random transforms depend on (seed, epoch, draw) alone.

    Args:
        dataset: A map-style data set.
        seed: Seed of the run.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self._reads_batches = hasattr(innermost(dataset), "__getitems__")

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        """One sample of the data set as it is."""
        return self.dataset[index]

    def __getitems__(self, keys: Sequence[Key | int]) -> tuple[Any, Tensor]:
        """The samples, and their seeds, int64 (B,). A plain index belongs to epoch 0."""
        numbers = [key if isinstance(key, tuple) else (0, key) for key in keys]
        pairs = torch.from_numpy(np.array(numbers, dtype=np.int64))  # four times as fast as torch.tensor(numbers)
        seeds = sample_seeds(self.seed, pairs[:, 0], pairs[:, 1])  # of the draw: a repeated sample is augmented anew
        indices = (pairs[:, 1] % len(self)).tolist()
        if self._reads_batches:
            return self.dataset.__getitems__(indices), seeds  # type: ignore[attr-defined]
        samples = []
        for index, seed in zip(indices, seeds.tolist(), strict=True):
            with seeded(seed):
                samples.append(self.dataset[index])
        return samples, seeds


class SeededCollate:
    """A ``collate_fn`` for :class:`SeededSamples`.

    Args:
        collate: ``collate_fn`` of the samples. One with an argument ``seeds``, such as
            :class:`~datamodules.image_arrays.augmentation.BatchTransform`, gets the samples' seeds, int64 (B,). Any
            other runs under the first sample's seed of torch's default generator.
    """

    def __init__(self, collate: Callable[..., Any]) -> None:
        self.collate = collate
        self._takes_seeds = "seeds" in inspect.signature(collate).parameters

    def __call__(self, fetched: tuple[Any, Tensor]) -> Any:
        """Make the batch."""
        samples, seeds = fetched
        if self._takes_seeds:
            return self.collate(samples, seeds=seeds)
        with seeded(int(seeds[0])):
            return self.collate(samples)
