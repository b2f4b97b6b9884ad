"""Long-tailed data sets, and data for anomaly detection, as LightningDataModules."""

from datamodules.anomaly import AnomalyDataModule
from datamodules.anomaly_images import AnomalyImageDataModule
from datamodules.base import LongTailedDataModule
from datamodules.cifar_lt import CIFAR10LTDataModule, CIFAR100LTDataModule
from datamodules.digits_lt import DigitsLTDataModule
from datamodules.image_folder import ImageFolderLTDataModule
from datamodules.image_table import ImageListLTDataModule
from datamodules.imagenet_lt import ImageNetLTDataModule, PlacesLTDataModule
from datamodules.inaturalist import INaturalist2018DataModule
from datamodules.long_tail import imbalanced_class_counts

__all__ = [
    "AnomalyDataModule",
    "AnomalyImageDataModule",
    "CIFAR10LTDataModule",
    "CIFAR100LTDataModule",
    "DigitsLTDataModule",
    "INaturalist2018DataModule",
    "ImageFolderLTDataModule",
    "ImageListLTDataModule",
    "ImageNetLTDataModule",
    "LongTailedDataModule",
    "PlacesLTDataModule",
    "imbalanced_class_counts",
]
