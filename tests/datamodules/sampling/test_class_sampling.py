import math

import pytest
import torch

from datamodules import DigitsLTDataModule
from datamodules.sampling import train_loader
from datamodules.sampling.class_sampling import ClassSampling, class_probabilities
from datamodules.sampling.samplers import TrainSampler
from imbsam import SettingError

COUNTS = [500, 90, 0, 12, 1]
LABELS = torch.repeat_interleave(torch.arange(5), torch.tensor(COUNTS))
SIZE = len(LABELS)
SHUFFLED = LABELS[torch.randperm(SIZE, generator=torch.Generator().manual_seed(0))]

# the formulas of the paper, written out anew
SHARES = {
    "instance_balanced": [n / SIZE for n in COUNTS],
    "class_balanced": [1 / 4 if n else 0 for n in COUNTS],
    "square_root": [math.sqrt(n) / sum(map(math.sqrt, COUNTS)) for n in COUNTS],
    "progressively_balanced": [(1 - 3 / 8) * n / SIZE + 3 / 8 * (1 / 4 if n else 0) for n in COUNTS],  # epoch 3 of 8
}


@pytest.mark.parametrize("sampling", SHARES)
def test_classes_are_drawn_as_often_as_their_formula_says(sampling):
    torch.testing.assert_close(
        class_probabilities(torch.tensor(COUNTS), sampling, 3 / 8), torch.tensor(SHARES[sampling]).double()
    )
    order = ClassSampling(SHUFFLED, sampling, epochs=8)
    drawn = []
    for seed in range(200):
        draws = order(3, torch.Generator().manual_seed(seed))
        assert len(draws) == SIZE
        drawn.append(torch.bincount(SHUFFLED[draws % SIZE], minlength=5))
        wanted = SIZE * torch.tensor(SHARES[sampling]).double()
        assert (drawn[-1] - wanted).abs().max() < 1 + 1e-6
    # rounded at random, so that the mean over epochs is right
    torch.testing.assert_close(torch.stack(drawn).double().mean(0), wanted, rtol=0, atol=0.15)


def test_the_samples_of_a_class_take_turns():
    draws = ClassSampling(SHUFFLED, "class_balanced")(0, torch.Generator().manual_seed(0))
    assert len(set(draws.tolist())) == SIZE  # every repeat of a sample has a number of its own
    times = torch.bincount(draws % SIZE, minlength=SIZE)
    for label, count in enumerate(COUNTS):
        if count:
            shuffled_classes = times[SHUFFLED.eq(label)]
            assert shuffled_classes.max() - shuffled_classes.min() <= 1
    repeats = torch.zeros(SIZE, dtype=torch.int64)
    repeats.scatter_reduce_(0, draws % SIZE, draws // SIZE, "amax")
    assert torch.equal(repeats, (times - 1).clamp(min=0))


def test_progressive_sampling_goes_from_one_to_the_other():
    order = ClassSampling(SHUFFLED, "progressively_balanced", epochs=4)
    first, later, beyond = (order(epoch, torch.Generator().manual_seed(0)) % SIZE for epoch in (0, 3, 9))
    assert torch.bincount(SHUFFLED[first], minlength=5).tolist() == COUNTS
    rarest = [int((SHUFFLED[draws] == 4).sum()) for draws in (first, later, beyond)]
    assert rarest[0] < rarest[1] < rarest[2]


@pytest.mark.parametrize("replicas", [2, 3])
def test_processes_share_the_draws_of_one(replicas):
    def draws(replicas, rank=0):
        order = ClassSampling(SHUFFLED, "class_balanced")
        sampler = TrainSampler(range(SIZE), 6 // replicas, 1, replicas, rank, order)
        sampler.set_epoch(2)
        return [draw for _, draw in sampler]

    together = [draw for rank in range(replicas) for draw in draws(replicas, rank)]
    assert set(together) == set(draws(1))


def test_a_repeated_sample_is_augmented_differently_and_an_epoch_can_start_anywhere():
    data = DigitsLTDataModule(sampling="class_balanced", batch_size=16)
    data.setup()
    loader = data.train_dataloader()
    batches = list(loader)
    images = torch.cat([images for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    assert torch.bincount(labels).max() - torch.bincount(labels).min() <= 1
    rarest = images[labels == data.class_counts.argmin()].flatten(1)
    assert len(rarest) > 5 * data.class_counts.min()
    assert len(rarest.unique(dim=0)) > 3 * data.class_counts.min()  # shifted by up to a pixel, 9 ways

    again = data.train_dataloader()
    again.load_state_dict({**loader.state_dict(), "epoch": 0, "batch": 3})
    for (found, _), (wanted, _) in zip(again, batches[3:], strict=True):
        assert torch.equal(found, wanted)


def test_workers_draw_the_same():
    dataset = torch.utils.data.TensorDataset(torch.arange(SIZE))
    order = ClassSampling(SHUFFLED, "square_root")
    with_workers, without = (
        torch.cat([indices for (indices,) in train_loader(dataset, 32, num_workers=n, seed=0, order=order)])
        for n in (2, 0)
    )
    assert torch.equal(with_workers, without)


def test_errors_name_the_setting_and_the_fix():
    with pytest.raises(SettingError, match="sampling is 'balanced': choose one of instance_balanced, class_bal"):
        DigitsLTDataModule(sampling="balanced")
    data = DigitsLTDataModule(sampling="progressively_balanced")
    data.setup()
    with pytest.raises(SettingError, match=r"the number of epochs is None: set trainer\.max_epochs"):
        data.train_dataloader()
