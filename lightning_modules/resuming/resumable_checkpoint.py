"""A run that may be killed at any moment and resumes bit-identically.

A checkpoint is written between two batches, when everything before it has been logged and nothing after it has begun:
before a batch, before an epoch, or after the last one. Lightning's own checkpoints are written inside its hooks, before
the last batch or epoch is in the log, and save neither the position in the data nor the random states.
"""

import signal
import time
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from weakref import proxy

import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torchmetrics import Metric

from imbsam import SettingError
from lightning_modules.resuming.checkpoint_files import LAST, AtomicCheckpointIO
from lightning_modules.resuming.csv_logger import ResumableCSVLogger
from lightning_modules.resuming.signals import Interrupted, StopSignals

KEY = "interruption"
"""Our part of a checkpoint."""

POSITION = ("seed", "epoch", "batch", "joint_batch_size")
"""The state of a :class:`PositionedLoader`."""

MAX_SHARE_OF_TIME = 0.05
"""Writing checkpoints takes at most this share of the time, even if `every_seconds` is short for a large model."""


@runtime_checkable
class PositionedLoader(Protocol):
    """A loader that can start at any batch of any epoch, such as :class:`datamodules.sampling.TrainLoader`."""

    @property
    def joint_batch_size(self) -> int:
        """Samples in a batch of all ranks together."""

    def state_dict(self) -> dict[str, int]:
        """Seed, epoch, batch and joint_batch_size."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from there."""


