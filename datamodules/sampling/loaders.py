"""Which samples a process sees, in which order, as a function of (seed, epoch) alone.

    loader = train_loader(dataset, batch_size=32, **ranks(trainer))   # this process's part of every epoch
    loader = eval_loader(dataset, batch_size=512, **ranks(trainer))   # its share of an evaluation, without repeats

k processes with batches of b rows see together the batches that one process with k * b rows sees. The training loader
starts at any batch of any epoch (:meth:`TrainLoader.load_state_dict`), so an interrupted run can go on where it was.
The samplers are ``DistributedSampler`` s, which Lightning leaves in place, whatever ``use_distributed_sampler`` is.
"""

import inspect
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, default_collate

from datamodules.sampling.sample_seeds import sample_seeds, seeded
from imbsam.errors import SettingError

Key = tuple[int, int]
"""What the training sampler yields: the epoch, so that it reaches the workers, and the draw, which is the sample's
index, plus the number of samples for every earlier time that this epoch has drawn it."""

Order = Callable[[int, torch.Generator], Tensor]
"""From an epoch and a generator to the epoch's draws, int64 (N,)."""


def ranks(trainer: Any = None) -> dict[str, int]:
    """How many processes share the data, and which one this is.

    Args:
        trainer: A Lightning trainer (it knows which processes hold other data), or None to ask torch.distributed.

    Returns:
        ``num_replicas`` and ``rank``.
    """
    if trainer is not None:
        return trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
    if dist.is_available() and dist.is_initialized():
        return {"num_replicas": dist.get_world_size(), "rank": dist.get_rank()}
    return {"num_replicas": 1, "rank": 0}


class TrainSampler(DistributedSampler[Key]):
    """A random order that depends on (seed, epoch) alone; rank r of k takes its positions r, r + k, r + 2k, ...

    Every rank has the same number of batches. The last joint batch may be smaller, and its rows may not divide
    evenly; the ranks' gradients are then averaged as DDP does it, the mean of the ranks' means. Where it has fewer
    rows than there are ranks, the ranks without a row repeat one of its rows.

    Args:
        dataset: The training set, with a length.
        batch_size: Rows of this process's batch.
        seed: Seed of the order.
        num_replicas: Number of processes k.
        rank: Number of this process, in [0, k).
        order: The order of an epoch, such as :class:`ClassSampling`; None for a random
            permutation.

    Yields:
        Epoch and draw, see :data:`Key`.

    Example:
        >>> [index for _, index in TrainSampler(range(5), batch_size=2, seed=0)]
        [3, 2, 4, 0, 1]
        >>> [index for _, index in TrainSampler(range(5), batch_size=1, seed=0, num_replicas=2, rank=1)]
        [2, 0, 1]
    """

    first_batch: int
    """Batch at which the next iteration starts; 0 again afterwards."""

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        order: Order | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed)
        self.batch_size = batch_size
        self.order = order
        self.first_batch = 0

    def __len__(self) -> int:
        """Rows of this rank, at least one in every joint batch."""
        size, joint = len(self.dataset), self.num_replicas * self.batch_size  # type: ignore[arg-type]
        full_batches = (max(size, 1) - 1) // joint  # all but the last
        own = len(range(self.rank, size, self.num_replicas))
        return max(own, full_batches * self.batch_size + 1) if size else 0

    def __iter__(self) -> Iterator[Key]:
        """Yield (epoch, draw) from `first_batch` on."""
        first, self.first_batch = self.first_batch, 0
        epoch, size = self.epoch, len(self.dataset)  # type: ignore[arg-type]
        key = sample_seeds(self.seed, torch.tensor([epoch]), torch.tensor([-1]))  # -1: no sample has this seed
        generator = torch.Generator().manual_seed(int(key))
        order = self.order(epoch, generator) if self.order else torch.randperm(size, generator=generator)
        own = order[self.rank :: self.num_replicas]
        if len(own) < len(self):
            last = order[len(own) * self.num_replicas :]
            own = torch.cat([own, last[self.rank % len(last)].view(1)])
        return iter([(epoch, index) for index in own[first * self.batch_size :].tolist()])


class EvalSampler(DistributedSampler[int]):
    """In order and without repeats: rank r of k takes the samples r, r + k, r + 2k, ...; some rank may have none.

    Args:
        dataset: The evaluation set, with a length.
        num_replicas: Number of processes k.
        rank: Number of this process, in [0, k).

    Example:
        >>> list(EvalSampler(range(5), num_replicas=2, rank=1))
        [1, 3]
    """

    def __init__(self, dataset: Any, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False)

    def __len__(self) -> int:
        """Rows of this rank."""
        return len(self._indices())

    def __iter__(self) -> Iterator[int]:
        """Yield the indices."""
        return iter(self._indices())

    def _indices(self) -> range:
        return range(self.rank, len(self.dataset), self.num_replicas)  # type: ignore[arg-type]


