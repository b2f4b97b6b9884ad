"""The DataModule of images in memory, which live on the GPU where they fit there."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from datamodules.base.on_device import ImagesOnDeviceDataModule
from datamodules.image_arrays.augmentation import BatchTransform
from datamodules.image_arrays.dataset import ImageArrays


class ImageArraysDataModule(ImagesOnDeviceDataModule):
    """Images in memory; a subclass reads them (:meth:`load_datasets`) and sets two :class:`BatchTransform` s.

    On a GPU the pixels lie in its memory as bytes, and a batch is made there: from the host come the indices, a few
    random numbers for each sample, and the targets. The main process does it without worker processes and without
    waiting for the GPU. The images are those of the other path.

    Args:
        **settings: The settings of :class:`~datamodules.base.on_device.ImagesOnDeviceDataModule`.
    """

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

    def move(self, part: Any, device: torch.device) -> Any:
        """The part itself, with its pixels on the device."""
        return part.to(device)

    def image_bytes(self) -> int:
        """Bytes of the pixels of all parts."""
        parts = (self._train, self._val, self._test)
        return sum(part.images.nbytes for part in parts if isinstance(part, ImageArrays))

    def needs_host(self) -> str:
        """The name of an augmentation that cannot run on a GPU, or nothing."""
        for collate in (self.train_collate, self.eval_collate):
            if not isinstance(collate, BatchTransform):
                return getattr(collate, "__name__", type(collate).__name__)
            if collate.policy is not None:
                return type(collate.policy).__name__
        return ""
