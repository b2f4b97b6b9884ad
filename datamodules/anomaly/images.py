"""Anomaly detection on images as in the DeepSAD paper: one class is normal, all others are anomalies."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from datamodules.anomaly.base import SemiSupervisedDataModule
from datamodules.anomaly.batches import BatchLoader, in_order
from datamodules.base.long_tailed import LongTailedDataModule
from datamodules.base.pixels import PixelInput
from datamodules.image_arrays.cifar_lt import CIFAR10LTDataModule
from datamodules.image_arrays.dataset import ImageArrays
from datamodules.image_arrays.digits_lt import DigitsLTDataModule
from datamodules.sampling.stratified import held_out_mask
from imbsam.checks import check_choice, check_interval
from imbsam.errors import SettingError

Images = Literal["digits", "cifar10"]


class AnomalyImageDataModule(SemiSupervisedDataModule):
    """Images of one normal class, unlabelled and polluted with anomalies, and some labelled anomalies.

    All n training images of the normal class are unlabelled. Among them hide n p / (1 - p) anomalies of any class, a
    share p (``pollution``) of the unlabelled images. Added are (n + n p / (1 - p)) r / (1 - r) labelled anomalies of
    ``anomaly_classes``, a share r (``labelled_ratio``) of all training images. The test part is the whole test set,
    whose other classes are all anomalies (Ruff et al., Deep Semi-Supervised Anomaly Detection, ICLR 2020; p is its
    gamma_p, r its gamma_l). Both numbers are rounded, and no image is both labelled and hidden.

    Pixels are scaled to [0, 1], float32 (B, C, H, W), as in that paper, without the global contrast normalization of
    its predecessor Deep SVDD and without augmentation.

    Args:
        images: digits (scikit-learn's, (1, 8, 8)) or cifar10 ((3, 32, 32)).
        root: Folder that holds CIFAR-10; downloaded there if missing.
        normal_class: Index of the normal class.
        anomaly_classes: Classes of the labelled anomalies; null for all but the normal one. The paper has one.
        labelled_ratio: Labelled anomalies / training images, in (0, 1).
        pollution: Hidden anomalies / unlabelled images, in [0, 1).
        batch_size: Images, or pairs, in a training batch.
        eval_batch_size: Images in a validation, test or prediction batch.
        **settings: The settings of :class:`~datamodules.anomaly.base.SemiSupervisedDataModule`.

    Raises:
        SettingError: A setting is out of range, or there are fewer anomalies than it asks for.
    """

    def __init__(
        self,
        images: Images = "digits",
        root: str | Path = "data",
        normal_class: int = 0,
        anomaly_classes: Sequence[int] | None = None,
        labelled_ratio: float = 0.05,
        pollution: float = 0.1,
        batch_size: int = 128,
        eval_batch_size: int = 512,
        **settings: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, **settings)
        check_choice(Images, images=images)
        check_interval("(0, 1)", labelled_ratio=labelled_ratio)
        check_interval("[0, 1)", pollution=pollution)
        check_interval("[0, 9]", normal_class=normal_class)
        anomalies = [c for c in range(10) if c != normal_class] if anomaly_classes is None else list(anomaly_classes)
        if not anomalies or not set(anomalies) <= set(range(10)) - {normal_class}:
            raise SettingError(
                f"anomaly_classes is {anomalies}: give classes from 0 to 9 without normal_class, {normal_class}"
            )
        self.normal_class = normal_class
        self.anomaly_classes = anomalies
        self.labelled_ratio = labelled_ratio
        self.pollution = pollution
        self.white = 16 if images == "digits" else 255
        self.source: LongTailedDataModule = (
            DigitsLTDataModule() if images == "digits" else CIFAR10LTDataModule(root=root)
        )

    def prepare_data(self) -> None:
        """Download the images if they are missing.

        Raises:
            SettingError: They are missing and cannot be downloaded.
        """
        self.source.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Draw the training images, whatever the stage; a second call does nothing.

        Raises:
            SettingError: There are fewer anomalies than the settings ask for.
        """
        if self._test is not None:
            return
        train, classes, test = self.source.load_datasets()
        assert isinstance(train, ImageArrays)
        assert isinstance(test, ImageArrays)
        generator = torch.Generator().manual_seed(self.seed)
        indices, groups = self._draw(classes, generator)
        names = ["normal", "hidden anomaly", "labelled anomaly"]
        held_out = held_out_mask(groups, names, generator, val_share=self.val_share)
        kept = groups[~held_out]
        self.train_features = train.images[indices[~held_out]].float() / self.white
        self._set_labels(kept == 2)
        if self.val_share:
            held = groups[held_out]
            self._val = train.images[indices[held_out]].float() / self.white, (held > 0).long(), (held == 2).long()
        self._test = test.images.float() / self.white, (test.labels != self.normal_class).long()
        normal, hidden, labelled = torch.bincount(kept, minlength=3).tolist()
        rank_zero_info(
            f"normal class {self.source.class_names[self.normal_class]}: training {normal:,} normal images, "
            f"{hidden:,} hidden and {labelled:,} labelled anomalies; "
            f"test {len(test):,} images with {self._test[1].sum():,} anomalies"
        )

    @property
    def pixels(self) -> PixelInput:
        """Pixels are scaled to [0, 1]."""
        channels = self.train_features.shape[1]
        return PixelInput((0.0,) * channels, (float(self.white),) * channels)

    def predict_dataloader(self) -> BatchLoader:
        """The test images, without labels."""
        return in_order(self._loaded(self._test)[0], None, self.eval_batch_size)

    def _draw(self, classes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Indices of the training images and their group: 0 normal, 1 hidden anomaly, 2 labelled anomaly."""
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
        for name, drawn, wanted in (("labelled_ratio", labelled, labelled_count), ("pollution", hidden, hidden_count)):
            if len(drawn) < wanted:
                raise SettingError(
                    f"{name} is {getattr(self, name)}, which takes {wanted:,} anomalies, and there are {len(drawn):,}: "
                    "lower it"
                )
        parts = (normal, hidden, labelled)
        return torch.cat(parts), torch.repeat_interleave(torch.tensor([len(part) for part in parts]))
