"""Whether the training loss was still falling when the training ended."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console


class LossTrend(NamedTuple):
    """Whether the loss fell by more than 5 %, and by more than it scatters from epoch to epoch; and a line about it."""

    falling: bool
    text: str


def loss_trend(losses: Sequence[float]) -> LossTrend | None:
    """Compare the last tenth of the epochs with the tenth before it.

    Noise is no trend: the drop must also exceed twice the standard error of the difference of the two means, which a
    steady fall does by far.

    Args:
        losses: training loss of each epoch.

    Returns:
        None for fewer than two epochs, or where one of the losses compared is not finite.

    Example:
        >>> loss_trend([1 / epoch for epoch in range(1, 11)]).falling
        True
        >>> print(loss_trend([1.0, 0.5, 0.5]).text)
        training loss: no longer clearly falling (0.5, 0.0 % lower in the last epoch than in the one before)
    """
    epochs = max(1, len(losses) // 10)
    last, before = losses[-epochs:], losses[-2 * epochs : -epochs]
    if len(before) < epochs or not all(map(math.isfinite, [*last, *before])):
        return None
    mean, mean_before = statistics.fmean(last), statistics.fmean(before)
    drop, size = mean_before - mean, abs(mean_before)
    error = math.sqrt((statistics.variance(last) + statistics.variance(before)) / epochs) if epochs > 1 else 0.0
    falling = drop > max(0.05 * size, 2 * error)
    spans = f"over the last {epochs} epochs than over the {epochs} before"
    spans = "in the last epoch than in the one before" if epochs == 1 else spans
    change = f"{100 * abs(drop) / (size or 1):.1f} % {'lower' if drop >= 0 else 'higher'} {spans}"
    verdict, advice = ("still falling", "; more epochs may help") if falling else ("no longer clearly falling", "")
    return LossTrend(falling, f"training loss: {verdict} ({mean:.4g}, {change}){advice}")


class Convergence(Callback):
    """Say at the end of training whether the training loss was still falling.

    Reads the epoch's training loss that the module logs under its ``train_loss_name``, on every rank, since reading a
    metric may be a collective; rank zero prints. The losses are in the checkpoint, so that a resumed run is judged by
    all of its epochs. Nothing is said of a model that ends by itself, such as boosting: its loss
    falls with every tree.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the loss of the previous epoch: the module logs it after the callbacks' ``on_train_epoch_end``."""
        self._take_loss(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line."""
        self._take_loss(trainer, pl_module)
        trend = None if getattr(pl_module, "ends_by_itself", False) else loss_trend(self.losses)
        if trend is not None and trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            Console().print(trend.text, soft_wrap=True, highlight=False)

    def state_dict(self) -> dict[str, Any]:
        """The losses so far."""
        return {"losses": list(self.losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume with the losses of a checkpoint."""
        self.losses = list(state_dict["losses"])

    def _take_loss(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = trainer.callback_metrics.get(getattr(pl_module, "train_loss_name", "train/loss"))
        if loss is not None and len(self.losses) < trainer.current_epoch:  # not again where an epoch was cut short
            self.losses.append(float(loss))
