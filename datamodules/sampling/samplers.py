"""Which samples a process sees, in which order, as a function of (seed, epoch) alone.

k processes with batch size b together see the batches that one process with batch size k * b sees. The samplers are
``DistributedSampler`` s, which Lightning leaves in place, whatever ``use_distributed_sampler`` is.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DistributedSampler

from datamodules.sampling.sample_seeds import sample_seeds

Key = tuple[int, int]
"""What the training sampler yields: the epoch, so that it reaches the workers, and the draw, which is the sample's
index, plus the number of samples for every earlier time that this epoch has drawn it."""

Order = Callable[[int, torch.Generator], Tensor]
"""From an epoch and a generator to the epoch's draws, int64 (N,)."""


def ranks(trainer: Any = None) -> dict[str, int]:
    """How many processes share the data, ``num_replicas``, and which one this is, ``rank``.

    Args:
        trainer: A Lightning trainer (it knows which processes hold other data), or None to ask torch.distributed.
    """
    if trainer is not None:
        return trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
    if dist.is_available() and dist.is_initialized():
        return {"num_replicas": dist.get_world_size(), "rank": dist.get_rank()}
    return {"num_replicas": 1, "rank": 0}


class TrainSampler(DistributedSampler[Key]):
    """A random order that depends on (seed, epoch) alone; rank r of k takes its positions r, r + k, r + 2k, ...

    Every rank has the same number of batches. The last joint batch may be smaller, and its samples may not divide
    evenly; the ranks' gradients are then averaged as in DDP, the mean of the ranks' means. If it has fewer samples
    than there are ranks, the ranks without one repeat one of its samples.

    Args:
        dataset: The training set, with a length.
        batch_size: Samples in a batch of this process.
        seed: Seed of the order.
        num_replicas: Number of processes k.
        rank: Number of this process, in [0, k).
        order: The order of an epoch, such as :class:`ClassSampling`; None for a random permutation.

    Attributes:
        first_batch: Batch at which the next iteration starts; 0 again afterwards.

    Example:
        >>> [index for _, index in TrainSampler(range(5), batch_size=2, seed=0)]
        [3, 2, 4, 0, 1]
        >>> [index for _, index in TrainSampler(range(5), batch_size=1, seed=0, num_replicas=2, rank=1)]
        [2, 0, 1]
    """

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
        """Samples of this rank, at least one in every joint batch."""
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
        self.indices = range(rank, len(dataset), num_replicas)

    def __len__(self) -> int:
        """Samples of this rank."""
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        """Yield the indices."""
        return iter(self.indices)
