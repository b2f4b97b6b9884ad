"""How a number of a whole epoch gets into the log where several processes run."""

from collections.abc import Mapping

from lightning.pytorch import LightningModule
from torch import Tensor


def log_epoch(module: LightningModule, values: Mapping[str, float | Tensor], prog_bar: bool = False) -> None:
    """Log numbers that are equal on all ranks already, so that nothing is left to reduce.

    ``log(..., sync_dist=True)`` reduces when somebody first looks at the value, and rank 0 looks more often than the
    others: its progress bar does so before the module's ``on_train_epoch_end``, in which all ranks reduce something
    else. Then each waits for the other for ever. So whatever must be reduced is reduced before it is logged, by all
    ranks, where the code says so.

    Args:
        module: the module, in a hook that ends an epoch.
        values: the numbers by name; equal on all ranks.
        prog_bar: show them in the progress bar too.
    """
    # rank_zero_only leaves the value as it is, on every rank; without sync_dist Lightning would advise it
    module.log_dict(values, prog_bar=prog_bar, batch_size=1, sync_dist=True, rank_zero_only=True)  # type: ignore[arg-type]
