"""The setting `images_on_device`: whether a data set's images live on the Trainer's device."""

from abc import abstractmethod
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info

from datamodules.base.long_tailed import LongTailedDataModule
from imbsam.errors import SettingError

HOST = torch.device("cpu")
GPU_SHARE = 0.1
"""With ``images_on_device="auto"``: the largest share of a GPU's free memory that the images may take."""


class ImagesOnDeviceDataModule(LongTailedDataModule):
    """Images that may live on the Trainer's device, from which a GPU makes its batches without waiting for the host.

    A subclass says how they get there (:meth:`move`), how large they are and what keeps them on the CPU.

    Args:
        images_on_device: Keep the pixels on the Trainer's device: true, false, or auto (on a GPU, if the images take at
            most a tenth of its free memory and no augmentation needs the CPU).
        **settings: The settings of :class:`~datamodules.LongTailedDataModule`.

    Raises:
        SettingError: A setting is out of range.
    """

    def __init__(self, images_on_device: bool | Literal["auto"] = "auto", **settings: Any) -> None:
        super().__init__(**settings)
        if not isinstance(images_on_device, bool) and images_on_device != "auto":
            raise SettingError(f"images_on_device is {images_on_device!r}: choose true, false or auto")
        self.images_on_device = images_on_device
        self._chosen: dict[torch.device, torch.device] = {}

    @abstractmethod
    def move(self, part: Any, device: torch.device) -> Any:
        """A part of the data with its pixels on the device.

        Args:
            part: Training, validation or test samples, as ``setup`` has made them.
            device: The device, or the host where the setting, or the size with ``auto``, says so.
        """

    @abstractmethod
    def image_bytes(self) -> int:
        """Bytes of the pixels of all parts."""

    @abstractmethod
    def needs_host(self) -> str:
        """The name of an augmentation that cannot run on a GPU, or nothing."""

    def setup(self, stage: str | None = None) -> None:
        """Draw the training and validation samples, see :class:`~datamodules.LongTailedDataModule`.

        Raises:
            SettingError: ``images_on_device`` is true with an augmentation that runs on the CPU.
        """
        super().setup(stage)
        if self.images_on_device is True and (augmentation := self.needs_host()):
            raise SettingError(
                f"images_on_device is true, but {augmentation} runs on the CPU: set data.images_on_device to auto"
            )

    def _loaded(self, part: Any) -> Any:
        """A part of the data, on the device."""
        part = super()._loaded(part)
        device = self.trainer.strategy.root_device if self.trainer is not None else HOST
        if device not in self._chosen:
            self._chosen[device] = self._choose(device)
        try:
            return self.move(part, self._chosen[device])
        except torch.OutOfMemoryError as error:
            raise SettingError(
                f"images_on_device is {str(self.images_on_device).lower()}, but {device} has no "
                f"{_gib(self.image_bytes())} free for the images: set data.images_on_device to false"
            ) from error

    def _choose(self, device: torch.device) -> torch.device:
        """The device itself, or the host."""
        if self.images_on_device is True:
            return device
        if not self.images_on_device or device.type != "cuda" or self.needs_host():
            return HOST
        size, (free, _) = self.image_bytes(), torch.cuda.mem_get_info(device)
        if size <= GPU_SHARE * free:
            return device
        rank_zero_info(
            f"The images take {_gib(size)}, more than a tenth of the {_gib(free)} free on {device}, and are not "
            "kept there; data.images_on_device=true puts them there."
        )
        return HOST


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
