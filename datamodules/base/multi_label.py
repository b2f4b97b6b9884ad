"""The settings, splits and counts that all multi-label data sets share."""

import warnings
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from datamodules.base.long_tail import Profile
from datamodules.base.long_tailed import LongTailedDataModule
from datamodules.sampling.stratified import held_out_mask
from imbsam.errors import SettingError
from imbsam.messages import first_few

AS_THEY_ARE = {"profile": "none", "sampling": "instance_balanced", "mixup": 0, "cutmix": 0, "groups_of_ratio": None}
"""Settings that are for samples of one class each, and the only value that multi-label data can have."""


class MultiLabelDataModule(LongTailedDataModule):
    """A data set whose samples have any number of classes, from none to all.

    Batches are ``(inputs, labels)`` with int64 labels of shape (B, C), 1 where a sample has a class, else 0. A subclass
    returns such labels, (N, C), from ``load_datasets``, and data sets with an attribute ``labels`` from
    ``validation_set``. Every sample is drawn once an epoch. The validation split takes the same share of the samples
    whose rarest class is j, for every j.

    Attributes:
        class_counts: Training samples that have each class, after the validation split, int64 (C,); known after
            ``setup``.
        label_counts: Of every class the training samples without it, and those with it, int64 (C, 2).

    Args:
        profile: ``none``; multi-label data are not cut down to a ratio.
        **settings: The settings of :class:`~datamodules.LongTailedDataModule`.

    Raises:
        SettingError: A setting is out of range, or for samples of one class each.
    """

    label_counts: Tensor

    def __init__(self, profile: Profile = "none", **settings: Any) -> None:
        super().__init__(profile=profile, **settings)
        for name, only in AS_THEY_ARE.items():
            if (value := getattr(self, name)) != only:
                raise SettingError(
                    f"{name} is {value!r}: multi-label data are taken as they are, since a sample has several classes: "
                    "leave it out"
                )

    def setup(self, stage: str | None = None) -> None:
        """Draw the validation samples, the same ones on every rank; a second call does nothing.

        Args:
            stage: Lightning's stage; all but "predict" on samples from outside need the class counts.

        Raises:
            SettingError: A class has no training sample, no validation sample has a class, or ``val_share`` is not 0
                and the data set has validation samples of its own.
        """
        if self._train is not None or (stage == "predict" and self.predict is not None):
            return
        train, labels, self._test = self.load_datasets()
        self.check_validation()
        generator = torch.Generator().manual_seed(self.seed)
        self.kept_samples = torch.arange(len(labels))
        strata = [*self.class_names, "(no class)"]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*classes with a single sample.*")  # here those are strata
            held_out = held_out_mask(rarest_class(labels), strata, generator, val_share=self.val_share)
        val_labels = labels[held_out]
        if self.own_validation:
            own: Any = self.validation_set()
            self._val, val_labels = own, own.labels
        else:
            self._val = self.select(train, self.kept_samples[held_out], training=False)
        self._train = self.select(train, self.kept_samples[~held_out], training=True)
        self._train_labels = labels[~held_out]
        self.class_counts = self._train_labels.sum(dim=0)
        self.label_counts = torch.stack([len(self._train_labels) - self.class_counts, self.class_counts], dim=1)
        if never := self._names(self.class_counts == 0):
            raise SettingError(
                f"no training sample has class {first_few(never)}: add some, or leave the class out of the labels"
            )
        if self.own_validation or self.val_share:
            self._check_positives(val_labels)

    def _check_positives(self, val_labels: Tensor) -> None:
        positives = val_labels.sum(dim=0)
        if not positives.any():
            raise SettingError(
                f"none of the {len(val_labels):,} validation samples has a class, so that nothing can be measured on "
                "them: add positives, or raise data.val_share"
            )
        if absent := self._names(positives == 0):
            rank_zero_warn(
                f"no validation sample has class {first_few(absent)}: the validation's average precision leaves "
                f"{'it' if len(absent) == 1 else 'them'} out"
            )

    def _names(self, mask: Tensor) -> list[str]:
        return [name for name, chosen in zip(self.class_names, mask.tolist(), strict=True) if chosen]


def rarest_class(labels: Tensor) -> Tensor:
    """The class of every sample that the fewest samples have, int64 (N,); C for a sample without a class.

    Args:
        labels: 1 where a sample has a class, else 0, int64 (N, C).

    Example:
        >>> rarest_class(torch.tensor([[1, 1], [1, 0], [0, 0]]))
        tensor([1, 0, 2])
    """
    counts = labels.sum(dim=0)
    cost = torch.where(labels == 1, counts, len(labels) + 1)
    return cost.argmin(dim=1).where(labels.any(dim=1), labels.shape[1])
