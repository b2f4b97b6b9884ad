"""Model summary of the network alone, without metrics and FLOPs."""

from typing import Any

from lightning.pytorch.callbacks import RichModelSummary


class NetworkSummary(RichModelSummary):
    """Lightning's summary of the modules with parameters, without the column of FLOPs, which are not counted.

    Args:
        max_depth: depth of the modules that are listed.
    """

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
