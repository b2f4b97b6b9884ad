"""How pixels become the network's input in an evaluation: what a program without this library has to know."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PixelInput:
    """The input is ``(pixel - mean) / std``.

    Attributes:
        mean: Mean of each channel, in units of the pixels (0 to 255 for most images).
        std: Standard deviation of each channel, in units of the pixels.
        shorter_side: Length in pixels to which an image's shorter side is resized before its centre is cropped; None
            if the data are not resized.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    shorter_side: int | None = None