class SeededSamples(Dataset[Any]):
    """A data set read by (epoch, draw), which hands out the samples and one seed for each.

    A data set that reads whole batches (``__getitems__``) is expected to be deterministic; what is random belongs into
    the ``collate_fn``. Any other data set is read sample by sample, each under its own seed of torch's default
    generator, so that torchvision's random transforms depend on (seed, epoch, draw) alone.

    Args:
        dataset: A map-style data set.
        seed: Seed of the run.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        source = dataset
        while isinstance(source, Subset):  # it has __getitems__ whether its data set has it or not
            source = source.dataset
        self._reads_batches = hasattr(source, "__getitems__")

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        """One sample of the data set as it is."""
        return self.dataset[index]

    def __getitems__(self, keys: Sequence[Key | int]) -> tuple[Any, Tensor]:
        """The samples, and their seeds, int64 (B,). A plain index is one of epoch 0."""
        pairs = torch.tensor([key if isinstance(key, tuple) else (0, key) for key in keys])
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
        collate: ``collate_fn`` of the samples. One with an argument ``seeds`` gets the samples' seeds, int64 (B,), as
            :class:`~datamodules.image_arrays.augmentation.BatchTransform` does. Any other one runs under the first
            sample's seed of torch's default generator.
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


class TrainLoader(DataLoader[Any]):
    """The loader that :func:`train_loader` makes: it knows its position and can start at any batch."""

    sampler: TrainSampler
    dataset: SeededSamples
    _handed_out: int = 0

    def __iter__(self) -> Any:
        """Yield the batches of the sampler's epoch; nothing is fetched before the first is asked for.

        Lightning makes the iterator before it calls ``set_epoch``. After a whole epoch the next one follows, with or
        without ``set_epoch``.
        """
        self._handed_out = getattr(self.sampler, "first_batch", 0)
        for batch in super().__iter__():
            self._handed_out += 1
            yield batch
        self._handed_out = 0
        if isinstance(self.sampler, TrainSampler):  # Lightning's overfit_batches puts another one in
            self.sampler.set_epoch(self.sampler.epoch + 1)

    def state_dict(self) -> dict[str, int]:
        """Seed, epoch, the number of batches of it that were handed out, and the rows of such a batch on all ranks."""
        return {
            "seed": self.dataset.seed,
            "epoch": getattr(self.sampler, "epoch", 0),
            "batch": self._handed_out,
            "joint_batch_size": self.joint_batch_size,
        }

    @property
    def joint_batch_size(self) -> int:
        """Rows of a batch of all ranks together."""
        return (self.batch_size or 1) * int(getattr(self.sampler, "num_replicas", 1))

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next iteration at the batch after those that were handed out.

        Raises:
            SettingError: amid an epoch, the batches are of another size than those that were handed out.
        """
        if state["batch"] > 0 and self.joint_batch_size != state["joint_batch_size"]:
            raise SettingError(
                f"batch_size makes batches of {self.joint_batch_size} rows on all processes together, and the "
                f"checkpoint is of an epoch with {state['joint_batch_size']}: keep that product, or go on from an "
                "epoch's end"
            )
        self.dataset.seed = self.sampler.seed = state["seed"]
        self.sampler.set_epoch(state["epoch"])
        self.sampler.first_batch = state["batch"]


class EvalLoader(DataLoader[Any]):
    """The loader that :func:`eval_loader` makes: as many batches on every rank, the last one empty where rows lack."""

    sampler: EvalSampler

    def __len__(self) -> int:
        """Number of batches of rank 0, which has the most: a forward under FSDP2 waits for all ranks."""
        replicas = getattr(self.sampler, "num_replicas", 1)
        if replicas == 1:
            return super().__len__()
        largest = -(-len(self.dataset) // replicas)  # type: ignore[arg-type]
        return -(-largest // (self.batch_size or 1))

    def __iter__(self) -> Any:
        """Yield the batches; where this rank has one less, the first sample's batch without its row at the end."""
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
        dataset: The training set: see :class:`SeededSamples` for what may be random in it.
        batch_size: Rows of this process's batch.
        collate_fn: See :class:`SeededCollate`; None for PyTorch's own.
        num_workers: Loader processes; with 0 the batches are made in the main process.
        seed: Seed of order and augmentation; None for that of Lightning's ``seed_everything``, or 0.
        num_replicas: Number of processes that share the data, see :func:`ranks`.
        rank: Number of this process.
        order: See :class:`TrainSampler`; None for a random permutation.

    Returns:
        The loader; ``set_epoch`` of its sampler is Lightning's to call.
    """
    seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
    return TrainLoader(
        SeededSamples(dataset, seed),
        batch_size=batch_size,  # by name, or Lightning cannot build the loader again
        sampler=TrainSampler(dataset, batch_size, seed, num_replicas, rank, order),
        collate_fn=SeededCollate(collate_fn or default_collate),  # type: ignore[arg-type]
        **_worker_settings(num_workers),
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

    Every rank has as many batches, one without a row where its share is shorter, so that sums over the ranks
    (torchmetrics) count every sample once and nobody waits for a rank that has nothing to say.

    Args:
        dataset: The validation, test or prediction set.
        batch_size: Rows of this process's batch.
        collate_fn: The loader's ``collate_fn``; None for PyTorch's own.
        num_workers: Loader processes; with 0 the batches are made in the main process.
        num_replicas: Number of processes that share the data, see :func:`ranks`.
        rank: Number of this process.
    """
    sampler = EvalSampler(dataset, num_replicas, rank)
    return EvalLoader(
        dataset, batch_size=batch_size, sampler=sampler, collate_fn=collate_fn, **_worker_settings(num_workers)
    )


def _worker_settings(num_workers: int) -> dict[str, Any]:
    return {
        "num_workers": num_workers,
        "pin_memory": torch.cuda.is_available(),
        "persistent_workers": num_workers > 0,
        "worker_init_fn": _outlive_signals,
        "generator": torch.Generator(),  # or starting the workers would draw from the default generator
    }


def _outlive_signals(worker: int) -> None:
    """SLURM and Ctrl-C signal workers too: they must last until the main process has saved, and end with it anyway."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
