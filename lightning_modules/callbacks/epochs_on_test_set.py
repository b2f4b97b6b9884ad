"""Test every epoch, to report the best epoch on the test set as some papers do."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from imbsam import SettingError
from imbsam.group_names import GROUPS
from imbsam.snapshot import RandomState

PREFIX = "epochs_on_test_set"
"""What the names in the log begin with; of ours only scripts/reproduce.py reads them."""


class EpochsOnTestSet(Callback):
    """Log the test accuracy after every training epoch, with and without the mirrored image.

    **An epoch chosen by these numbers is chosen on the test set: never compare methods by it.** They are here to set a
    run beside published numbers that were chosen so. They go to the loggers alone, as ``epochs_on_test_set/all``,
    ``epochs_on_test_set/mirrored_all`` and so on, and are no metrics of the Trainer: no checkpoint, early stopping or
    scheduler can monitor them. ``mirrored``: the logits of an image and its mirror image are averaged, as by
    ``flip_tta``.

    Costs two forward passes over the test set an epoch. The training is not changed by it, and the log of a resumed run
    has every epoch once. ``trainer.limit_test_batches`` applies. Where Lightning averages the weights
    (EMAWeightAveraging), the plain ones are tested.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a model that has no group accuracies."""
        if not hasattr(pl_module, "test_accuracy") or getattr(pl_module, "multi_label", False):
            raise SettingError(
                f"model is {type(pl_module).__name__}, which has no accuracy of class groups: EpochsOnTestSet needs a "
                "LongTailedClassifier"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test the weights as they are; every rank takes part."""
        module: Any = pl_module
        random_state = RandomState({module.device})  # a loader may draw a seed
        measures = {name: module.test_accuracy.clone() for name in ("", "mirrored_")}
        for accuracy in measures.values():
            accuracy.reset()
        module.sam.broadcast_buffers()
        modes = {part: part.training for part in module.modules()}  # a frozen layer is in eval mode while training
        module.eval()
        trainer.testing = True  # for the data's hooks, which may mix training images
        try:
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                for images, targets in _test_batches(trainer, module):
                    logits = module(images)
                    measures[""].update(logits, targets)
                    measures["mirrored_"].update((logits + module(images.flip(-1))) / 2, targets)
        finally:
            trainer.training = True
            for part, training in modes.items():
                part.training = training
            random_state.restore()
        values = {name: accuracy.compute() for name, accuracy in measures.items()}
        logged = {f"{PREFIX}/{name}{group}": float(values[name][group]) for name in values for group in GROUPS}
        for logger in trainer.loggers:
            logger.log_metrics({**logged, "epoch": trainer.current_epoch}, step=trainer.global_step)


def _test_batches(trainer: Trainer, module: Any) -> Iterator[Any]:
    """The test batches on the module's device."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    loader = data.test_dataloader()
    limit = trainer.limit_test_batches
    for batch in islice(loader, limit if isinstance(limit, int) else int(limit * len(loader))):
        batch = trainer.precision_plugin.convert_input(batch)
        yield trainer.strategy.batch_to_device(module._on_before_batch_transfer(batch, dataloader_idx=0))
