"""Loaders of training and evaluation batches, for any map-style data set.

    loader = train_loader(dataset, batch_size=32, **ranks(trainer))   # this process's part of every epoch
    loader = eval_loader(dataset, batch_size=512, **ranks(trainer))   # its share of an evaluation, without repeats

The training loader starts at any batch of any epoch (:class:`ResumableLoader`), so an interrupted run resumes
mid-epoch.
"""

import os
import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, default_collate

from datamodules.sampling.resumable import ResumableLoader
from datamodules.sampling.samplers import EvalSampler, Order, TrainSampler
from datamodules.sampling.seeded_samples import SeededCollate, SeededSamples, innermost


class TrainLoader(ResumableLoader, DataLoader[Any]):
    """The loader that :func:`train_loader` makes."""

    sampler: TrainSampler
    dataset: SeededSamples

    @property
    def seed(self) -> int:
        """Seed of order and augmentation."""
        return self.dataset.seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self.dataset.seed = self.sampler.seed = seed


class EvalLoader(DataLoader[Any]):
    """The loader that :func:`eval_loader` makes: the same number of batches on every rank."""

    sampler: EvalSampler

    def __len__(self) -> int:
        """Number of batches of rank 0, which has the most: a forward under FSDP2 waits for all ranks."""
        replicas = getattr(self.sampler, "num_replicas", 1)
        if replicas == 1:
            return super().__len__()
        largest = -(-len(self.dataset) // replicas)  # type: ignore[arg-type]
        return -(-largest // (self.batch_size or 1))

    def __iter__(self) -> Any:
        """Yield the batches; a rank with one fewer ends with an empty batch."""
        number = 0
        for batch in super().__iter__():
            number += 1
            yield batch
        if number < len(self):
            fetch = getattr(self.dataset, "__getitems__", None)
            samples = fetch([0]) if fetch else [self.dataset[0]]
            assert self.collate_fn is not None
            yield tree_map_only(Tensor, lambda t: t[:0], self.collate_fn(samples))


def train_loader(
    dataset: Dataset[Any],
    batch_size: int,
    collate_fn: Callable[..., Any] | None = None,
    num_workers: int = 0,
    seed: int | None = None,
    num_replicas: int = 1,
    rank: int = 0,
    order: Order | None = None,
) -> TrainLoader:
    """The shuffled training batches of this process; order and augmentation depend on (seed, epoch) alone.

    Args:
        dataset: The training set; :class:`SeededSamples` says what may be random in it.
        batch_size: Samples in a batch of this process.
        collate_fn: See :class:`SeededCollate`; None for PyTorch's own.
        num_workers: Loader processes; with 0 the batches are made in the main process. So they always are of a data set
            whose samples lie on a GPU, which has an attribute ``device`` that says so.
        seed: Seed of order and augmentation; None for that of Lightning's ``seed_everything``, or 0.
        num_replicas: Number of processes that share the data, see :func:`ranks`.
        rank: Number of this process.
        order: See :class:`TrainSampler`; None for a random permutation.

    Returns:
        The loader; Lightning calls its sampler's ``set_epoch``.
    """
    seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
    return TrainLoader(
        SeededSamples(dataset, seed),
        batch_size=batch_size,  # by name, or Lightning cannot build the loader again
        sampler=TrainSampler(dataset, batch_size, seed, num_replicas, rank, order),
        collate_fn=SeededCollate(collate_fn or default_collate),  # type: ignore[arg-type]
        **_worker_settings(dataset, num_workers),
    )


def eval_loader(
    dataset: Dataset[Any],
    batch_size: int,
    collate_fn: Callable[..., Any] | None = None,
    num_workers: int = 0,
    num_replicas: int = 1,
    rank: int = 0,
) -> EvalLoader:
    """This process's share of an evaluation set, in order and without repeats.

    Every rank has the same number of batches, an empty one if its share is shorter, so that sums over the ranks
    (torchmetrics) count every sample once and no rank waits for one that has finished.

    The arguments are those of :func:`train_loader`; ``collate_fn`` gets no seeds.
    """
    sampler = EvalSampler(dataset, num_replicas, rank)
    return EvalLoader(
        dataset, batch_size=batch_size, sampler=sampler, collate_fn=collate_fn, **_worker_settings(dataset, num_workers)
    )


def _worker_settings(dataset: Dataset[Any], num_workers: int) -> dict[str, Any]:
    on_host = getattr(innermost(dataset), "device", torch.device("cpu")).type == "cpu"
    num_workers = num_workers if on_host else 0
    return {
        "num_workers": num_workers,
        "pin_memory": on_host and torch.cuda.is_available(),  # what is on the GPU cannot be pinned
        "persistent_workers": num_workers > 0,
        "worker_init_fn": _outlive_signals,
        "generator": torch.Generator(),  # or starting the workers would draw from the default generator
    }


def _outlive_signals(worker: int) -> None:
    """SLURM and Ctrl-C signal workers too; they must live until the main process has saved, and they end with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
