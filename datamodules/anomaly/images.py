"""Anomaly detection on images as in the DeepSAD paper: one class is normal, all others are anomalies."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from datamodules.anomaly.base import SemiSupervisedDataModule, check_share
from datamodules.anomaly.batches import BatchLoader, Sampling, ordered_batches
from datamodules.base.long_tailed import LongTailedDataModule
from datamodules.image_arrays.cifar_lt import CIFAR10LTDataModule
from datamodules.image_arrays.dataset import ImageArrays
from datamodules.image_arrays.digits_lt import DigitsLTDataModule
from datamodules.sampling.stratified import validation_mask
from imbsam.errors import SettingError

Images = Literal["digits", "cifar10"]


class AnomalyImageDataModule(SemiSupervisedDataModule):
    """Images of one normal class, unlabelled and polluted with anomalies, and some labelled anomalies.

    All n training images of the normal class are unlabelled. Among them hide anomalies of any class, a share p
    (``pollution``) of the unlabelled images: n p / (1 - p). To them come labelled anomalies of ``anomaly_classes``, a
    share r (``labelled_ratio``) of all training images: (n + n p / (1 - p)) r / (1 - r). The test part is the whole
    test set, whose other classes are all anomalies (Ruff et al., Deep Semi-Supervised Anomaly Detection, ICLR 2020;
    p is its gamma_p, r its gamma_l). Both numbers are rounded, and no image is both labelled and hidden.

    Pixels are scaled to [0, 1], float32 (B, C, H, W), as in that paper: no global contrast normalisation (of its
    predecessor Deep SVDD), no augmentation.

    Args:
        images: digits (scikit-learn's, (1, 8, 8)) or cifar10 ((3, 32, 32)).
        root: Folder that holds CIFAR-10; downloaded there if missing.
        normal_class: Index of the normal class.
        anomaly_classes: Classes that the labelled anomalies are of; null for all but the normal one. The paper has one.
        labelled_ratio: Labelled anomalies / training images, in (0, 1).
        pollution: Hidden anomalies / unlabelled images, in [0, 1).
        val_share: Share of the training images, hidden and labelled ones alike, to hold out for validation, in [0, 1).
        sampling: How training images are drawn: natural, balanced, pairs or natural_pairs.
        batch_size: Images, or pairs, of a training batch.
        batches_per_epoch: Training batches of an epoch, or null for as many as the training images fill.
        eval_batch_size: Images of a validation, test or prediction batch.
        seed: Seed of every draw.

    Raises:
        SettingError: A setting is outside its range, or there are fewer anomalies than it asks for.
    """

    def __init__(
        self,
        images: Images = "digits",
        root: str | Path = "data",
        normal_class: int = 0,
        anomaly_classes: Sequence[int] | None = None,
        labelled_ratio: float = 0.05,
        pollution: float = 0.1,
        val_share: float = 0.0,
        sampling: Sampling = "natural",
        batch_size: int = 128,
        batches_per_epoch: int | None = None,
        eval_batch_size: int = 512,
        seed: int = 0,
    ) -> None:
        root = os.fspath(root)  # checkpoints refuse a Path
        anomaly_classes = None if anomaly_classes is None else list(anomaly_classes)
        super().__init__(sampling, batch_size, batches_per_epoch, eval_batch_size, val_share, seed)
        if images not in get_args(Images):
            raise SettingError(f"images={images!r} is unknown: choose one of {', '.join(get_args(Images))}")
        if not 0 < labelled_ratio < 1:
            raise SettingError(f"labelled_ratio={labelled_ratio} is outside (0, 1)")
        check_share("pollution", pollution, zero_allowed=True)
        classes = [normal_class, *(anomaly_classes or [])]
        if outside := [c for c in classes if not 0 <= c < 10]:
            raise SettingError(f"normal_class or anomaly_classes is {outside[0]}: {images} has the classes 0 to 9")
        if anomaly_classes is not None and (normal_class in anomaly_classes or not anomaly_classes):
            raise SettingError(
                f"anomaly_classes={anomaly_classes}: name one class or more, and not the normal one, {normal_class}"
            )
        self.normal_class = normal_class
        self.anomaly_classes = anomaly_classes or [c for c in range(10) if c != normal_class]
        self.labelled_ratio = labelled_ratio
        self.pollution = pollution
        self.white = 16 if images == "digits" else 255
        self.source: LongTailedDataModule = (
            DigitsLTDataModule() if images == "digits" else CIFAR10LTDataModule(root=root)
        )

    def prepare_data(self) -> None:
        """Download the images where they are missing.

        Raises:
            SettingError: They are missing and cannot be downloaded.
        """
        self.source.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Draw the training images; a second call does nothing.

        Args:
            stage: Lightning's stage; all of them do the same.

        Raises:
            SettingError: There are fewer anomalies than the settings ask for.
        """
        if self._test is not None:
            return
        train, classes, test = self.source.load_datasets()
        assert isinstance(train, ImageArrays)
        assert isinstance(test, ImageArrays)
        generator = torch.Generator().manual_seed(self.seed)
        rows, groups = self._draw(classes, generator)
        held_out = validation_mask(groups, ["normal", "hidden anomaly", "labelled anomaly"], self.val_share, generator)
        kept = groups[~held_out]
        self.train_features = self._pixels(train, rows[~held_out])
        self._learn_labels(kept == 2)
        if self.val_share:
            held = groups[held_out]
            self._val = self._pixels(train, rows[held_out]), (held > 0).long(), (held == 2).long()
        self._test = self._pixels(test, slice(None)), (test.labels != self.normal_class).long()
        normal, hidden, labelled = torch.bincount(kept, minlength=3).tolist()
        rank_zero_info(
            f"normal class {self.source.class_names[self.normal_class]}: training {normal:,} normal images, "
            f"{hidden:,} hidden and {labelled:,} labelled anomalies; "
            f"test {len(test):,} images with {self._test[1].sum():,} anomalies"
        )

    def predict_dataloader(self) -> BatchLoader:
        """The test images, without labels."""
        self._check_set_up()
        assert self._test is not None
        return ordered_batches(self._test[0], None, self.eval_batch_size)

    def _draw(self, classes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows of the training images and their group: 0 normal, 1 hidden anomaly, 2 labelled anomaly."""
        shuffled = torch.randperm(len(classes), generator=generator)
        shuffled_classes = classes[shuffled]
        normal = shuffled[shuffled_classes == self.normal_class]
        hidden_count = round(len(normal) * self.pollution / (1 - self.pollution))
        unlabelled = len(normal) + hidden_count
        labelled_count = max(1, round(unlabelled * self.labelled_ratio / (1 - self.labelled_ratio)))
        known = shuffled[torch.isin(shuffled_classes, torch.tensor(self.anomaly_classes))]
        labelled = known[:labelled_count]
        others = shuffled[(shuffled_classes != self.normal_class) & ~torch.isin(shuffled, labelled)]
        # in a new order: the front of the old one lacks the labelled images' classes
        hidden = others[torch.randperm(len(others), generator=generator)[:hidden_count]]
        for name, value, drawn, wanted in (
            ("labelled_ratio", self.labelled_ratio, labelled, labelled_count),
            ("pollution", self.pollution, hidden, hidden_count),
        ):
            if len(drawn) < wanted:
                raise SettingError(
                    f"{name}={value} asks for {wanted:,} anomalies and there are {len(drawn):,}: lower it"
                )
        parts = (normal, hidden, labelled)
        return torch.cat(parts), torch.repeat_interleave(torch.tensor([len(part) for part in parts]))

    def _pixels(self, arrays: ImageArrays, rows: Tensor | slice) -> Tensor:
        return arrays.images[rows].float() / self.white
