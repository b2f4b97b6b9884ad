"""The settings, checks and loaders that all data sets of image files share."""

import os
from abc import abstractmethod
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from datamodules.base.long_tail import Profile
from datamodules.base.on_device import HOST, ImagesOnDeviceDataModule
from datamodules.base.pixels import PixelInput
from datamodules.base.preprocessing import Preprocessing, PreprocessingSettings
from datamodules.image_files.augmentation import Augment, ImageTransform
from datamodules.image_files.dataset import CorruptImages, ImageFiles, ReadableImages
from datamodules.image_files.decoded import DecodedImages, decoded_bytes
from datamodules.image_files.disk import check_files
from datamodules.image_files.images_to_predict import images_to_predict
from datamodules.image_files.lists import ImageSplits, ListedImages, check_classes
from datamodules.sampling.loaders import EvalLoader, eval_loader
from datamodules.sampling.samplers import ranks


class ImageFilesDataModule(ImagesOnDeviceDataModule):
    """Images in files, decoded by worker processes; a subclass says which files there are (:meth:`read_splits`).

    If all images fit on the GPU (``images_on_device``), they are decoded once, before the first epoch, and cropped
    there; ``predict`` reads files all the same.

    Batches are images, float32 (B, 3, S, S), and labels, int64 (B,); those of ``predict`` have a list of B paths too.

    Args:
        root: Folder that the images' paths are relative to.
        image_size: Side S of the network's input in pixels; null for that of a pretrained model, or 224.
        mean: Mean of each channel, in [0, 1]; null for that of a pretrained model, or ImageNet's.
        std: Standard deviation of each channel, the same.
        augment: Of training images: none, standard (random resized crop and flip), or randaugment or autoaugment on
            top of standard.
        color_jitter: Jitter brightness, contrast and saturation of training images by this factor, in [0, 1].
        corrupt_images: What a damaged image does: fail, or skip (warn, train on another image of its class in its
            place, and evaluate without it).
        eval_batch_size: Images in a validation, test or prediction batch.
        predict: Images without labels to predict: a file, a folder, a list of them, or a .txt, .csv, .tsv or .parquet
            file that lists paths, see :func:`~datamodules.image_files.images_to_predict.images_to_predict`. The
            training data are then not read and need not be there. Null for the test images.
        num_workers: Loader processes, or null for one a core, at most 8; with 0 the images are decoded in the main
            process.
        profile: ``none`` keeps every training image; ``exponential`` or ``step`` subsamples them to ``ratio``.
        **settings: The settings of :class:`~datamodules.base.on_device.ImagesOnDeviceDataModule`.

    Attributes:
        advice: Where to get the files.
        path_column: Column of the paths in a list of images to predict.

    Raises:
        SettingError: A setting is out of range.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # ImageNet's, which pretrained weights expect
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    advice: str = ""
    path_column: str = "path"
    eval_collate: ReadableImages

    def __init__(
        self,
        root: str | Path,
        image_size: int | None = None,
        augment: Augment = "standard",
        color_jitter: float = 0.0,
        corrupt_images: CorruptImages = "fail",
        eval_batch_size: int = 128,
        predict: list[str] | str | Path | None = None,
        num_workers: int | None = None,
        profile: Profile = "none",
        mean: list[float] | None = None,
        std: list[float] | None = None,
        **settings: Any,
    ) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        super().__init__(
            profile=profile,
            eval_batch_size=eval_batch_size,
            num_workers=min(8, cores) if num_workers is None else num_workers,
            **settings,
        )
        self.root = Path(root).expanduser()
        self.predict = predict
        self._preprocessing = PreprocessingSettings(image_size, mean, std, Preprocessing(224, self.mean, self.std))
        own = self._preprocessing.used
        self.image_size, self.mean, self.std = own.image_size, own.mean, own.std
        self.corrupt_images = corrupt_images
        self.train_transform = ImageTransform(augment, self.image_size, color_jitter, self.mean, self.std)
        self.eval_transform = ImageTransform("none", self.image_size, 0, self.mean, self.std)
        self.eval_collate = ReadableImages(self.image_size)
        self._checked = False
        self._reported: dict[str, int] = {}
        self._decoded: dict[tuple[int, torch.device], DecodedImages] = {}

    @abstractmethod
    def read_splits(self) -> ImageSplits:
        """Read which images there are; called once."""

    def use_preprocessing(self, **of_model: Any) -> None:
        """Take over a pretrained model's image size, mean and std where no setting says, before the loaders are made.

        Args:
            **of_model: ``image_size``, ``mean`` and ``std``, as far as they are known.
        """
        found = self._preprocessing.resolve(**of_model)
        self.image_size, self.mean, self.std = found.image_size, found.mean, found.std
        for transform in (self.train_transform, self.eval_transform):  # the data sets that setup has made have them
            transform.set_input(found.image_size, found.mean, found.std)
        self.eval_collate.image_size = found.image_size

    @property
    def used_preprocessing(self) -> dict[str, Any]:
        """Image size, mean and std that the images have, for the checkpoint."""
        return asdict(self._preprocessing.used)

    @cached_property
    def splits(self) -> ImageSplits:
        """The lists of images, with their labels checked."""
        splits = self.read_splits()
        self.check_splits(splits)
        self.own_validation = splits.val is not None
        self.check_validation()
        return splits

    def check_splits(self, splits: ImageSplits) -> None:
        """Check the labels against the classes."""
        check_classes(splits)

    def prepare_data(self) -> None:
        """Look for every listed file, once a run, on one process per node.

        Raises:
            SettingError: A list or files are missing, or a label has no class.
        """
        if self._checked or self.only_predicts:
            return
        number = check_files(self.root, self.splits.parts(), self.advice)
        rank_zero_info(f"{type(self).__name__}: all {number:,} images are in {self.root}")
        train, *others = self.splits.parts()
        for part in others:
            if len(shared := np.intersect1d(train.paths, part.paths)):
                rank_zero_warn(
                    f"{len(shared):,} images are in {train.source} and in {part.source}, such as "
                    f"{os.fsdecode(shared[0])}: the model is evaluated on images that it was trained on"
                )
        self._checked = True

    def load_datasets(self) -> tuple[ImageFiles, Tensor, ImageFiles]:
        """The images by their paths, and ``class_names``."""
        self.class_names = self.splits.class_names
        train = self._files(self.splits.train)
        return train, train.labels, self._files(self.splits.test)

    def validation_set(self) -> ImageFiles | None:
        """The data set's own validation images."""
        return self._files(self.splits.val) if self.splits.val is not None else None

    def select(self, dataset: Any, indices: Tensor, training: bool) -> ImageFiles:
        """Some of the images, augmented for training, without an index in Python objects."""
        selected: ImageFiles = dataset.select(indices)
        return replace(selected, transform=self.train_transform, replace_damaged=True) if training else selected

    def move(self, part: Any, device: torch.device) -> Any:
        """The files, or with ``images_on_device`` their images on the device, decoded at the first call."""
        if self.images_on_device is not True and device == HOST:
            return part
        key = id(part), device
        if key not in self._decoded:
            self._decoded[key] = DecodedImages.of(part, device, self.num_workers)
        return self._decoded[key]

    def image_bytes(self) -> int:
        """Bytes of all images when decoded, estimated."""
        parts = (self._train, self._val, self._test)
        return sum(decoded_bytes(part) for part in parts if isinstance(part, ImageFiles))

    def needs_host(self) -> str:
        """The name of an augmentation that cannot run on a GPU, or nothing."""
        if self.train_collate is not None:
            return getattr(self.train_collate, "__name__", type(self.train_collate).__name__)
        return self.train_transform.needs_host()

    @property
    def pixels(self) -> PixelInput:
        """The normalization, and how an image is resized."""
        resize, *_, normalize = self.eval_transform.steps.transforms
        mean, std = (tuple(255 * value for value in values) for values in (normalize.mean, normalize.std))
        return PixelInput(mean, std, shorter_side=resize.size[0])

    def train_eval_dataloader(self) -> EvalLoader:
        """All training samples in order and without augmentation, on every process, for measurements on them."""
        return self._in_order(replace(self._loaded(self._train), transform=self.eval_transform))

    def predict_dataloader(self) -> EvalLoader:
        """The images of ``predict``, or the test images again, with their paths."""
        if self.predict is None:
            files = super(ImagesOnDeviceDataModule, self)._loaded(self._test)  # which have the paths
            images = replace(files, with_paths=True)
        else:
            root, listed = images_to_predict(self.predict, self.path_column)
            images = replace(self._files(listed), root=root, with_paths=True)
        collate = ReadableImages(self.image_size, with_paths=True)
        workers = 0 if len(images) <= self.eval_batch_size else self.num_workers
        return eval_loader(images, self.eval_batch_size, collate, workers, **ranks(self.trainer))

    def unreadable_files(self) -> dict[str, str]:
        """Decode every training, validation and test image once; call ``setup`` first.

        Returns:
            The path of each image that cannot be read, and why.
        """
        reasons: dict[str, str] = {}
        for images in (self._train, self._val, self._test):
            if isinstance(images, ImageFiles):
                reasons |= images.unreadable(self.num_workers)
        return reasons

    def teardown(self, stage: str) -> None:
        """Report how many damaged images this process has met, if more than at the last report."""
        for name, images, what in (
            ("training", self._train, "replaced by others of their classes"),
            ("validation", self._val, "left out"),
            ("test", self._test, "left out"),
        ):
            number = int(images.damaged.sum()) if isinstance(images, ImageFiles) else 0
            if number > self._reported.get(name, 0):
                rank = self.trainer.global_rank if self.trainer is not None else 0
                print(f"corrupt_images=skip: {name} images {what}: {number:,} (rank {rank})")
                self._reported[name] = number

    def _files(self, images: ListedImages) -> ImageFiles:
        names = getattr(self, "class_names", [])
        return ImageFiles(self.root, images.paths, images.labels, names, self.eval_transform, self.corrupt_images)
