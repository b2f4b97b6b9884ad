"""Training batches for anomaly detectors: which samples, drawn a whole epoch at once, and their gather."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from datamodules.sampling.resumable import ResumableLoader

Sampling = Literal["natural", "balanced", "pairs", "natural_pairs"]


class EpochBatches(Sampler[Tensor]):
    """The sample indices of each training batch, a function of the seed and the epoch alone.

    * ``natural``: all samples in random order; when they are used up, in another one.
    * ``balanced``: half of a batch unlabelled samples, half labelled anomalies (Pang et al., DevNet, KDD 2019).
    * ``pairs``: of a batch's pairs half (unlabelled, unlabelled), a quarter (anomaly, unlabelled), a quarter
      (anomaly, anomaly), in this order (Pang et al., PReNet, KDD 2023, section 3).
    * ``natural_pairs``: both drawn from all samples.

    Samples are drawn with replacement, except in ``natural``; a sample may be paired with itself.

    Args:
        labels: 0 for unlabelled samples, 1 for labelled anomalies, int64 (N,).
        sampling: How the samples are drawn.
        batch_size: Samples, or pairs, in a batch.
        batches_per_epoch: Number of batches, or None for as many as N samples fill; then the last ``natural`` batch
            may be smaller.
        seed: Seed of the draws.

    Attributes:
        first_batch: Batch at which the next iteration starts; 0 again afterwards.
    """

    def __init__(
        self, labels: Tensor, sampling: Sampling, batch_size: int, batches_per_epoch: int | None, seed: int
    ) -> None:
        self.labels = labels
        self.sampling = sampling
        self.batch_size = batch_size
        self.batches = batches_per_epoch or -(-len(labels) // batch_size)
        self.whole_epoch = batches_per_epoch is None
        self.seed = seed
        self.epoch = 0
        self.first_batch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration, as Lightning does."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of batches."""
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        """The batches' indices, int64 (B,), or (B, 2) for pairs."""
        # SeedSequence mixes the two, so that seed 0, epoch 1 is not seed 1, epoch 0
        state = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state))
        first, self.first_batch = self.first_batch, 0
        batches = self._natural(generator) if self.sampling == "natural" else self._with_replacement(generator)
        return iter(batches[first:])

    def _natural(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        size = len(self.labels)
        wanted = size if self.whole_epoch else self.batches * self.batch_size
        orders = [torch.randperm(size, generator=generator) for _ in range(-(-wanted // size))]
        return torch.split(torch.cat(orders)[:wanted], self.batch_size)

    def _with_replacement(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        def draw(indices: Tensor, count: int) -> Tensor:
            return indices[torch.randint(len(indices), (self.batches, count), generator=generator)]

        size = self.batch_size
        anomalies, unlabelled = self.labels.nonzero().flatten(), (self.labels == 0).nonzero().flatten()
        if self.sampling == "balanced":
            half = size // 2
            return torch.cat([draw(unlabelled, size - half), draw(anomalies, half)], dim=1).unbind(0)
        if self.sampling == "natural_pairs":
            everything = torch.arange(len(self.labels))
            left, right = draw(everything, size), draw(everything, size)
        else:
            quarter = size // 4
            plain = size - 2 * quarter
            # the halves of (u, u), (a, u), (a, a)
            left = torch.cat([draw(unlabelled, plain), draw(anomalies, 2 * quarter)], dim=1)
            right = torch.cat([draw(unlabelled, plain + quarter), draw(anomalies, quarter)], dim=1)
        return torch.stack([left, right], dim=2).unbind(0)


class BatchLoader:
    """Batches of samples that live in memory: one gather each, in this process.

    A torch DataLoader around the same gather costs twice as much a batch for a small table.

    Args:
        features: float32 (N, ...).
        labels: int64 (N,), or None for samples without labels.
        sampler: Yields each batch's indices, int64 (B,) or (B, 2). Lightning calls its ``set_epoch``, if it has one.
    """

    batch_sampler = None  # Lightning looks for one beside the sampler

    def __init__(self, features: Tensor, labels: Tensor | None, sampler: EpochBatches | tuple[Tensor, ...]) -> None:
        self.features = features
        self.labels = labels
        self.sampler = sampler

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        """``(x, labels)`` of shapes (B, ...) and (B,), or (B, 2, ...) and (B, 2); x alone without labels."""
        for batch in self.sampler:
            # index_select takes a flat index only, and is faster than features[batch]
            x = self.features.index_select(0, batch.flatten()).view(*batch.shape, *self.features.shape[1:])
            yield x if self.labels is None else (x, self.labels[batch])


class TrainBatchLoader(ResumableLoader, BatchLoader):
    """The training batches, which can start at any batch of any epoch; the sampler is an :class:`EpochBatches`."""

    sampler: EpochBatches

    def __init__(self, features: Tensor, labels: Tensor, sampler: EpochBatches) -> None:
        super().__init__(features, labels, sampler)
        self.batch_size = sampler.batch_size


def in_order(features: Tensor, labels: Tensor | None, batch_size: int) -> BatchLoader:
    """Batches in the order of the samples."""
    return BatchLoader(features, labels, torch.split(torch.arange(len(features)), batch_size))
