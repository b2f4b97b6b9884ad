"""Long-tailed data sets, and data for anomaly detection, as LightningDataModules."""

from datamodules.anomaly.images import AnomalyImageDataModule
from datamodules.anomaly.table import AnomalyDataModule
from datamodules.base.long_tail import imbalanced_class_counts
from datamodules.base.long_tailed import LongTailedDataModule
from datamodules.base.multi_label import MultiLabelDataModule
from datamodules.features.data_module import FeaturesDataModule
from datamodules.image_arrays.cifar_lt import CIFAR10LTDataModule, CIFAR100LTDataModule
from datamodules.image_arrays.digits_lt import DigitsLTDataModule
from datamodules.image_arrays.digits_multilabel import DigitsMultiLabelDataModule
from datamodules.image_files.image_folder import ImageFolderLTDataModule
from datamodules.image_files.image_list import ImageListLTDataModule
from datamodules.image_files.imagenet_lt import ImageNetLTDataModule
from datamodules.image_files.inaturalist2018 import INaturalist2018DataModule
from datamodules.image_files.multilabel_list import MultiLabelImageListDataModule
from datamodules.image_files.places_lt import PlacesLTDataModule

__all__ = [
    "AnomalyDataModule",
    "AnomalyImageDataModule",
    "CIFAR10LTDataModule",
    "CIFAR100LTDataModule",
    "DigitsLTDataModule",
    "DigitsMultiLabelDataModule",
    "FeaturesDataModule",
    "INaturalist2018DataModule",
    "ImageFolderLTDataModule",
    "ImageListLTDataModule",
    "ImageNetLTDataModule",
    "LongTailedDataModule",
    "MultiLabelDataModule",
    "MultiLabelImageListDataModule",
    "PlacesLTDataModule",
    "imbalanced_class_counts",
]
