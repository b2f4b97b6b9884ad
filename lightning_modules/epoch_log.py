"""Logging the metrics of an epoch with several processes."""

from collections.abc import Mapping

from lightning.pytorch import LightningModule
from torch import Tensor


def log_epoch(module: LightningModule, values: Mapping[str, float | Tensor], prog_bar: bool = False) -> None:
    """Log values that are already equal on all ranks, so that Lightning has nothing to reduce.

    ``log(..., sync_dist=True)`` reduces when a value is first read, and rank 0 reads more often than the others: its
    progress bar does so before the module's ``on_train_epoch_end``, in which all ranks reduce something else. Then they
    wait for each other forever. So all ranks reduce what must be reduced before it is logged, at an explicit place.

    Args:
        module: the module, in a hook at the end of an epoch.
        values: the values by name; equal on all ranks.
        prog_bar: show them in the progress bar too.
    """
    # rank_zero_only leaves the value unchanged on every rank; without sync_dist Lightning would recommend it
    module.log_dict(values, prog_bar=prog_bar, batch_size=1, sync_dist=True, rank_zero_only=True)  # type: ignore[arg-type]
