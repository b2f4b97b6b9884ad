"""`imbsam check`: what a training would see of its data, without the training."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from rich.console import Console
from torch import Tensor

from imbsam import SettingError
from lightning_modules.class_table import print_class_table
from lightning_modules.sharpness import SharpnessTrainer

SHOWN = 20
"""Unreadable files that are named."""


class DataCheckTrainer(SharpnessTrainer):
    """The Trainer of the command line: Lightning's, with `sharpness` and `check`."""

    def check(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Load the data, print the classes and what a batch looks like, and look for files that cannot be read.

        Training, validation and test samples are read once, those that are left out of a long tail are not. Nothing is
        trained and nothing is written.

        Args:
            model: the model, which says what is many, medium, few and tail; its network is not built.
            datamodule: the data.

        Raises:
            SettingError: the data cannot be loaded, or files cannot be read.
        """
        connector: Any = self._data_connector
        connector.attach_datamodule(model, datamodule)
        model.trainer = self
        datamodule.prepare_data()
        datamodule.setup("fit")
        model.setup("fit")
        if hasattr(model, "test_accuracy"):
            print_class_table(model)
        else:
            data: Any = datamodule
            counts = zip(data.class_names, torch.as_tensor(data.class_counts).tolist(), strict=True)
            _say("training samples: " + ", ".join(f"{count:,} {name}" for name, count in counts))
        find_unreadable = getattr(datamodule, "unreadable_files", None)
        unreadable: dict[str, str] = find_unreadable() if find_unreadable else {}
        for path, reason in list(unreadable.items())[:SHOWN]:
            _say(f"{path}: {reason}")
        if len(unreadable) > SHOWN:
            _say(f"… and {len(unreadable) - SHOWN:,} more")
        if unreadable:
            files = "1 file" if len(unreadable) == 1 else f"{len(unreadable):,} files"
            raise SettingError(f"{files} cannot be read: fix or remove them, or set data.corrupt_images to skip")
        for part, name in (("training", "train"), ("validation", "val"), ("test", "test")):
            loader = getattr(datamodule, f"{name}_dataloader")()
            _say(f"{part}: {_describe(loader, read_all=find_unreadable is None)}")
        _say("the data can be read")


def _describe(loader: Any, read_all: bool) -> str:
    """Number of batches and what the first one holds."""
    batches = iter(loader)
    first = next(batches, None)
    for _ in batches if read_all else ():
        pass
    if first is None:
        return "none"
    tensors = first if isinstance(first, (list, tuple)) else [first]
    kinds = [f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in tensors if isinstance(t, Tensor)]
    number = f"{len(loader):,} batches, " if hasattr(loader, "__len__") else ""
    return f"{number}the first one {', '.join(kinds)}"


def _say(line: str) -> None:
    Console().print(line, soft_wrap=True, highlight=False, markup=False)
