"""Sharpness of many, medium, few and all during a run."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from imbsam import SettingError
from imbsam.checks import check_whole_numbers
from imbsam.distributed import fsdp_modules
from imbsam.sharpness import SharpnessMeasures
from imbsam.snapshot import RandomState
from lightning_modules.group_sharpness import GroupSamples, Split


class GroupSharpness(Callback):
    """Measure the sharpness of the many, medium, few and all classes at the end of training, and every n epochs.

    Logs ``sharpness/<group>/<measure>`` and appends to ``sharpness.csv`` in the run's folder. The run itself is not
    changed: weights, buffers, modes, gradients and torch's random generators are as before. The measures are those of
    :class:`imbsam.sharpness.SharpnessMeasures`, of the training loss without ``tail_weight`` and weight decay, in the
    weights' own precision. With several devices the first one measures and the others wait.

    Args:
        every_n_epochs: measure after every n epochs too; default: at the end of training only.
        split: the training samples (without augmentation), or the test set.
        samples: at most this many samples of a group, drawn with the seed.
        chunk_size: samples of one backward pass; lower it where memory is short. It does not change the numbers.
        **settings: those of :class:`imbsam.sharpness.SharpnessMeasures`.

    Raises:
        SettingError: a setting is outside its range.
    """

    def __init__(
        self,
        every_n_epochs: int | None = None,
        split: Split = "train",
        samples: int = 1000,
        chunk_size: int = 128,
        **settings: Any,
    ) -> None:
        if every_n_epochs is not None:
            check_whole_numbers(every_n_epochs=every_n_epochs)
        check_whole_numbers(samples=samples, chunk_size=chunk_size)
        self.every_n_epochs = every_n_epochs
        self.split: Split = split
        self.samples = samples
        self.chunk_size = chunk_size
        self.measures = SharpnessMeasures(**settings)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse FSDP2, whose forward waits for all ranks, before the training."""
        if fsdp_modules(list(pl_module.modules())):
            raise SettingError("GroupSharpness cannot measure a model sharded by FSDP2: leave the callback out")
        if self.split == "test" and trainer.world_size > 1:  # each rank's loader has only its share
            raise SettingError("split is test: with several processes only the training samples can be measured")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, every n epochs."""
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the last weights, unless they were measured after the last epoch."""
        if not (self.every_n_epochs and trainer.current_epoch % self.every_n_epochs == 0):  # counted on already
            self._measure(trainer, pl_module)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = trainer.log_dir or trainer.default_root_dir  # every rank takes part in log_dir
        if not trainer.is_global_zero:
            return
        random_state = RandomState({pl_module.device})  # a loader draws a seed
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        data = GroupSamples(pl_module, datamodule, self.split, self.samples, self.chunk_size, self.measures.seed)
        progress: Any = trainer.fit_loop.epoch_progress.current
        epoch = progress.processed
        show = trainer.progress_bar_callback is not None
        results = data.measure(self.measures, epoch, Path(folder), f"after {epoch} epochs", show)
        random_state.restore()
        values = {f"sharpness/{g}/{m}": e.value for g, measured in results.items() for m, e in measured.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
