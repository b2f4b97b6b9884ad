import gc

import pytest
import torch
from torch.utils.data import Dataset, Subset
from torchvision.transforms import v2

from datamodules import DigitsLTDataModule
from datamodules.sampling import eval_loader, ranks, train_loader
from datamodules.sampling.samplers import EvalSampler, TrainSampler
from imbsam import SettingError


def joint_batches(size, batch_size, replicas, epoch=0, seed=0):
    """The sets of samples that `replicas` processes see together, batch by batch."""
    batches = []
    for rank in range(replicas):
        sampler = TrainSampler(range(size), batch_size, seed, replicas, rank)
        sampler.set_epoch(epoch)
        indices = [index for _, index in sampler]
        assert len(indices) == len(sampler)
        batches.append([indices[i : i + batch_size] for i in range(0, len(indices), batch_size)])
    return [[row for part in parts for row in part] for parts in zip(*batches, strict=True)]


@pytest.mark.parametrize("replicas", [2, 4])
@pytest.mark.parametrize("size", [1, 3, 16, 17, 19, 24, 33, 35, 40])
def test_k_processes_see_the_batches_of_one(size, replicas):
    one = joint_batches(size, 8, 1, epoch=2)
    for found, wanted in zip(joint_batches(size, 8 // replicas, replicas, epoch=2), one, strict=True):
        assert set(found) == set(wanted)
        assert len(found) == max(len(wanted), replicas)  # every rank has a row; repeats only where it must


def test_the_order_is_a_function_of_seed_and_epoch():
    torch.manual_seed(0)
    first = joint_batches(50, 8, 1, epoch=3, seed=1)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert joint_batches(50, 8, 1, epoch=3, seed=1) == first
    assert joint_batches(50, 8, 1, epoch=4, seed=1) != first
    assert joint_batches(50, 8, 1, epoch=4, seed=0) != first  # seed + epoch is the same as the first's
    torch.set_rng_state(state)


@pytest.mark.parametrize("size", [0, 1, 2, 9, 10])
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_evaluation_shares_have_no_repeats(size, replicas):
    shares = [list(EvalSampler(range(size), replicas, rank)) for rank in range(replicas)]
    assert sorted(index for share in shares for index in share) == list(range(size))
    assert [len(EvalSampler(range(size), replicas, rank)) for rank in range(replicas)] == [len(s) for s in shares]


class Pictures(Dataset):
    """Like ImageFolder: one sample at a time, transformed at random."""

    transform = v2.Compose([v2.RandomCrop(4), v2.RandomHorizontalFlip(), v2.ColorJitter(0.5)])
    images = torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), index


def by_index(batches):
    return {int(index): image for images, indices in batches for image, index in zip(images, indices, strict=True)}


def assert_same_images(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[index], wanted[index]) for index in wanted)


def test_per_sample_transforms_depend_on_seed_epoch_and_index_alone():
    data = Subset(Pictures(), range(30))
    torch.manual_seed(0)
    loader = train_loader(data, 8)
    first, second = by_index(loader), by_index(loader)
    assert not any(torch.equal(first[index], second[index]) for index in first)  # another epoch
    torch.manual_seed(1)
    workers = train_loader(data, 8, num_workers=2)
    assert_same_images(by_index(workers), first)
    assert_same_images(by_index(workers), second)
    del workers
    gc.collect()
    parts = [train_loader(data, 4, num_replicas=2, rank=rank) for rank in range(2)]
    assert_same_images(by_index(parts[0]) | by_index(parts[1]), first)


def indices(data, replicas=1, num_workers=0, epoch=0):
    data.setup()
    found = []
    for rank in range(replicas):
        loader = train_loader(
            data._train, data.batch_size // replicas, data.train_collate, num_workers, 7, replicas, rank
        )
        loader.sampler.set_epoch(epoch)
        found += [row for images, _ in loader for row in images.flatten(1).tolist()]
    return sorted(found)


