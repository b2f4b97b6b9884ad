import warnings

import pytest
import torch

from datamodules.sampling.stratified import first_samples, held_out_mask, subsample
from imbsam.errors import SettingError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_subsample_draws_the_counts_and_depends_on_the_seed_alone():
    labels = torch.arange(4).repeat(50)
    counts = torch.tensor([50, 20, 3, 1])
    drawn = subsample(labels, counts, generator())
    assert torch.bincount(labels[drawn]).tolist() == [50, 20, 3, 1]
    assert torch.equal(drawn, drawn.unique())
    assert torch.equal(drawn, subsample(labels, counts, generator()))
    assert not torch.equal(drawn, subsample(labels, counts, generator(1)))


def test_subsample_draws_every_sample_of_a_class_equally_often():
    labels = torch.arange(2).repeat_interleave(10)
    source = generator()
    hits = torch.zeros(20)
    for _ in range(2000):
        hits[subsample(labels, torch.tensor([3, 10]), source)] += 1
    assert hits[10:].tolist() == [2000] * 10
    assert hits[:10].sub(600).abs().max() < 5 * (2000 * 0.3 * 0.7) ** 0.5


def test_the_first_samples_of_each_class():
    labels = torch.tensor([2, 0, 2, 1, 0, 2, 1, 0])
    assert first_samples(labels, torch.tensor([2, 9, 1])).tolist() == [0, 1, 3, 4, 6]


def test_a_larger_ratio_draws_a_subset():
    labels = torch.arange(3).repeat(40)
    large = subsample(labels, torch.tensor([40, 20, 10]), generator())
    small = subsample(labels, torch.tensor([40, 6, 1]), generator())
    assert set(small.tolist()) < set(large.tolist())


def test_validation_keeps_a_sample_of_every_class_on_both_sides():
    counts = torch.tensor([100, 30, 5, 2, 2])
    labels = torch.arange(5).repeat_interleave(counts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for share in (0.001, 0.1, 0.5, 0.999):
            held_out = torch.bincount(labels[held_out_mask(labels, "abcde", generator(), val_share=share)], minlength=5)
            assert held_out.min() >= 1
            assert (counts - held_out).min() >= 1
    tenth = held_out_mask(labels, "abcde", generator(), val_share=0.1)
    assert torch.bincount(labels[tenth]).tolist() == [10, 3, 1, 1, 1]
    assert torch.equal(tenth, held_out_mask(labels, "abcde", generator(), val_share=0.1))
    assert not torch.equal(tenth, held_out_mask(labels, "abcde", generator(1), val_share=0.1))


def test_a_single_sample_stays_in_training_and_its_class_is_named():
    labels = torch.tensor([0, 0, 1, 2, 2, 2])
    with pytest.warns(UserWarning, match=r"classes with a single sample: yak\.$"):
        held_out = held_out_mask(labels, ["ant", "yak", "emu"], generator(), val_share=0.5)
    assert torch.bincount(labels[held_out], minlength=3).tolist() == [1, 0, 2]


def test_no_share_holds_out_nothing_and_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not held_out_mask(torch.tensor([0, 1]), "ab", generator(), val_share=0.0).any()


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan")])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(SettingError, match=f"val_share is {share}: give a number in"):
        held_out_mask(torch.tensor([0, 1]), "ab", generator(), val_share=share)
