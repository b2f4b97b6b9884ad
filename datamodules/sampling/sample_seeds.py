"""Random numbers that depend on (seed, epoch, sample) alone, for a whole batch of samples at once.

Nothing here keeps state, so an augmented image is the same in any worker, on any number of processes, and in a
resumed run.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15


def sample_seeds(seed: int, epochs: Tensor, indices: Tensor) -> Tensor:
    """One seed for every sample.

    Args:
        seed: Seed of the run.
        epochs: Epoch of each sample, int64 (B,).
        indices: Index of each sample in its data set, int64 (B,).

    Returns:
        Seeds, int64 (B,), over the whole range of int64.

    Source:
        The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) after each of the three numbers.
    """
    run = _mix(np.full(len(indices), (seed + _GOLDEN) % 2**64, dtype=np.uint64))
    mixed = _mix(_mix(run + _unsigned(epochs)) + _unsigned(indices))
    return torch.from_numpy(mixed.view(np.int64))


def random_integers(seeds: Tensor, high: int, draw: int) -> Tensor:
    """One integer for every sample, each value equally likely.

    Args:
        seeds: Seeds of the samples, int64 (B,).
        high: The integers are in [0, high); at most 2**31.
        draw: Number of the draw, from 0; two draws of one sample are independent.

    Returns:
        Integers, int64 (B,).
    """
    bits = _mix(_unsigned(seeds) + np.uint64((draw + 1) * _GOLDEN % 2**64))
    return torch.from_numpy((bits >> np.uint64(33)).astype(np.int64) % high)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's default CPU generator with any 64-bit integer inside the block, and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):  # no GPU's generator
        torch.default_generator.manual_seed(seed)
        yield


def _unsigned(numbers: Tensor) -> Any:
    return numbers.numpy().view(np.uint64)


def _mix(x: Any) -> Any:
    """SplitMix64's finalizer on uint64 (B,)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
