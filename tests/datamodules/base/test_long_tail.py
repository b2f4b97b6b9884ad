import pytest
import torch

from datamodules.base.long_tail import check_imbalance, imbalanced_class_counts
from imbsam.errors import SettingError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("largest", "num_classes", "ratio", "total"),
    [(500, 100, 100, 10_847), (500, 100, 50, 12_608), (500, 100, 10, 19_573), (5000, 10, 100, 12_406)],
)
def test_exponential_gives_the_benchmarks_sizes(largest, num_classes, ratio, total):
    counts = imbalanced_class_counts(largest, num_classes, ratio, "exponential")
    assert sum(counts) == total
    assert counts == [int(largest * (1 / ratio) ** (c / (num_classes - 1))) for c in range(num_classes)]
    assert counts[0] == largest
    assert counts[-1] == largest // ratio


@pytest.mark.parametrize(("num_classes", "frequent"), [(10, 5), (5, 3), (1, 1)])
def test_step_halves_the_classes(num_classes, frequent):
    counts = imbalanced_class_counts(120, num_classes, 50, "step")
    assert counts == [120] * frequent + [2] * (num_classes - frequent)


def test_profile_none_keeps_every_class_at_the_largest():
    assert imbalanced_class_counts(7, 3, 100, "none") == [7, 7, 7]


@pytest.mark.parametrize("profile", ["exponential", "step"])
def test_a_ratio_as_large_as_the_largest_class_leaves_one_sample(profile):
    # 49 * (1 / 49) is below 1 in floating point
    for largest in range(1, 200):
        assert imbalanced_class_counts(largest, 4, largest, profile)[-1] == 1


def test_a_single_class_keeps_its_samples():
    assert imbalanced_class_counts(9, 1, 3, "exponential") == [9]


@pytest.mark.parametrize(
    ("ratio", "profile", "message"),
    [
        (0.01, "exponential", r"ratio is 0\.01, .* give its inverse, 100 "),
        (0, "exponential", "ratio is 0: .* from 1"),
        (-3, "step", "ratio is -3: .* from 1"),
        (float("nan"), "step", "ratio is nan: .* from 1"),
        (10, "linear", "profile is 'linear': .* exponential, step, none"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(ratio, profile, message):
    with pytest.raises(SettingError, match=message) as caught:
        check_imbalance(ratio, profile)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ratio", [501, float("inf")])
@pytest.mark.parametrize("profile", ["exponential", "step"])
def test_a_ratio_that_empties_a_class_is_refused(ratio, profile):
    with pytest.raises(SettingError, match=f"ratio is {ratio}, .* at most 500"):
        imbalanced_class_counts(500, 10, ratio, profile)


def test_a_class_without_samples_is_refused():
    with pytest.raises(SettingError, match="largest is 0"):
        imbalanced_class_counts(0, 10, 10, "exponential")
