"""Random numbers that depend on (seed, epoch, sample) alone, for a whole batch of samples at once.

Nothing here keeps state, so an augmented image is the same in any worker, on any number of processes, and in a
resumed run.
"""

import contextlib
from collections.abc import Iterator

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
    run = _mix(torch.full_like(indices, _signed(seed + _GOLDEN)))
    return _mix(_mix(run + epochs) + indices)


def random_integers(seeds: Tensor, high: int, draw: int) -> Tensor:
    """One integer for every sample, each value equally likely.

    Args:
        seeds: Seeds of the samples, int64 (B,).
        high: The integers are in [0, high); at most 2**31.
        draw: Number of the draw, from 0; two draws of one sample are independent.

    Returns:
        Integers, int64 (B,).
    """
    bits = _mix(seeds + _signed((draw + 1) * _GOLDEN))
    return (bits >> 33 & 2**31 - 1) % high


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's default CPU generator with any 64-bit integer inside the block, and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):  # no GPU's generator
        torch.default_generator.manual_seed(seed)
        yield


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer on int64 (B,)."""
    x = (x ^ _logical_shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _logical_shift(x, 27)) * _signed(0x94D049BB133111EB)
    mixed: Tensor = x ^ _logical_shift(x, 31)
    return mixed


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    """Shift zeros in from the left; torch's own shift repeats the sign."""
    shifted: Tensor = (x >> bits) & (2 ** (64 - bits) - 1)
    return shifted


def _signed(number: int) -> int:
    """The number modulo 2**64 as a signed integer."""
    return (number + 2**63) % 2**64 - 2**63
