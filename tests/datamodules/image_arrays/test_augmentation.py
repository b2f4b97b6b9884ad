import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from datamodules.image_arrays.augmentation import BatchTransform, crop_and_flip
from datamodules.sampling.sample_seeds import _GOLDEN, _mix, random_integers, sample_seeds, seeded


@pytest.fixture(autouse=True)
def _reproducible():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def seeds(size):
    return torch.randint(2**63 - 1, (size,))


def image():
    return torch.randint(1, 255, (3, 5, 6), dtype=torch.uint8)


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_the_crop_gives_every_crop_of_the_padded_image_equally_often(padding):
    one = image()
    padded = F.pad(one, [padding] * 4)
    crops = {
        (y, x): v2.functional.crop(padded, y, x, 5, 6) for y, x in itertools.product(range(2 * padding + 1), repeat=2)
    }
    repeats = 200
    images = one.expand(repeats * len(crops), -1, -1, -1)
    cropped = crop_and_flip(images, seeds(len(images)), padding)
    assert cropped.shape == (repeats * len(crops), 3, 5, 6)
    assert cropped.dtype == torch.uint8
    hits = torch.stack([(cropped == crop).flatten(1).all(1) for crop in crops.values()])
    assert (hits.sum(0) == 1).all()  # every result is one of the crops
    assert (hits.sum(1) - repeats).abs().max() < 5 * repeats**0.5


def test_the_crop_keeps_the_images_in_their_rows():
    images = torch.arange(1, 65, dtype=torch.uint8).view(64, 1, 1, 1).expand(64, 3, 4, 4)
    cropped = crop_and_flip(images, seeds(64), 1)
    assert torch.equal(cropped[:, :, 1:3, 1:3], images[:, :, 1:3, 1:3])


def test_the_flip_mirrors_half_of_the_images_left_to_right():
    one = image()
    flipped = crop_and_flip(one.expand(1000, -1, -1, -1), seeds(1000), flip=True)
    mirrored = (flipped == one.flip(2)).flatten(1).all(1)
    kept = (flipped == one).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert 420 < mirrored.sum() < 580


def test_crop_and_flip_are_drawn_independently():
    one = torch.arange(1, 10, dtype=torch.uint8).view(1, 3, 3)
    transform = BatchTransform([0.0], [1.0], crop_padding=1, flip=True)
    images, _ = transform((one.expand(2000, -1, -1, -1), torch.zeros(2000, dtype=torch.int64)))
    assert len(images.flatten(1).unique(dim=0)) == 9 * 2


def test_without_augmentation_it_is_torchvisions_normalisation():
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(4)
    mean, std = [0.5, 0.4, 0.3], [0.25, 0.2, 0.3]
    transform = BatchTransform([255 * value for value in mean], [255 * value for value in std])
    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    state = torch.get_rng_state()
    before = images.clone()
    result, same = transform((images, labels))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, reference(images), rtol=1e-5, atol=1e-5)
    assert same is labels
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_border_of_a_crop_is_black_before_normalisation():
    white = torch.full((500, 1, 4, 4), 255, dtype=torch.uint8)
    images, _ = BatchTransform([100.0], [50.0], crop_padding=2)((white, torch.zeros(500)))
    torch.testing.assert_close(images.unique(), torch.tensor([(0 - 100) / 50, (255 - 100) / 50]))


def test_without_seeds_the_default_generator_decides():
    batch = torch.randint(256, (32, 3, 8, 8), dtype=torch.uint8), torch.zeros(32)
    transform = BatchTransform([0.0] * 3, [1.0] * 3, crop_padding=2, flip=True)
    torch.manual_seed(3)
    first = transform(batch)[0]
    torch.manual_seed(3)
    again = transform(batch)[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, transform(batch)[0])


@pytest.mark.parametrize("autoaugment", [False, True])
def test_an_image_depends_on_its_seed_alone(autoaugment):
    images, labels = torch.randint(256, (32, 3, 8, 8), dtype=torch.uint8), torch.zeros(32)
    transform = BatchTransform([0.0] * 3, [1.0] * 3, crop_padding=2, flip=True, autoaugment=autoaugment)
    drawn = seeds(32)
    state = torch.get_rng_state()
    whole = transform((images, labels), seeds=drawn)[0]
    assert torch.equal(torch.get_rng_state(), state)
    parts = [
        transform((images[part], labels[part]), seeds=drawn[part])[0] for part in (slice(0, 32, 2), slice(1, 32, 2))
    ]
    assert torch.equal(whole, torch.stack(parts, dim=1).flatten(0, 1))
    assert not torch.equal(whole, transform((images, labels), seeds=drawn + 1)[0])


def test_autoaugment_is_torchvisions_policy_for_cifar_after_crop_and_flip():
    images, drawn = torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8), seeds(16)
    transform = BatchTransform([0.0] * 3, [1.0] * 3, crop_padding=2, flip=True, autoaugment=True)
    found = transform((images, torch.zeros(16)), seeds=drawn)[0]
    policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    for image, moved, seed in zip(found, crop_and_flip(images, drawn, 2, True), drawn, strict=True):
        with seeded(int(seed)):
            assert torch.equal(image, policy(moved).float())


@pytest.mark.parametrize("vary", ["seed", "epoch", "index"])
def test_neighbouring_seeds_draw_independently(vary):
    """Epochs, indices and seeds differ by one: the digits drawn must not show it (chi-square of pairs)."""
    n = 20_000
    numbers = {"seed": 7, "epoch": torch.full((n,), 3), "index": torch.full((n,), 5)}
    if vary == "seed":
        one = torch.tensor([0])
        drawn = torch.cat([sample_seeds(seed - n // 2, one, one) for seed in range(n)])
    else:
        numbers[vary] = torch.arange(n)
        drawn = sample_seeds(numbers["seed"], numbers["epoch"], numbers["index"])
    assert len(drawn.unique()) == n
    for other in (random_integers(drawn, 5, 1), random_integers(drawn, 5, 0).roll(1)):
        counts = torch.bincount(random_integers(drawn, 5, 0) * 5 + other, minlength=25)
        assert ((counts - n / 25) ** 2 / (n / 25)).sum() < 60  # 24 degrees of freedom: exceeded once in 15,000


def test_seeds_are_the_published_splitmix64():
    """The first numbers of SplitMix64 started at 1234567, as its authors' reference code prints them."""
    numbers = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    found = [int(_mix(np.array([(1234567 + k * _GOLDEN) % 2**64], dtype=np.uint64))[0]) for k in (1, 2, 3)]
    assert found == numbers


def test_inside_seeded_the_default_generator_is_another_one():
    expected = torch.rand(2, generator=torch.Generator().manual_seed(5))
    state = torch.get_rng_state()
    with seeded(5):
        assert torch.equal(torch.rand(2), expected)
    assert torch.equal(torch.get_rng_state(), state)
