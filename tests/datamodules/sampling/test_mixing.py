import pytest
import torch

from datamodules import DigitsLTDataModule
from datamodules.sampling.mixing import MixedBatches
from imbsam import SettingError


def plain(samples):
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels)


SAMPLES = [(torch.full((1, 8, 8), float(i)), i % 3) for i in range(6)]


def lambdas(targets, labels, num_classes=3):
    """The weight of each row's own class, where the neighbour's is another."""
    own = torch.nn.functional.one_hot(labels, num_classes).bool()
    return targets[own]


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_images_and_targets_are_mixed_in_the_same_proportion(name):
    labels = torch.tensor([label for _, label in SAMPLES])
    found = []
    for seed in range(50):
        mix = MixedBatches(plain, 3, **{"mixup": 0.0, "cutmix": 0.0, name: 1.0})
        images, targets = mix(SAMPLES, seeds=torch.arange(6) + 100 * seed)
        assert targets.dtype == torch.float32
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        weights = lambdas(targets, labels)
        torch.testing.assert_close(weights, weights[:1].expand(6))  # one lambda for the batch
        # row i holds the value i, its neighbour another one: the mean tells lambda
        neighbour = torch.arange(6).roll(1)
        torch.testing.assert_close(
            images.mean((1, 2, 3)), weights * torch.arange(6) + (1 - weights) * neighbour, atol=1e-4, rtol=1e-4
        )
        found.append(float(weights[0]))
    low, high = {"mixup": (0.35, 0.65), "cutmix": (0.65, 0.85)}[name]  # Beta(1, 1) is uniform; boxes end at the border
    assert low < sum(found) / 50 < high
    assert max(found) - min(found) > 0.4


def test_both_take_turns_by_chance():
    mix = MixedBatches(plain, 3, mixup=1.0, cutmix=1.0)
    pasted = []
    for seed in range(40):
        images, _ = mix(SAMPLES, seeds=torch.arange(6) + 100 * seed)
        pasted.append(bool((images == images.round()).all()))  # CutMix blends no pixels
    assert 10 < sum(pasted) < 30


def test_mixing_depends_on_seed_epoch_and_draw_alone():
    def epoch(num_workers):
        data = DigitsLTDataModule(batch_size=32, num_workers=num_workers, mixup=0.2, cutmix=1.0)
        data.setup()
        return list(data.train_dataloader())

    before = torch.get_rng_state()
    batches = epoch(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert batches[0][1].shape == (32, 10)
    for (images, targets), (others, theirs) in zip(batches, epoch(2), strict=True):
        assert torch.equal(images, others)
        assert torch.equal(targets, theirs)
    assert len({float(targets[targets > 0].min()) for _, targets in batches}) > 1


def test_evaluation_is_not_mixed():
    data = DigitsLTDataModule(mixup=1.0, val_share=0.2)
    data.setup()
    for loader in (data.val_dataloader(), data.test_dataloader(), data.train_eval_dataloader()):
        assert next(iter(loader))[1].dtype == torch.int64


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
@pytest.mark.parametrize("alpha", [-1.0, float("nan"), float("inf")])
def test_wrong_alpha(name, alpha):
    with pytest.raises(SettingError, match=rf"{name} is {alpha}: give a number in \[0, inf\)"):
        DigitsLTDataModule(**{name: alpha})
