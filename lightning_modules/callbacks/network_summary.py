"""Model summary of the network alone, without metrics and FLOPs; what is trained of it."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichModelSummary

from lightning_modules.tuning.kinds import count_by_kind


class NetworkSummary(RichModelSummary):
    """Lightning's summary of the modules with parameters, without the column of FLOPs, which are not counted.

    If a part is frozen, a second table has the parameters by kind, trained and frozen.

    Args:
        max_depth: depth of the modules that are listed.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the tables."""
        super().on_fit_start(trainer, pl_module)
        network = getattr(pl_module, "backbone", None)
        if trainer.is_global_zero and self._max_depth and network is not None:
            counts = count_by_kind(network)
            if any(frozen for _, frozen in counts.values()):
                _print_kinds(counts)

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        """Print the table."""
        from rich import get_console
        from rich.table import Table

        columns = {name.strip(): values for name, values in summary_data}
        table = Table("network", "type", header_style="bold")
        table.add_column("parameters", justify="right")
        for name, kind, count in zip(columns["Name"], columns["Type"], columns["Params"], strict=True):
            if count.strip() not in ("0", "--"):
                table.add_row(name, kind, count)
        console = get_console()
        console.print(table)
        frozen = total_parameters - trainable_parameters
        console.print(f"{trainable_parameters:,} trained parameters, {frozen:,} frozen, {model_size:.3g} MB")


def _print_kinds(counts: dict[str, tuple[int, int]]) -> None:
    from rich import get_console
    from rich.table import Table

    table = Table("parameters", header_style="bold")
    table.add_column("trained", justify="right")
    table.add_column("frozen", justify="right")
    for kind, (trained, frozen) in counts.items():
        table.add_row(kind, f"{trained:,}", f"{frozen:,}")
    get_console().print(table)
