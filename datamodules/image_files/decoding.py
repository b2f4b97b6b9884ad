"""Decoding an image file to RGB, and why it cannot be decoded."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError


def read_rgb(path: Path) -> Image.Image:
    """Decode an image file to 8-bit RGB from any mode: grey, palette, CMYK, 16 bits.

    As in torchvision's ImageFolder the EXIF orientation is ignored, and transparency is dropped. 16-bit grey keeps its
    upper 8 bits (PIL alone would clip at 255).

    Raises:
        Exception: What PIL raises on a damaged file.
    """
    with warnings.catch_warnings(), path.open("rb") as file:
        warnings.simplefilter("ignore", UserWarning)  # transparency in palettes, broken EXIF: no harm to the pixels
        image: Image.Image = Image.open(file)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        return image.convert("RGB")


def failure_reason(path: Path, error: Exception) -> str:
    """Why :func:`read_rgb` raised this error, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnidentifiedImageError):
        return "the file is empty" if path.stat().st_size == 0 else "the file is not an image"
    return " ".join(str(error).split()) or type(error).__name__
