"""Schedules of rho, of the tail's stage and of the class weights.

All are set before a batch, from the epoch (and step) alone, so that a run may be resumed anywhere.
"""

import math
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from imbsam import SSESAM
from imbsam.checks import check_interval, check_numbers, check_whole_numbers
from imbsam.class_weights import effective_number_weights
from imbsam.errors import SettingError
from lightning_modules.epoch_log import log_epoch

__all__ = ["DeferredReweighting", "RhoSchedule", "TailStage"]


class RhoSchedule(Callback):
    """Change rho over the epochs, start perturbing late, or perturb only every n-th step. Logs ``rho`` once an epoch.

    The schedule starts from the method's own rho. With a cosine learning rate, ``cosine`` is the schedule of GSAM,
    whose rho falls with the learning rate (Zhuang et al., ICLR 2022, arXiv 2203.08065).

    Args:
        start_epoch: first epoch, from 0, with a perturbation; before it training is plain.
        end: rho in the last epoch; null keeps the method's rho.
        shape: how rho gets there from `start_epoch` on: linear in the epoch, or by half a cosine.
        every_n_steps: perturb only every n-th optimizer step, at a fraction of the cost.

    Raises:
        SettingError: a setting cannot work, or `end` is given and the run has no number of epochs.
    """

    def __init__(
        self,
        start_epoch: int = 0,
        end: float | None = None,
        shape: Literal["linear", "cosine"] = "linear",
        every_n_steps: int = 1,
    ) -> None:
        check_whole_numbers(0, start_epoch=start_epoch)
        check_whole_numbers(every_n_steps=every_n_steps)
        if end is not None:
            check_numbers(end=end)
        if shape not in ("linear", "cosine"):
            raise SettingError(f"shape is {shape!r}: choose linear or cosine")
        self.start_epoch, self.end, self.shape, self.every_n_steps = start_epoch, end, shape, every_n_steps
        self._rho = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the method's rho."""
        if self.end is not None and not _has_epochs(trainer):
            raise SettingError(
                f"RhoSchedule's end is {self.end} and trainer.max_epochs {trainer.max_epochs}: give the number of "
                "epochs, the schedule ends with the last"
            )
        sam: Any = pl_module.sam
        self._rho = sam.rho

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set rho; 0 at the steps between."""
        sam: Any = pl_module.sam
        skipped = trainer.global_step % self.every_n_steps
        sam.rho = 0.0 if skipped else self.rho_of(trainer.current_epoch, trainer.max_epochs)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log rho."""
        log_epoch(pl_module, {"rho": self.rho_of(trainer.current_epoch, trainer.max_epochs)})

    def rho_of(self, epoch: int, epochs: int | None) -> float:
        """Rho in an epoch, counted from 0, of a run of so many epochs."""
        if epoch < self.start_epoch:
            return 0.0
        if self.end is None:
            return self._rho
        assert epochs is not None
        done = (epoch - self.start_epoch) / max(1, epochs - 1 - self.start_epoch)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self._rho + (self.end - self._rho) * done


class TailStage(Callback):
    """The second stage of SSE-SAM: from a share of the epochs on only the tail is perturbed, which is ImbSAM.

    Args:
        start: the share of the epochs that come before it, their gamma.

    Raises:
        SettingError: `start` is outside [0, 1], the method is not ``SSESAM``, or the run has no number of epochs.

    Source:
        Lyu et al., *SSE-SAM*, AAAI 2025, arXiv 2412.13715; 0.7 is its authors' example for CIFAR-100-LT.
    """

    def __init__(self, start: float = 0.7) -> None:
        check_interval("[0, 1]", start=start)
        self.start = start
        self._first_stage: Tensor

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the radii of the first stage."""
        sam: Any = pl_module.sam
        if not isinstance(sam, SSESAM):
            raise SettingError(
                f"TailStage is the second stage of SSESAM and model.sam is {type(sam).__name__}: set model.sam to "
                "SSESAM, or leave the callback out"
            )
        if not _has_epochs(trainer):
            raise SettingError(
                f"TailStage's start is {self.start} and trainer.max_epochs {trainer.max_epochs}: it is a share of the "
                "epochs, so say how many there are"
            )
        self._first_stage = sam.radius

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the radii."""
        sam: Any = pl_module.sam
        assert trainer.max_epochs is not None
        first = math.ceil(self.start * trainer.max_epochs - 1e-9)  # 0.55 * 20 is a little above 11
        sam.radius = self._first_stage if trainer.current_epoch < first else [0.0, 1.0]


class DeferredReweighting(Callback):
    """Weight the classes' losses by their effective number of samples, from an epoch on (DRW).

    The mean weight of the training samples is 1. The weights multiply the method's ``tail_weight``, whatever the loss;
    the losses of validation and test are not weighted.

    Args:
        beta: 0.9999 is usual, see :func:`imbsam.class_weights.effective_number_weights`.
        start_epoch: first epoch, from 0, with the weights; LDAM-DRW starts after 0.8 of the epochs.

    Raises:
        SettingError: a setting is outside its range.

    Source:
        Cui et al., CVPR 2019, arXiv 1901.05555 (the weights); Cao et al., NeurIPS 2019, arXiv 1906.07413 (deferred).
    """

    def __init__(self, beta: float = 0.9999, start_epoch: int = 0) -> None:
        check_interval("[0, 1)", beta=beta)
        check_whole_numbers(0, start_epoch=start_epoch)
        self.beta, self.start_epoch = beta, start_epoch
        self._before: Tensor | None = None
        self._after: Tensor

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the weights."""
        module: Any = pl_module
        self._epoch: int | None = None
        self._before = module.sam.class_weight
        self._after = effective_number_weights(module.class_counts, self.beta)
        if self._before is not None:
            self._after = self._before * self._after
        trial = getattr(trainer, "fast_dev_run", False)
        if _has_epochs(trainer) and self.start_epoch >= (trainer.max_epochs or 0) and not trial:
            rank_zero_warn(
                f"DeferredReweighting's start_epoch is {self.start_epoch} and the run has {trainer.max_epochs} epochs: "
                "no loss is ever re-weighted; start earlier (LDAM-DRW: after 0.8 of the epochs)"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the weights at the first batch of an epoch, or of a run resumed mid-epoch."""
        if self._epoch != trainer.current_epoch:
            self._epoch = trainer.current_epoch
            sam: Any = pl_module.sam
            sam.class_weight = self._after if self._epoch >= self.start_epoch else self._before


def _has_epochs(trainer: Trainer) -> bool:
    """Whether the run ends after a number of epochs, and not only by steps or time."""
    return trainer.max_epochs is not None and trainer.max_epochs >= 0
