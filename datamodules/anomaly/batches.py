"""Training batches for anomaly detectors: which rows, drawn a whole epoch at once, and their gather."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from datamodules.sampling.resumable import ResumableLoader

Sampling = Literal["natural", "balanced", "pairs", "natural_pairs"]


class EpochRows(Sampler[Tensor]):
    """The row indices of each training batch, a function of the seed and the epoch alone.

    * ``natural``: all rows in random order; when they are used up, in another one.
    * ``balanced``: half of a batch unlabelled rows, half labelled anomalies (Pang et al., DevNet, KDD 2019).
    * ``pairs``: of a batch's pairs half (unlabelled, unlabelled), a quarter (anomaly, unlabelled), a quarter
      (anomaly, anomaly), in this order (Pang et al., PReNet, KDD 2023, section 3).
    * ``natural_pairs``: both rows drawn from all rows.

    Rows are drawn with replacement, except in ``natural``; a row may be paired with itself.

    Args:
        labels: 0 for unlabelled rows, 1 for labelled anomalies, int64 (N,).
        sampling: How the rows are drawn.
        batch_size: Rows, or pairs, of a batch.
        batches_per_epoch: Number of batches, or None for as many as N rows fill; then the last ``natural`` batch may
            be smaller.
        seed: Seed of the draws.
    """

    def __init__(
        self, labels: Tensor, sampling: Sampling, batch_size: int, batches_per_epoch: int | None, seed: int
    ) -> None:
        self.anomalies = labels.nonzero().flatten()
        self.unlabelled = (labels == 0).nonzero().flatten()
        self.num_rows = len(labels)
        self.sampling = sampling
        self.batch_size = batch_size
        self.batches = batches_per_epoch or -(-self.num_rows // batch_size)
        self.whole_rows_only = batches_per_epoch is None
        self.seed = seed
        self.epoch = 0
        self.first_batch = 0  # batch at which the next iteration starts; 0 again afterwards

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration, as Lightning does."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of batches."""
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        """The batches' rows, int64 (B,), or (B, 2) for pairs."""
        # SeedSequence mixes the two, so that seed 0, epoch 1 is not seed 1, epoch 0
        state = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state))
        first, self.first_batch = self.first_batch, 0
        rows = self._natural(generator) if self.sampling == "natural" else self._drawn(generator)
        return iter(rows[first:])

    def _natural(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        wanted = self.num_rows if self.whole_rows_only else self.batches * self.batch_size
        orders = [torch.randperm(self.num_rows, generator=generator) for _ in range(-(-wanted // self.num_rows))]
        return torch.split(torch.cat(orders)[:wanted], self.batch_size)

    def _drawn(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        def draw(rows: Tensor, count: int) -> Tensor:
            return rows[torch.randint(len(rows), (self.batches, count), generator=generator)]

        size = self.batch_size
        if self.sampling == "natural_pairs":
            everything = torch.arange(self.num_rows)
            batches = torch.stack([draw(everything, size), draw(everything, size)], dim=2)
        elif self.sampling == "pairs":
            quarter = size // 4
            plain = size - 2 * quarter
            # one row's halves side by side: (u, u), (a, u), (a, a)
            left = torch.cat([draw(self.unlabelled, plain), draw(self.anomalies, 2 * quarter)], dim=1)
            right = torch.cat([draw(self.unlabelled, plain + quarter), draw(self.anomalies, quarter)], dim=1)
            batches = torch.stack([left, right], dim=2)
        else:
            half = size // 2
            batches = torch.cat([draw(self.unlabelled, size - half), draw(self.anomalies, half)], dim=1)
        return batches.unbind(0)


class BatchLoader:
    """Batches of rows that live in memory: one gather each, in this process.

    A torch DataLoader around the same gather costs twice as much a batch as the gather of a small table.

    Args:
        features: float32 (N, ...).
        labels: int64 (N,), or None for rows without labels.
        sampler: Yields each batch's rows, int64 (B,) or (B, 2). Lightning calls its ``set_epoch``, where it has one.
    """

    batch_sampler = None  # Lightning looks for one beside the sampler

    def __init__(self, features: Tensor, labels: Tensor | None, sampler: EpochRows | tuple[Tensor, ...]) -> None:
        self.features = features
        self.labels = labels
        self.sampler = sampler

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        """``(x, labels)`` of shapes (B, ...) and (B,), or (B, 2, ...) and (B, 2); x alone where there are no labels."""
        for rows in self.sampler:
            # index_select takes a flat index only, and is faster than features[rows]
            x = self.features.index_select(0, rows.flatten()).view(*rows.shape, *self.features.shape[1:])
            yield x if self.labels is None else (x, self.labels[rows])


class TrainBatchLoader(ResumableLoader, BatchLoader):
    """The training batches, which can start at any batch of any epoch.

    Args:
        features: float32 (N, ...).
        labels: int64 (N,).
        sampler: Yields each batch's rows.
    """

    sampler: EpochRows

    def __init__(self, features: Tensor, labels: Tensor, sampler: EpochRows) -> None:
        super().__init__(features, labels, sampler)
        self.batch_size = sampler.batch_size


def ordered_batches(features: Tensor, labels: Tensor | None, batch_size: int) -> BatchLoader:
    """Batches in the order of the rows."""
    return BatchLoader(features, labels, torch.split(torch.arange(len(features)), batch_size))


def validation_rows(labels: Tensor, sampling: Sampling, batch_size: int, seed: int) -> tuple[Tensor, ...]:
    """Rows of a validation part drawn as in training, once and for all: the loss on them is compared over epochs.

    Args:
        labels: 0 for unlabelled rows, 1 for labelled anomalies, int64 (N,).
        sampling: How the rows are drawn: ``natural`` is every row once, the others draw 2 N rows, or pairs.
        batch_size: Most rows, or pairs, of a batch.
        seed: Seed of the draws.

    Returns:
        The batches' rows, int64 (B,), or (B, 2) for pairs.
    """
    if sampling == "natural":
        return tuple(EpochRows(labels, sampling, batch_size, None, seed))
    draws = max(4, 2 * len(labels))
    size = min(batch_size, draws)
    return tuple(EpochRows(labels, sampling, size, -(-draws // size), seed))
