"""The DataModule of images in memory, which live on the GPU where they fit there."""

from abc import abstractmethod
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from datamodules.base.long_tailed import LongTailedDataModule
from datamodules.image_arrays.augmentation import BatchTransform
from datamodules.image_arrays.dataset import ImageArrays
from imbsam.errors import SettingError

HOST = torch.device("cpu")
GPU_SHARE = 0.1
"""With ``images_on_device="auto"``: the largest share of a GPU's free memory that the images may take."""


class ImageArraysDataModule(LongTailedDataModule):
    """Images in memory; a subclass reads them (:meth:`load_datasets`) and sets two :class:`BatchTransform` s.

    On a GPU the pixels lie in its memory as bytes, and a batch is made there: from the host come the indices, a few
    random numbers for each sample, and the targets. The main process does it without worker processes and without
    waiting for the GPU. The images are those of the other path.

    Args:
        images_on_device: Keep the pixels on the Trainer's device: true, false, or auto (on a GPU, if the images take at
            most a tenth of its free memory and no augmentation needs the CPU).
        **settings: The settings of :class:`~datamodules.LongTailedDataModule`.
    """

    def __init__(self, images_on_device: bool | Literal["auto"] = "auto", **settings: Any) -> None:
        super().__init__(**settings)
        if not isinstance(images_on_device, bool) and images_on_device != "auto":
            raise SettingError(f"images_on_device is {images_on_device!r}: choose true, false or auto")
        self.images_on_device = images_on_device
        self._chosen: dict[torch.device, torch.device] = {}

    @abstractmethod
    def load_datasets(self) -> tuple[ImageArrays, Tensor, ImageArrays]:
        """Read the whole data set and set ``class_names``.

        Returns:
            The training set before any subsampling, its labels, int64 (N,) in [0, C) or multi-label (N, C), and the
            test set.
        """

    def select(self, dataset: Any, indices: Tensor, training: bool) -> ImageArrays:
        """A copy of the images at these indices, int64 (M,)."""
        selected: ImageArrays = dataset.select(indices)
        return selected

    def setup(self, stage: str | None = None) -> None:
        """Draw the training and validation samples, see :class:`~datamodules.LongTailedDataModule`.

        Raises:
            SettingError: ``images_on_device`` is true with an augmentation that runs on the CPU.
        """
        super().setup(stage)
        if self.images_on_device is True and (augmentation := self._needs_host()):
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
            return part.to(self._chosen[device])
        except torch.OutOfMemoryError as error:
            raise SettingError(
                f"images_on_device is {str(self.images_on_device).lower()}, but {device} has no "
                f"{_gib(part.images.nbytes)} free for the images: set data.images_on_device to false"
            ) from error

    def _choose(self, device: torch.device) -> torch.device:
        """The device itself, or the host."""
        if self.images_on_device is True:
            return device
        if not self.images_on_device or device.type != "cuda" or self._needs_host():
            return HOST
        size, (free, _) = self._size(), torch.cuda.mem_get_info(device)
        if size <= GPU_SHARE * free:
            return device
        rank_zero_info(
            f"The images take {_gib(size)}, more than a tenth of the {_gib(free)} free on {device}, and stay in the "
            "CPU's memory; data.images_on_device=true puts them on the GPU."
        )
        return HOST

    def _size(self) -> int:
        """Bytes of all pixels."""
        parts = (self._train, self._val, self._test)
        return sum(part.images.nbytes for part in parts if isinstance(part, ImageArrays))

    def _needs_host(self) -> str:
        """The name of an augmentation that cannot run on a GPU, or nothing."""
        for collate in (self.train_collate, self.eval_collate):
            if not isinstance(collate, BatchTransform):
                return getattr(collate, "__name__", type(collate).__name__)
            if collate.policy is not None:
                return type(collate.policy).__name__
        return ""


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
