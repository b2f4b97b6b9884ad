"""One command, several seeds: `imbsam fit --config ... --seeds 0 1 2` trains once for each."""

import gc
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from imbsam import SettingError

FLAG = "--seeds"


def split_seeds(args: Sequence[str]) -> list[list[str]]:
    """The command line of each seed, or the given one if it has no ``--seeds``.

    Args:
        args: command line, without the program.

    Raises:
        SettingError: ``--seeds`` has no value, or has one twice.
    """
    if args[:1] != ["fit"] or FLAG not in args:
        return [list(args)]
    at = args.index(FLAG) + 1
    seeds = list(itertools.takewhile(str.isdigit, args[at:]))
    if not seeds:
        raise SettingError("seeds is empty: give whole numbers from 0, for example --seeds 0 1 2")
    if len(set(map(int, seeds))) < len(seeds):
        raise SettingError(f"seeds is {' '.join(seeds)}: name each seed once")
    return [[*args[:at], seed, *args[at + len(seeds) :]] for seed in seeds]


def apply_seed(config: Any) -> None:
    """Apply ``--seeds``: seed the weights and the order of the samples, and the data.

    Args:
        config: the parsed settings of `fit`.

    Raises:
        SettingError: the settings have more than one seed.
    """
    if not config.get("seeds"):
        return
    if len(config.seeds) > 1:
        raise SettingError(f"seeds is {config.seeds}: give several seeds only to imbsam fit, on its command line")
    (config.seed_everything,) = config.seeds
    if "seed" in config.data.get("init_args", {}):
        config.data.init_args.seed = config.seed_everything
    config.seeds = None  # config.yaml has it in seed_everything and data.seed


@contextmanager
def fresh_processes() -> Iterator[None]:
    """Clean up between trainings: the process group with its store, and the environment variables that Lightning sets.

    While something refers to the group, its store answers at MASTER_PORT, also the processes of the next training, with
    the addresses of this one's.
    """
    environment = dict(os.environ)
    try:
        yield
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()  # the network refers to the group, and to itself
        os.environ.clear()
        os.environ.update(environment)
