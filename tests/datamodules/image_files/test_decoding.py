import warnings

import numpy as np
import pytest
from PIL import Image

from datamodules.image_files.decoding import read_rgb


def light_and_dark(mode):
    """16 x 8 pixels, the left half light and the right half dark."""
    image = Image.new("RGB", (16, 8), (200, 200, 200))
    image.paste((40, 40, 40), (8, 0, 16, 8))
    return image if mode == "RGB" else image.quantize(4) if mode == "P" else image.convert(mode)


def saved(folder, name):
    path = folder / name.replace(" ", "_")
    if name == "16 bits.png":
        image = Image.fromarray(
            np.where(np.arange(16) < 8, 200 * 256 + 9, 40 * 256 + 9).astype(np.uint16)[None].repeat(8, 0)
        )
        image.save(path)
    elif name == "32 bits.tif":
        Image.fromarray(np.where(np.arange(16) < 8, 200 * 256, 40 * 256).astype(np.int32)[None].repeat(8, 0)).save(path)
    elif name == "rotated.jpg":
        exif = Image.Exif()
        exif[0x0112] = 6  # to be shown turned by 90 degrees
        light_and_dark("RGB").save(path, exif=exif)
    elif name == "transparent palette.png":
        light_and_dark("P").save(path, transparency=bytes(range(100, 200)))
    elif name == "broken exif.jpg":
        light_and_dark("RGB").save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    else:
        mode = {"grey": "L", "CMYK": "CMYK", "palette": "P", "bitmap": "1", "transparent": "RGBA"}[path.stem]
        light_and_dark(mode).save(path)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "grey.jpg",
        "CMYK.jpg",
        "palette.png",
        "bitmap.png",
        "transparent.png",
        "transparent palette.png",
        "16 bits.png",
        "32 bits.tif",
        "rotated.jpg",
        "broken exif.jpg",
    ],
)
def test_every_kind_of_image_becomes_rgb_without_a_warning(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_rgb(saved(tmp_path, name))
    pixels = np.asarray(image).astype(int)
    assert (image.mode, pixels.shape) == ("RGB", (8, 16, 3))  # EXIF does not turn it
    if name != "bitmap.png":  # dithered
        assert abs(pixels[:, 1:6] - 200).max() < 12
        assert abs(pixels[:, 10:15] - 40).max() < 12