def test_augmented_digits_are_the_same_for_any_workers_and_processes():
    data = DigitsLTDataModule()
    wanted = indices(data, epoch=4)
    assert indices(data, replicas=2, epoch=4) == wanted
    assert indices(data, replicas=4, epoch=4) == wanted
    assert indices(data, num_workers=2, epoch=4) == wanted
    gc.collect()
    assert indices(data, epoch=5) != wanted


def random_collate(samples):
    return torch.rand(1), torch.tensor([index for _, index in samples])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_random_collate_is_reproducible(num_workers):
    loaders = [train_loader(Pictures(), 8, random_collate, workers) for workers in (0, num_workers)]
    drawn = [torch.cat([number for number, _ in loader]) for loader in loaders]
    assert torch.equal(*drawn)
    assert len(drawn[0].unique()) == 4
    del loaders
    gc.collect()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_starts_at_any_batch(num_workers):
    whole = train_loader(Pictures(), 8, seed=3)
    epochs = [[indices.tolist() for _, indices in whole] for _ in range(3)]
    stopped = train_loader(Pictures(), 8, num_workers=num_workers, seed=3)
    list(stopped)
    iterator = iter(stopped)
    next(iterator), next(iterator)
    state = stopped.state_dict()
    assert state == {"seed": 3, "epoch": 1, "batch": 2, "joint_batch_size": 8}
    again = train_loader(Pictures(), 8, num_workers=num_workers, seed=99)
    again.load_state_dict(state)
    assert len(again) == 4
    assert [indices.tolist() for _, indices in again] == epochs[1][2:]
    assert again.state_dict() == {"seed": 3, "epoch": 2, "batch": 0, "joint_batch_size": 8}
    assert [indices.tolist() for _, indices in again] == epochs[2]
    del iterator, stopped, again
    gc.collect()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_draw_nothing_from_the_default_generator(num_workers):
    state = torch.get_rng_state()
    for loader in (train_loader(Pictures(), 8, num_workers=num_workers), eval_loader(range(9), 4, None, num_workers)):
        list(loader)
        del loader
        gc.collect()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_rank_without_a_share_has_one_batch_without_a_row():
    data = DigitsLTDataModule()
    data.setup()
    loader = eval_loader(Subset(data._test, [0, 1]), 8, data.eval_collate, num_replicas=3, rank=2)
    ((images, labels),) = list(loader)
    assert len(loader) == 1
    assert (images.shape, labels.shape) == ((0, 1, 8, 8), (0,))
    ((images, _),) = list(eval_loader(Subset(Pictures(), [0]), 8, num_replicas=2, rank=1))
    assert images.shape == (0, 3, 4, 4)


def test_ranks_without_a_trainer():
    assert ranks() == {"num_replicas": 1, "rank": 0}


@pytest.mark.parametrize("size", [1, 4, 5, 8, 9])
def test_every_rank_has_as_many_evaluation_batches(size):
    """A forward under FSDP2 waits for the other ranks."""
    loaders = [eval_loader(torch.arange(size), 2, num_replicas=3, rank=rank) for rank in range(3)]
    batches = [list(loader) for loader in loaders]
    assert len({len(found) for found in batches}) == 1
    assert [len(loader) for loader in loaders] == [len(found) for found in batches]
    assert sorted(torch.cat([batch for found in batches for batch in found]).tolist()) == list(range(size))


def test_mid_epoch_the_batches_must_stay_as_large():
    data = DigitsLTDataModule()
    data.setup()
    state = {"seed": 0, "epoch": 1, "batch": 3, "joint_batch_size": 32}
    train_loader(data._train, 16, num_replicas=2).load_state_dict(state)
    with pytest.raises(SettingError, match=r"batch_size gives 64 samples .* saved mid-epoch with 32: keep"):
        train_loader(data._train, 32, num_replicas=2).load_state_dict(state)
    train_loader(data._train, 32, num_replicas=2).load_state_dict({**state, "batch": 0})
