"""Classification networks: this project's small ones, torchvision's and timm's."""

from lightning_modules.backbones.cifar_resnet import CifarResNet20, CifarResNet32, CifarResNet34
from lightning_modules.backbones.heads import CosineClassifier
from lightning_modules.backbones.library import Timm, Torchvision
from lightning_modules.backbones.small_cnn import SmallCNN

__all__ = [
    "CifarResNet20",
    "CifarResNet32",
    "CifarResNet34",
    "CosineClassifier",
    "SmallCNN",
    "Timm",
    "Torchvision",
]
