"""ResNets for images of 32 x 32 pixels."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from imbsam.checks import check_whole_numbers
from lightning_modules.backbones.normalization import norm_layer

__all__ = ["CifarResNet", "CifarResNet20", "CifarResNet32", "CifarResNet34"]


class PadShortcut(nn.Module):
    """He et al.'s option A: keep every ``stride``-th pixel and fill the new channels with zeros."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C + new_channels, H / stride, W / stride)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut around them."""

    def __init__(self, channels_in: int, channels: int, stride: int, norm: str, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = norm_layer(norm, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = norm_layer(norm, channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = (
                nn.Sequential(
                    nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False),
                    norm_layer(norm, channels),
                )
                if projection
                else PadShortcut(channels - channels_in, stride)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C, H / stride, W / stride)."""
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    r"""ResNet of basic blocks with a 3 x 3 stem and no max-pooling.

    The stages have ``width``, 2 ``width``, 4 ``width``, ... channels; every stage but the first halves the
    image. The classifier is ``fc``. A subclass sets the attributes.

    Args:
        num_classes: number of logits.
        width: channels of the first stage; fewer than the paper's are quicker on a CPU.
        norm: "batch" or "group".
        in_channels: channels of the image.
        stem_stride: 1 in the paper; 2 halves the image first, for a quarter of the cost.

    Attributes:
        blocks: number of blocks of each stage.
        projection: whether the shortcut into a wider stage is a 1 x 1 convolution with normalisation
            (option B of He et al.) or parameter-free (option A).

    Raises:
        SettingError: a number is not a positive integer, or ``norm`` is unknown.

    Shapes:
        * images: floating (N, in_channels, H, W); H and W of any size, 32 in the paper.
        * returns: logits (N, num_classes).

    Source:
        He et al., *Deep Residual Learning for Image Recognition*, CVPR 2016, arXiv 1512.03385, section 4.2.
    """

    blocks: ClassVar[tuple[int, ...]]
    projection: ClassVar[bool] = False

    def __init__(
        self, num_classes: int, width: int = 16, norm: str = "batch", in_channels: int = 3, stem_stride: int = 1
    ) -> None:
        super().__init__()
        check_whole_numbers(num_classes=num_classes, width=width, in_channels=in_channels, stem_stride=stem_stride)
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stem_stride, padding=1, bias=False)
        self.norm1 = norm_layer(norm, width)
        self.stages = nn.Sequential()
        channels_in = width
        for stage, number in enumerate(self.blocks):
            channels, layers = width * 2**stage, nn.Sequential()
            for block in range(number):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(BasicBlock(channels_in, channels, stride, norm, self.projection))
                channels_in = channels
            self.stages.append(layers)
        self.fc = nn.Linear(channels_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (N, num_classes)."""
        features = self.stages(F.relu(self.norm1(self.conv1(images))))
        logits: Tensor = self.fc(features.mean(dim=(2, 3)))
        return logits


class CifarResNet20(CifarResNet):
    """ResNet-20 for CIFAR (6n + 2 layers, n = 3): 0.27 million parameters at 10 classes.

    Arguments and errors are those of :class:`CifarResNet`; the paper's ``width`` is 16.

    Source:
        He et al., CVPR 2016, arXiv 1512.03385, section 4.2 and table 6.

    Example:
        >>> import torch
        >>> CifarResNet20(num_classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    blocks = (3, 3, 3)


class CifarResNet32(CifarResNet):
    """ResNet-32 for CIFAR (6n + 2 layers, n = 5): 0.46 million parameters at 10 classes.

    The network of most work on CIFAR-100-LT. Arguments, errors and source are those of :class:`CifarResNet20`.
    """

    blocks = (5, 5, 5)


class CifarResNet34(CifarResNet):
    """ImageNet's ResNet-34 with a 3 x 3 stem and no max-pooling: 21.3 million parameters at 10 classes.

    The network of ImbSAM's results on CIFAR-100-LT (Zhou et al., ICCV 2023, arXiv 2308.07815). Arguments and errors are
    those of :class:`CifarResNet`; the paper's ``width`` is 64.

    Source:
        He et al., CVPR 2016, arXiv 1512.03385, table 1.
    """

    blocks = (3, 4, 6, 3)
    projection = True

    def __init__(
        self, num_classes: int, width: int = 64, norm: str = "batch", in_channels: int = 3, stem_stride: int = 1
    ) -> None:
        super().__init__(num_classes, width, norm, in_channels, stem_stride)
