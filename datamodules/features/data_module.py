"""Cached features as a data set."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base.long_tail import Profile
from datamodules.base.long_tailed import LongTailedDataModule
from datamodules.features.files import Features, read_features
from datamodules.sampling.sample_seeds import random_integers
from imbsam.errors import SettingError


class FeaturesDataModule(LongTailedDataModule):
    """Features that ``imbsam features`` computed by a frozen network: only its classifier is trained on them.

    Batches are features, float32 (B, d), and labels, int64 (B,). Where the file has augmented copies, training draws
    one of them each time it sees a sample; everything else sees the features without augmentation.

    Attributes:
        holds_features: Tells the model that its network has been applied already.
        description: What the features depend on: data, network, and a hash of its weights (``weights``); known after
            ``setup``.

    Args:
        path: The file.
        eval_batch_size: Samples in a validation, test or prediction batch.
        profile: ``none`` keeps every training sample of the file; ``exponential`` or ``step`` subsamples them to
            ``ratio``.
        **settings: The settings of :class:`~datamodules.LongTailedDataModule`; ``val_share`` is for a file without a
            validation part. No mixup and CutMix.

    Raises:
        SettingError: A setting is out of range, or the file cannot be read.
    """

    holds_features = True
    description: dict[str, Any]

    def __init__(
        self, path: str | Path, eval_batch_size: int = 4096, profile: Profile = "none", **settings: Any
    ) -> None:
        super().__init__(profile=profile, eval_batch_size=eval_batch_size, **settings)
        for name in ("mixup", "cutmix"):
            if value := getattr(self, name):
                raise SettingError(f"data.{name} is {value}: it mixes images, and these are features: leave it out")
        self.path = Path(path).expanduser()
        self.train_collate, self.eval_collate = _draw_copy, _without_augmentation
        self._val_features: FeatureArrays | None = None

    def load_datasets(self) -> tuple["FeatureArrays", Tensor, "FeatureArrays"]:
        """Read the file."""
        parts, self.description = read_features(self.path)
        self.class_names = self.description["class_names"]
        self.own_validation = "val" in parts
        if self.own_validation:
            self._val_features = FeatureArrays(parts["val"])
        return FeatureArrays(parts["train"]), parts["train"].labels, FeatureArrays(parts["test"])

    def validation_set(self) -> "FeatureArrays | None":
        """The file's validation part."""
        return self._val_features

    def setup(self, stage: str | None = None) -> None:
        """Read the file; many, medium and few are those of the data that the features are of.

        Args:
            stage: Lightning's stage; all do the same.
        """
        super().setup(stage)
        counts = self.description["group_counts"]
        if self.groups_of_ratio is None and counts is not None:
            self.group_counts = torch.tensor(counts)

    @property
    def used_preprocessing(self) -> dict[str, Any]:
        """Image size, mean and std of the images that the features are of; {} if they are not known."""
        found: dict[str, Any] = self.description.get("preprocessing") or {}
        return found

    @property
    def num_features(self) -> int:
        """Length d of a feature vector."""
        return int(self._loaded(self._test).part.features.shape[-1])


class FeatureArrays(Dataset[Any]):
    """One part of a file of features, read a whole batch at a time."""

    def __init__(self, part: Features) -> None:
        self.part = part

    def __len__(self) -> int:
        """Number of samples N."""
        return len(self.part.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One sample, float32 (1 + copies, d), and its label, int64 ()."""
        return self.part.features[index], self.part.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A batch, float32 (B, 1 + copies, d), and the labels, int64 (B,)."""
        batch = torch.tensor(indices, dtype=torch.int64)
        return self.part.features[batch], self.part.labels[batch]


def _draw_copy(batch: tuple[Tensor, Tensor], seeds: Tensor) -> tuple[Tensor, Tensor]:
    """One augmented copy of each sample, drawn by its seed."""
    features, labels = batch
    copies = features.shape[1] - 1
    if not copies:
        return features[:, 0], labels
    return features[torch.arange(len(labels)), 1 + random_integers(seeds, copies, draw=0)], labels


def _without_augmentation(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    features, labels = batch
    return features[:, 0], labels
