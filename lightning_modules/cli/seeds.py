"""One command, several seeds: `imbsam fit --config ... --seeds 0 1 2` trains once for each."""

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from imbsam import SettingError

FLAG = "--seeds"


def split_seeds(args: Sequence[str]) -> list[list[str]]:
    """The command line of each seed; the given one where it has no more than one seed.

    Args:
        args: command line, without the program.

    Raises:
        SettingError: no seed follows ``--seeds``, or one is given twice.
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
    """Set the one seed of this run in the settings: that of weights and order, and that of the data.

    Args:
        config: the parsed settings of `fit`.

    Raises:
        SettingError: the settings have more than one seed.
    """
    if not config.get("seeds"):
        return
    if len(config.seeds) > 1:
        raise SettingError(f"seeds is {config.seeds}: only imbsam fit, on its command line, takes more than one")
    (config.seed_everything,) = config.seeds
    if "seed" in config.data.get("init_args", {}):
        config.data.init_args.seed = config.seed_everything
    config.seeds = None  # config.yaml has the seeds where they belong


@contextmanager
def fresh_processes() -> Iterator[None]:
    """Leave nothing of a training's processes to the next: its group, and the variables that Lightning sets."""
    environment = dict(os.environ)
    try:
        yield
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)