class ResumableCheckpoint(ModelCheckpoint):
    """ModelCheckpoint whose ``last.ckpt`` resumes the run bit-identically, and which stops on a signal.

    ``last.ckpt`` is written at the end of a batch or an epoch, `every_seconds` after the previous one, after the last
    epoch, and on SIGINT (Ctrl-C), SIGTERM or SIGUSR1; the training then ends with
    :class:`~lightning_modules.resuming.signals.Interrupted`. A second SIGINT ends it at once. The ``last.ckpt`` before
    it is kept as ``previous.ckpt``. With several processes a signal to any of them stops all of them, one batch later:
    every batch starts one small all-reduce on the CPU, whose result is read a batch later, so that no process waits.

    To resume bit-identically, the data must come from :func:`datamodules.sampling.train_loader`, or another
    :class:`PositionedLoader`.

    Args:
        every_seconds: Shortest time between two writes of ``last.ckpt``, so roughly the most work that a kill costs.
            For a model whose checkpoint takes long to write it is extended to 20 times that. 0 is every batch.
        every_n_steps: Also write ``last.ckpt`` after every n-th optimizer step.
        save_last: Keep ``last.ckpt``.
        save_top_k: How many of the best checkpoints to keep, by `monitor`; null: one if there is a metric to choose by.
            They are for testing; resume from the last.
        **kwargs: The other settings of ModelCheckpoint, for the best checkpoints. If `monitor` is null and the model
            has a ``selection_metric`` (val/all for the classifiers) and validates, that is monitored, and ``best.ckpt``
            is the checkpoint of the epoch with the highest value. Nothing is ever chosen on the test set.
    """

    def __init__(
        self,
        every_seconds: float = 60.0,
        every_n_steps: int | None = None,
        save_last: bool = True,
        save_top_k: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not every_seconds >= 0:
            raise SettingError(f"checkpoint.every_seconds is {every_seconds}: give a number from 0")
        if every_n_steps is not None and every_n_steps < 1:
            raise SettingError(f"checkpoint.every_n_steps is {every_n_steps}: give a whole number from 1, or null")
        self._monitor_from_model = save_top_k is None and kwargs.get("monitor") is None
        if save_top_k is None:
            save_top_k = 0 if self._monitor_from_model else 1
        super().__init__(save_last=None, save_top_k=save_top_k, **kwargs)  # we write last.ckpt
        self.best_epoch: int | None = None
        """Number of the epoch of the best checkpoint, from 1."""
        self.every_seconds = every_seconds
        self.every_n_steps = every_n_steps
        self.keep_last = save_last
        self.signals = StopSignals(deferred=True)
        self._resumed: dict[str, Any] | None = None
        self._position: tuple[int, int] | None = None
        self._group: Any = None
        self._pending: tuple[Any, Tensor] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write files atomically, and replace Lightning's signal handlers, which save or communicate mid-step."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        environment = trainer._accelerator_connector.cluster_environment  # public only in multi-device strategies
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        self._resumed, self._pending = None, None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print where the run resumes, or that it is finished; early stopping has decided by now."""
        if self._resumed is None or not trainer.is_global_zero:
            return
        epoch, batch = self._resumed["epoch"], self._resumed["batch"]
        if trainer.should_stop or _is_finished(trainer, epoch, self._resumed["step"]):
            print(f"imbsam: the run is finished: {epoch} epochs")
        else:
            print(f"imbsam: resuming at epoch {epoch}, batch {batch}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the data to the position of the checkpoint."""
        super().on_train_start(trainer, pl_module)
        if not getattr(trainer, "fast_dev_run", False):  # which saves nothing
            self.signals = StopSignals(deferred=True)
            self.signals.launcher = trainer.strategy.launcher
            self.signals.install()
        self._group = dist.new_group(backend="gloo") if trainer.world_size > 1 else None
        self._written, self._writing = time.monotonic(), 0.0
        if self._resumed:
            loaders = _train_loaders(trainer)
            for loader in loaders:
                loader.load_state_dict({name: self._resumed[name] for name in POSITION})
            if self._resumed["batch"] > 0 and not loaders:
                rank_zero_warn(
                    "the training data do not come from datamodules.sampling.train_loader: this epoch starts again "
                    "with its first batch, not with the one after the checkpoint"
                )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Between two epochs."""
        self._between_batches(trainer, pl_module, 0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Between two batches, unless micro-batches wait for the rest of their step."""
        progress = trainer.fit_loop.epoch_loop.batch_progress.total
        progress.ready = progress.completed + 1  # Lightning counts the batch before which we saved twice
        if batch_idx > 0 and getattr(pl_module, "between_steps", True):
            self._between_batches(trainer, pl_module, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Monitor the model's ``selection_metric``, once it has been logged."""
        metric, choose = getattr(pl_module, "selection_metric", None), self._monitor_from_model and not self.monitor
        if choose and metric in trainer.callback_metrics and not trainer.sanity_checking:
            self.monitor, self.mode, self.save_top_k = metric, "max", 1
            self.filename = self.filename or "best"
            self._enable_version_counter = False  # a run that was killed overwrites its best.ckpt
            if not self.best_k_models:  # a checkpoint may have restored it
                self.kth_value = torch.tensor(-torch.inf)
        super().on_validation_end(trainer, pl_module)

    def _update_best_and_save(self, current: Tensor, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Called by ModelCheckpoint for one of the best so far."""
        before = self.best_model_score
        super()._update_best_and_save(current, trainer, monitor_candidates)
        if self.best_model_score is not before:
            self.best_epoch = trainer.current_epoch + 1

    @property
    def state_key(self) -> str:
        """Independent of `monitor`, which is not known from the start."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """The state of ModelCheckpoint, and the best epoch."""
        return {**super().state_dict(), "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best so far."""
        super().load_state_dict(state_dict)
        self.best_epoch = state_dict.get("best_epoch")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the result of the last epoch."""
        if self.keep_last and not getattr(trainer, "fast_dev_run", False):
            self._write(trainer, 0)
        self.signals.remove()
        stop, _ = self._agree(trainer)
        if stop := stop or self._agree(trainer)[0]:  # the second call returns the result of the first
            raise self._interrupted(trainer, stop, 0)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back to the handlers before."""
        super().on_exception(trainer, pl_module, exception)
        self.signals.remove()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not save; every rank takes part."""
        if self._position is None:  # one of the best checkpoints
            return
        epoch, batch = self._position
        rank_states: list[Any] = [_rank_state(trainer, pl_module)]
        if self._group is not None:
            own, rank_states = rank_states[0], [None] * dist.get_world_size(self._group)
            dist.all_gather_object(rank_states, own, group=self._group)
        logs = [logger.experiment for logger in trainer.loggers if isinstance(logger, ResumableCSVLogger)]
        loaders = [loader.state_dict() for loader in _train_loaders(trainer)]
        checkpoint[KEY] = {
            **(loaders[0] if loaders else dict.fromkeys(POSITION, 0)),
            "epoch": epoch,
            "batch": batch,
            "log_rows": logs[0].sync() if logs and trainer.is_global_zero else None,
            "ranks": rank_states,
        }
        loops = checkpoint["loops"]["fit_loop"]
        loops["state_dict"].pop("combined_loader", None)  # one batch ahead: it has prefetched
        loops["epoch_loop.batch_progress"]["is_last_batch"] = False
        done = loops["epoch_loop.batch_progress"]["total"]["completed"]
        _set_counts(loops["epoch_loop.batch_progress"], total=done, current=batch)
        if batch == 0:
            ended = loops["epoch_progress"]
            _set_counts(ended, total=ended["total"]["completed"], current=ended["current"]["completed"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Prepare to resume."""
        if trainer.state.fn != "fit":
            return
        saved = checkpoint.get(KEY)
        if saved is None:
            self._resumed = None
            rank_zero_warn("the checkpoint is not a last.ckpt of imbsam: training resumes, but not bit-identically")
            return
        self._resumed = {**saved, "step": checkpoint["global_step"]}
        if len(saved["ranks"]) != trainer.world_size:
            rank_zero_warn(
                f"the checkpoint is of {len(saved['ranks'])} processes and this run has {trainer.world_size}: random "
                "numbers and the mean of train/loss will differ, so the run will not be bit-identical"
            )
        # where Lightning believes to be mid-epoch; in a finished run it does not enter the loop
        mid_epoch = saved["batch"] > 0 or trainer.max_steps != -1
        if mid_epoch and not _is_finished(trainer, saved["epoch"], checkpoint["global_step"]):
            loops = checkpoint["loops"]["fit_loop"]
            # the state in which it neither skips this batch, nor validates again, but counts one step too many
            loops["epoch_loop.batch_progress"]["total"]["ready"] += 1
            loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
        if trainer.is_global_zero and saved["log_rows"] is not None:
            for logger in trainer.loggers:
                if isinstance(logger, ResumableCSVLogger) and logger.resume:
                    logger.experiment.cut(saved["log_rows"])

    def _between_batches(self, trainer: Trainer, pl_module: LightningModule, batch: int) -> None:
        if self._resumed:  # not before: Lightning has drawn random numbers since the checkpoint was loaded
            states, self._resumed = self._resumed["ranks"], None
            if trainer.global_rank < len(states):
                _restore_rank_state(states[trainer.global_rank], trainer, pl_module)
        if getattr(trainer, "fast_dev_run", False):
            return
        stop, due = self._agree(trainer)
        if self.every_n_steps and trainer.global_step > 0:
            due = due or trainer.global_step % self.every_n_steps == 0
        if self.keep_last and (stop or due):
            self._write(trainer, batch)
        if stop:
            raise self._interrupted(trainer, stop, batch)

    def _agree(self, trainer: Trainer) -> tuple[int, bool]:
        """The signal that any rank received, or 0, and whether a checkpoint is due by the clock of rank 0."""
        wait = self.every_seconds and max(self.every_seconds, self._writing / MAX_SHARE_OF_TIME)
        due = trainer.is_global_zero and time.monotonic() - self._written >= wait
        if self._group is None:
            return self.signals.received, due
        news = torch.tensor([self.signals.received, int(due)])
        before, self._pending = self._pending, (dist.all_reduce(news, dist.ReduceOp.MAX, self._group, True), news)
        if before is None:
            return 0, False
        before[0].wait()
        return int(before[1][0]), bool(before[1][1])

    def _write(self, trainer: Trainer, batch: int) -> None:
        start = time.monotonic()
        path = Path(self.dirpath or "") / LAST
        self.last_model_path, self._position = str(path), (trainer.current_epoch, batch)
        try:
            trainer.save_checkpoint(path, weights_only=False)
        finally:
            self._position = None
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))  # as ModelCheckpoint does
        self._written = time.monotonic()
        self._writing = self._written - start

    def _interrupted(self, trainer: Trainer, stop: int, batch: int) -> Interrupted:
        unsaved = "nothing was saved (checkpoint.save_last is false)"
        after = "resume with --ckpt_path last" if self.keep_last else unsaved
        name = signal.Signals(stop).name
        message = f"interrupted by {name} after epoch {trainer.current_epoch}, batch {batch}; {after}"
        # a job that was told to end has obeyed; after Ctrl-C a script should not run its next line. Only rank 0 exits
        # with a code: Lightning kills it, whatever it is still doing, once another process has exited with one
        return Interrupted(message, 130 if stop == signal.SIGINT and trainer.is_global_zero else 0)


def _train_loaders(trainer: Trainer) -> list[PositionedLoader]:
    return [loader for loader in tree_leaves(trainer.train_dataloader) if isinstance(loader, PositionedLoader)]


def _is_finished(trainer: Trainer, epochs: int, steps: int) -> bool:
    """Whether a run that has trained for so long has no more to train."""
    return (trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epochs) or 0 <= trainer.max_steps <= steps


def _set_counts(progress: dict[str, Any], total: int, current: int) -> None:
    """Mark everything that was started as completed."""
    progress["total"].update(dict.fromkeys(progress["total"], total))
    progress["current"].update(dict.fromkeys(progress["current"], current))


def _rank_state(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """What differs between ranks: random states and partly updated metrics."""
    state: dict[str, Any] = {"random": {"cpu": torch.get_rng_state()}, "metrics": {}}
    if trainer.strategy.root_device.type == "cuda":
        state["random"]["cuda"] = torch.cuda.get_rng_state(trainer.strategy.root_device)
    for name, module in pl_module.named_modules():
        if isinstance(module, Metric):
            state["metrics"][name] = tree_map_only(Tensor, lambda t: t.detach().cpu().clone(), module.metric_state)
    return state


def _restore_rank_state(state: dict[str, Any], trainer: Trainer, pl_module: LightningModule) -> None:
    torch.set_rng_state(state["random"]["cpu"])
    if trainer.strategy.root_device.type == "cuda" and "cuda" in state["random"]:
        torch.cuda.set_rng_state(state["random"]["cuda"], trainer.strategy.root_device)
    for name, module in pl_module.named_modules():
        if isinstance(module, Metric) and name in state["metrics"]:
            values = tree_map_only(Tensor, lambda t, device=module.device: t.to(device), state["metrics"][name])  # type: ignore[misc]
            for key, value in values.items():
                setattr(module, key, value)
