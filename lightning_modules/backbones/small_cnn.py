"""A small convolutional net for images of a few pixels, such as the 8 x 8 digits."""

from torch import Tensor, nn

from imbsam.checks import check_whole_numbers
from imbsam.errors import SettingError
from lightning_modules.backbones.normalization import norm_layer

__all__ = ["SmallCNN"]


class SmallCNN(nn.Module):
    """Three 3 x 3 convolutions, average pooling and the classifier ``fc``: 57 thousand parameters at 10 classes.

    Made for demonstrations that must converge in seconds on a CPU. With GroupNorm and without dropout the
    samples of a batch do not see each other, so that ImbSAM's extra passes may run on the tail samples alone and
    are exact.

    Args:
        num_classes: number of logits.
        in_channels: channels of the image.
        width: channels of the first convolution; the others have twice as many.
        norm: "group" or "batch".
        dropout: probability in [0, 1) of zeroing a pooled feature in training.

    Raises:
        SettingError: a number is not a positive integer, ``dropout`` is out of its range or ``norm`` unknown.

    Shapes:
        * images: floating (N, in_channels, H, W).
        * returns: logits (N, num_classes).

    Example:
        >>> import torch
        >>> SmallCNN(num_classes=10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, num_classes: int, in_channels: int = 1, width: int = 32, norm: str = "group", dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_whole_numbers(num_classes=num_classes, in_channels=in_channels, width=width)
        if not 0.0 <= dropout < 1.0:
            raise SettingError(f"dropout is {dropout}: give a probability in [0, 1); 0 is none")
        layers: list[nn.Module] = []
        channels_in = in_channels
        for channels, stride in ((width, 1), (2 * width, 2), (2 * width, 2)):
            layers += [
                nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False),
                norm_layer(norm, channels),
                nn.ReLU(),
            ]
            channels_in = channels
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels_in, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (N, num_classes)."""
        features = self.features(images).mean(dim=(2, 3))
        logits: Tensor = self.fc(self.dropout(features))
        return logits
