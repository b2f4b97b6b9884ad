"""What every DataModule here shares: settings that a checkpoint can hold."""

import os
from pathlib import Path
from typing import Any

from lightning import LightningDataModule


class RecordedDataModule(LightningDataModule):
    """Records paths as text: ``torch.load(weights_only=True)`` refuses a checkpoint that holds a ``Path``."""

    def _set_hparams(self, hp: Any) -> None:
        super()._set_hparams({name: _as_text(value) for name, value in hp.items()})

    def _loaded(self, part: Any) -> Any:
        """A part of the data that ``setup`` makes."""
        if part is None:
            raise RuntimeError(f"{type(self).__name__} has no data yet: call prepare_data() and setup() first.")
        return part


def _as_text(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_as_text(item) for item in value]
    return os.fspath(value) if isinstance(value, Path) else value
