"""Long-tailed data sets, and data for anomaly detection, as LightningDataModules."""

from datamodules.anomaly import AnomalyDataModule
from datamodules.anomaly_images import AnomalyImageDataModule
from datamodules.base import LongTailedDataModule
from datamodules.cifar_lt import CIFAR10LTDataModule, CIFAR100LTDataModule
from datamodules.digits_lt import DigitsLTDataModule
from datamodules.long_tail import imbalanced_class_counts

__all__ = [
    "AnomalyDataModule",
    "AnomalyImageDataModule",
    "CIFAR10LTDataModule",
    "CIFAR100LTDataModule",
    "DigitsLTDataModule",
    "LongTailedDataModule",
    "imbalanced_class_counts",
]
