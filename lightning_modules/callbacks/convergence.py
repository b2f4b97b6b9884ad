"""Whether the training loss was still falling when the training ended."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console


@dataclass(frozen=True)
class LossTrend:
    """The training loss over the last tenth of the epochs, beside the tenth before it.

    Attributes:
        epochs: epochs of each tenth.
        before: mean loss of the tenth before the last.
        last: mean loss of the last tenth.
        falling: whether the loss fell by more than 5 %, and by more than the epochs scatter.
    """

    epochs: int
    before: float
    last: float
    falling: bool

    def __str__(self) -> str:
        """One line for the user."""
        change = abs(self.before - self.last) / abs(self.before) if self.before else 0.0
        direction = "lower" if self.last <= self.before else "higher"
        spans = (
            "in the last epoch than in the one before"
            if self.epochs == 1
            else f"over the last {self.epochs} epochs than over the {self.epochs} before"
        )
        how_much = f"{self.last:.4g}, {100 * change:.1f} % {direction} {spans}"
        if self.falling:
            return f"training loss: still falling ({how_much}); more epochs may help"
        return f"training loss: no longer clearly falling ({how_much})"


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
        >>> print(loss_trend([1.0, 0.5, 0.5]))
        training loss: no longer clearly falling (0.5, 0.0 % lower in the last epoch than in the one before)
    """
    epochs = max(1, len(losses) // 10)
    last, before = losses[-epochs:], losses[-2 * epochs : -epochs]
    if len(before) < epochs or not all(map(math.isfinite, [*last, *before])):
        return None
    means = statistics.fmean(before), statistics.fmean(last)
    drop = means[0] - means[1]
    error = math.sqrt((statistics.variance(last) + statistics.variance(before)) / epochs) if epochs > 1 else 0.0
    return LossTrend(epochs, *means, falling=drop > max(0.05 * abs(means[0]), 2 * error))


class Convergence(Callback):
    """Say at the end of training whether the training loss was still falling.

    Reads the epoch's training loss that the module logs under its ``train_loss_name``, on every rank, since reading a
    metric may be a collective; rank zero prints. The losses are in the checkpoint, so that a resumed run judges by all
    of its epochs.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self._epoch_ended = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module logs its loss after this hook: it is read at the next one."""
        self._epoch_ended = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the loss of the epoch before."""
        self._take_loss(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line."""
        self._take_loss(trainer, pl_module)
        trend = loss_trend(self.losses)
        if trend is not None and trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            Console().print(str(trend), soft_wrap=True, highlight=False)

    def state_dict(self) -> dict[str, Any]:
        """The losses so far."""
        return {"losses": list(self.losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the losses of a checkpoint."""
        self.losses = list(state_dict["losses"])

    def _take_loss(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = trainer.callback_metrics.get(getattr(pl_module, "train_loss_name", "train/loss"))
        if self._epoch_ended and loss is not None:
            self.losses.append(float(loss))
        self._epoch_ended = False
