"""Classification networks: this project's small ones, and those of torchvision, timm, open_clip and transformers."""

from lightning_modules.backbones.cifar_resnet import CifarResNet20, CifarResNet32, CifarResNet34
from lightning_modules.backbones.heads import CosineClassifier
from lightning_modules.backbones.hugging_face import HuggingFace
from lightning_modules.backbones.library import Timm, Torchvision
from lightning_modules.backbones.open_clip_network import OpenCLIP
from lightning_modules.backbones.small_cnn import SmallCNN

__all__ = [
    "CifarResNet20",
    "CifarResNet32",
    "CifarResNet34",
    "CosineClassifier",
    "HuggingFace",
    "OpenCLIP",
    "SmallCNN",
    "Timm",
    "Torchvision",
]
