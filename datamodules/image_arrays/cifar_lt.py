"""CIFAR-10-LT and CIFAR-100-LT."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms import v2

from datamodules.base.preprocessing import Preprocessing, PreprocessingSettings
from datamodules.image_arrays.augmentation import BatchTransform
from datamodules.image_arrays.base import ImageArraysDataModule
from datamodules.image_arrays.cifar_files import fetch_cifar, read_cifar
from datamodules.image_arrays.dataset import ImageArrays
from datamodules.image_arrays.packed_images import read_packed
from datamodules.image_files.dataset import ImageFiles, ReadableImages
from datamodules.image_files.images_to_predict import images_to_predict
from datamodules.sampling.loaders import EvalLoader, eval_loader
from datamodules.sampling.samplers import ranks
from imbsam.errors import SettingError

SIZE = 32
"""Side of the images in pixels."""


class CIFAR10LTDataModule(ImageArraysDataModule):
    """CIFAR-10, images of (3, 32, 32), with a long-tailed training part; class 0 is the most frequent.

    Args:
        root: Folder that holds ``cifar-10-batches-py`` (CIFAR-100: ``cifar-100-python``), torchvision's layout;
            downloaded there if missing. Or a packed file, ``.npz``, with the images of one long-tailed split
            (``scripts/reproduce.py pack`` makes it).
        augment: Pad each training image with 4 black pixels and crop it at random, and flip half of them left to right.
        autoaugment: After that, AutoAugment with its policy for CIFAR-10 on each training image.
        predict: Images to predict, see :func:`~datamodules.image_files.images_to_predict.images_to_predict`, of any
            size (the shorter side is resized to 32 pixels, and the central 32 are taken). Null for the test images.
        image_size: Resize to this side after the augmentation; null for that of a pretrained model, or 32.
        mean: Mean of each channel, in [0, 1]; null for that of a pretrained model, or the training images'.
        std: Standard deviation of each channel, the same.
        **settings: The settings of :class:`~datamodules.image_arrays.base.ImageArraysDataModule`.
    """

    source: type[CIFAR10] = CIFAR10
    num_classes: int = 10
    mean: tuple[float, ...] = (125.31, 122.95, 113.87)  # of the 50,000 training images
    std: tuple[float, ...] = (62.99, 62.09, 66.70)
    train_collate: BatchTransform
    eval_collate: BatchTransform

    def __init__(
        self,
        root: str | Path = "data",
        augment: bool = True,
        autoaugment: bool = False,
        predict: list[str] | str | Path | None = None,
        image_size: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.predict = predict
        self.root = Path(root).expanduser()
        own = Preprocessing(SIZE, tuple(v / 255 for v in self.mean), tuple(v / 255 for v in self.std))
        self._preprocessing = PreprocessingSettings(image_size, mean, std, own)
        self.train_collate = BatchTransform(self.mean, self.std, 4 * augment, flip=augment, autoaugment=autoaugment)
        self.eval_collate = BatchTransform(self.mean, self.std)
        if (image_size, mean, std) != (None, None, None):
            self.use_preprocessing()

    def use_preprocessing(self, **of_model: Any) -> None:
        """Take over a pretrained model's image size, mean and std where no setting says.

        Args:
            **of_model: ``image_size``, ``mean`` and ``std``, as far as they are known.
        """
        found = self._preprocessing.resolve(**of_model)
        mean, std = ([255 * value for value in values] for values in (found.mean, found.std))
        for transform in (self.train_collate, self.eval_collate):
            transform.set_input(mean, std, found.image_size)

    @property
    def used_preprocessing(self) -> dict[str, Any]:
        """Image size, mean and std that the images have, for the checkpoint."""
        return asdict(self._preprocessing.used)

    def prepare_data(self) -> None:
        """Download the data set to ``root`` if its folder is missing.

        Raises:
            SettingError: It is missing and cannot be downloaded.
        """
        if self.root.suffix != ".npz" and not self.only_predicts:
            fetch_cifar(self.root, self.source)

    def load_datasets(self) -> tuple[ImageArrays, Tensor, ImageArrays]:
        """Read the files, whatever their checksums, and set ``class_names``.

        Raises:
            SettingError: A file is missing or damaged.
        """
        packed = self.root.suffix == ".npz"
        train, test, self.class_names = read_packed(self.root) if packed else read_cifar(self.root, self.source)
        if packed and len(self.class_names) != self.num_classes:
            raise SettingError(
                f"data.root is {self.root}, which has {len(self.class_names)} classes, and {self.source.__name__} has "
                f"{self.num_classes}: give a file packed from {self.source.__name__}"
            )
        return train, train.labels, test

    def predict_dataloader(self) -> EvalLoader:
        """The images of ``predict`` with their paths, or the test images again."""
        if self.predict is None:
            return super().predict_dataloader()
        root, listed = images_to_predict(self.predict)
        pixels = [v2.Resize(SIZE), v2.CenterCrop(SIZE), v2.PILToTensor(), v2.ToDtype(torch.float32)]
        transform = v2.Compose([*pixels, self.eval_collate.normalize])
        images = ImageFiles(root, listed.paths, listed.labels, [], transform, with_paths=True)
        collate = ReadableImages(self.eval_collate.image_size or SIZE, with_paths=True)
        return eval_loader(images, self.eval_batch_size, collate, self.num_workers, **ranks(self.trainer))


class CIFAR100LTDataModule(CIFAR10LTDataModule):
    """CIFAR-100, images of (3, 32, 32), with a long-tailed training part; class 0 is the most frequent.

    The settings are those of :class:`CIFAR10LTDataModule`.
    """

    source = CIFAR100
    num_classes = 100
    mean = (129.30, 124.07, 112.43)
    std = (68.17, 65.39, 70.42)
