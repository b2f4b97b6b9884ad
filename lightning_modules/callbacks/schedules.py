"""What changes in the course of a training: the length of the perturbation, and the class weights."""

import math
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from imbsam.class_weights import check_beta, effective_number_weights
from imbsam.errors import SettingError
from lightning_modules.epoch_log import log_epoch

__all__ = ["DeferredReweighting", "RhoSchedule"]


class _ByEpoch(Callback):
    """Sets what goes by the epoch, from the epoch alone, so that a run may be resumed anywhere."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with what belongs to this moment: a run may be resumed mid-epoch."""
        self.start_epoch_of(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set what belongs to the epoch."""
        self.start_epoch_of(trainer, pl_module)

    def start_epoch_of(self, trainer: Trainer, pl_module: Any) -> None:
        """Set what belongs to ``trainer.current_epoch``."""
        raise NotImplementedError


class RhoSchedule(_ByEpoch):
    """Perturb from an epoch on, with a length that changes, or only at every n-th step. Logs ``rho`` once an epoch.

    The length starts from the method's own rho. With a cosine learning rate, ``cosine`` is the schedule of GSAM, whose
    rho falls with the learning rate (Zhuang et al., ICLR 2022, arXiv 2203.08065).

    Args:
        start_epoch: first epoch, from 0, with a perturbation; before it training is plain.
        end: length of the perturbation in the last epoch; null keeps the method's rho.
        shape: how it gets there from `start_epoch` on: linear in the epoch, or by half a cosine.
        every_n_steps: perturb only at every n-th optimizer step, for a fraction of the cost.

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
        if start_epoch < 0:
            raise SettingError(f"start_epoch is {start_epoch}: give a number from 0")
        if end is not None and not 0 <= end < math.inf:
            raise SettingError(f"end is {end}: give a finite number from 0")
        if shape not in ("linear", "cosine"):
            raise SettingError(f"shape is {shape!r}: choose linear or cosine")
        if every_n_steps < 1:
            raise SettingError(f"every_n_steps is {every_n_steps}: give a number from 1")
        self.start_epoch, self.end, self.shape, self.every_n_steps = start_epoch, end, shape, every_n_steps
        self._rho = self._rho_of_epoch = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the method's rho."""
        if self.end is not None and not _has_epochs(trainer):
            raise SettingError(
                f"RhoSchedule's end is {self.end} and trainer.max_epochs {trainer.max_epochs}: the schedule ends with "
                "the last epoch, so say how many there are"
            )
        sam: Any = pl_module.sam
        self._rho = sam.rho

    def start_epoch_of(self, trainer: Trainer, pl_module: Any) -> None:
        """Set the length."""
        pl_module.sam.rho = self._rho_of_epoch = self.rho_of(trainer.current_epoch, trainer.max_epochs)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Leave the perturbation out at the other steps."""
        if self.every_n_steps > 1:
            sam: Any = pl_module.sam
            sam.rho = 0.0 if trainer.global_step % self.every_n_steps else self._rho_of_epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the length."""
        log_epoch(pl_module, {"rho": self._rho_of_epoch})

    def rho_of(self, epoch: int, epochs: int | None) -> float:
        """The length in an epoch, from 0, of so many."""
        if epoch < self.start_epoch:
            return 0.0
        if self.end is None:
            return self._rho
        assert epochs is not None
        done = (epoch - self.start_epoch) / max(1, epochs - 1 - self.start_epoch)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self._rho + (self.end - self._rho) * done


class DeferredReweighting(_ByEpoch):
    """Weigh the classes' losses by their effective number of samples, from an epoch on (DRW).

    The mean weight of the training samples is 1. The weights multiply the method's ``tail_weight``, whatever the loss;
    the losses of validation and test are not weighted.

    Args:
        beta: 0.9999 is usual, see :func:`imbsam.class_weights.effective_number_weights`.
        start_epoch: first epoch, from 0, with the weights; LDAM-DRW begins after 0.8 of the epochs.

    Raises:
        SettingError: a setting is outside its range.

    Source:
        Cui et al., CVPR 2019, arXiv 1901.05555 (the weights); Cao et al., NeurIPS 2019, arXiv 1906.07413 (deferred).
    """

    def __init__(self, beta: float = 0.9999, start_epoch: int = 0) -> None:
        check_beta(beta)
        if start_epoch < 0:
            raise SettingError(f"start_epoch is {start_epoch}: give a number from 0")
        self.beta, self.start_epoch = beta, start_epoch
        self._before: Tensor | None = None
        self._weights: Tensor

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the weights."""
        module: Any = pl_module
        self._before, self._weights = (
            module.sam.class_weight,
            effective_number_weights(module.class_counts, self.beta),
        )
        if _has_epochs(trainer) and self.start_epoch >= (trainer.max_epochs or 0) and not _is_a_trial(trainer):
            rank_zero_warn(
                f"DeferredReweighting's start_epoch is {self.start_epoch} and the run has {trainer.max_epochs} epochs: "
                "no loss is ever re-weighted; begin earlier (LDAM-DRW: after 0.8 of the epochs)"
            )

    def start_epoch_of(self, trainer: Trainer, pl_module: Any) -> None:
        """Set the weights."""
        weight = self._before
        if trainer.current_epoch >= self.start_epoch:
            weight = self._weights if weight is None else weight * self._weights
        pl_module.sam.class_weight = weight


def _has_epochs(trainer: Trainer) -> bool:
    """Whether the run ends after a number of epochs, and not only by steps or time."""
    return trainer.max_epochs is not None and trainer.max_epochs >= 0


def _is_a_trial(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))
