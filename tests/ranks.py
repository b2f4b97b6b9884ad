"""A function run in several processes that are one gloo process group."""

import os
import sys
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., None], ranks: int, *args: Any) -> None:
    """Call `function(rank, *args)` in each of `ranks` processes; an exception in one is raised here."""
    with TemporaryDirectory() as folder:
        mp.spawn(_run, args=(function, ranks, f"file://{folder}/rendezvous", *args), nprocs=ranks)


def _run(rank: int, function: Callable[..., None], ranks: int, rendezvous: str, *args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks)
    function(rank, *args)
    dist.destroy_process_group()
    # DistributedDataParallel keeps the group's threads alive, and one that still drops a tensor while Python shuts down
    # aborts the process: leave without the shutdown
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
