import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from datamodules.image_files.augmentation import ImageTransform
from datamodules.sampling.sample_seeds import seeded
from imbsam import SettingError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
IMAGE = Image.frombytes("RGB", (40, 30), bytes(i * i * 7 % 256 for i in range(40 * 30 * 3)))


def transform(augment="standard", size=16, jitter=0.0):
    return ImageTransform(augment, size, jitter, MEAN, STD)


@pytest.mark.parametrize("augment", ["none", "standard", "randaugment", "autoaugment"])
def test_makes_the_networks_input_and_draws_from_torchs_generator_alone(augment):
    step = transform(augment, jitter=0.0 if augment == "none" else 0.4)
    with seeded(1):
        one = step(IMAGE)
    assert (one.shape, one.dtype) == ((3, 16, 16), torch.float32)
    with seeded(1):
        assert torch.equal(step(IMAGE), one)
    with seeded(2):
        assert torch.equal(step(IMAGE), one) == (augment == "none")


def test_evaluation_is_resize_and_central_crop():
    wanted = v2.functional.resize(IMAGE, [256], antialias=True)
    wanted = v2.functional.to_dtype(v2.functional.pil_to_tensor(wanted), torch.float32, scale=True)
    top, left = (wanted.shape[1] - 224) // 2, round((wanted.shape[2] - 224) / 2)
    wanted = wanted[:, top : top + 224, left : left + 224]
    wanted = (wanted - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(transform("none", 224)(IMAGE), wanted)


def test_jitter_changes_colours():
    grey = Image.new("RGB", (20, 20), (90, 90, 90))
    with seeded(0):
        plain, jittered = transform()(grey), transform(jitter=0.4)(grey)
    assert plain.flatten(1).unique(dim=1).shape == jittered.flatten(1).unique(dim=1).shape == (3, 1)
    assert not torch.equal(plain, jittered)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("trivial", 16, 0), "augment is 'trivial': .* none, standard, randaugment, autoaugment"),
        (("standard", 0, 0), "image_size is 0: give"),
        (("standard", 16, 1.5), r"color_jitter is 1.5: give a number in \[0, 1\]"),
    ],
)
def test_wrong_settings_are_refused(args, message):
    with pytest.raises(SettingError, match=message):
        transform(*args)
