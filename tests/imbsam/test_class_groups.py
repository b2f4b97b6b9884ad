import numpy as np
import pytest
import torch
from torch.testing import assert_close

from imbsam.class_groups import class_counts_tensor, class_groups, focal_sharpness, tail_mask
from imbsam.errors import SettingError

COUNTS = [500, 101, 100, 99, 21, 20, 19, 1, 0]


@pytest.mark.parametrize(
    "counts",
    [[3, 0, 7], (3, 0, 7), torch.tensor([3, 0, 7], dtype=torch.int16), np.array([3, 0, 7], dtype=np.uint8)],
)
def test_counts_become_int64_on_the_cpu(counts):
    result = class_counts_tensor(counts)
    assert result.dtype == torch.int64
    assert result.device.type == "cpu"
    assert result.tolist() == [3, 0, 7]


def test_counts_do_not_share_memory():
    given = torch.tensor([3, 4])
    array = np.array([3, 4])
    for source in (given, array):
        result = class_counts_tensor(source)
        result[0] = -1
        assert int(source[0]) == 3


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ([], r"shape \(0,\)"),
        ([[1, 2], [3, 4]], r"shape \(2, 2\)"),
        (5, r"shape \(\)"),
        ([1.0, 2.0], "integers"),
        ([True, False], "integers"),
        ([3, -2], "-2.*class 1"),
        (["many"], "many"),
        (None, "None"),
    ],
)
def test_bad_counts_are_refused_in_one_line(counts, says):
    with pytest.raises(SettingError, match=says) as caught:
        class_counts_tensor(counts)
    assert "class_counts" in str(caught.value)
    assert "\n" not in str(caught.value)


class Table:
    def __repr__(self):
        return "0  5\n1  7"


@pytest.mark.parametrize("counts", [torch.full((1000,), 0.5), Table()])
def test_a_bad_value_stays_one_short_line(counts):
    with pytest.raises(SettingError) as caught:
        class_counts_tensor(counts)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("eta", [0, 1, 19.5, 20, 100, float("inf")])
def test_tail_is_fewer_than_eta(eta):
    assert tail_mask(COUNTS, eta).tolist() == [n < eta for n in COUNTS]


def test_tail_default_is_the_papers_20():
    assert tail_mask(COUNTS).tolist() == [n < 20 for n in COUNTS]


@pytest.mark.parametrize(
    ("named", "mask"),
    [([0, 2], [True, False, True]), ([], [False] * 3), (torch.tensor([1]), [False, True, False])],
)
def test_named_tail_classes_are_exactly_those(named, mask):
    assert tail_mask([1, 2, 3], eta=20, tail_classes=named).tolist() == mask


@pytest.mark.parametrize("eta", [float("nan"), -1, -0.5, "twenty"])
@pytest.mark.parametrize("named", [None, [0]])
def test_bad_eta_is_refused(eta, named):
    with pytest.raises(SettingError, match="eta is"):
        tail_mask([1, 2], eta=eta, tail_classes=named)


@pytest.mark.parametrize("index", [-1, 3, 1.5, True, "cat"])
def test_unknown_tail_class_is_refused(index):
    with pytest.raises(SettingError, match=r"tail_classes.*0\.\.2"):
        tail_mask([1, 2, 3], tail_classes=[0, index])


def test_groups_at_their_borders():
    groups = class_groups(COUNTS)
    assert list(groups) == ["many", "medium", "few"]
    assert groups["many"].tolist() == [n > 100 for n in COUNTS]
    assert groups["medium"].tolist() == [20 <= n <= 100 for n in COUNTS]
    assert groups["few"].tolist() == [n < 20 for n in COUNTS]


@pytest.mark.parametrize(("many", "few"), [(100, 20), (50, 10), (0, 0), (7, 8), (10**9, 0), (20, 20)])
def test_groups_are_disjoint_and_cover(many, few):
    masks = torch.stack(list(class_groups(COUNTS, many, few).values()))
    assert masks.dtype == torch.bool
    assert masks.sum(0).tolist() == [1] * len(COUNTS)


@pytest.mark.parametrize(("many", "few"), [(100, 102), (-1, 0), (10, -3), (float("nan"), 0)])
def test_bad_thresholds_are_refused(many, few):
    with pytest.raises(SettingError, match=r"(many|few) is"):
        class_groups(COUNTS, many, few)


@pytest.mark.parametrize(("lam", "gamma"), [(1.0, 0.0), (0.8, 1.0), (1.1, 2.5), (0.0, 1.0)])
def test_focal_sharpness_is_its_formula(lam, gamma):
    n = np.asarray(COUNTS, dtype=np.float64)
    expected = lam * np.power(1 - n / n.sum(), gamma)
    result = focal_sharpness(COUNTS, lam, gamma)
    assert result.dtype == torch.float64
    assert_close(result, torch.from_numpy(expected), rtol=1e-14, atol=0)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["focal_lambda", "focal_gamma"])
def test_focal_settings_out_of_range_are_refused(name, value):
    settings = {"focal_lambda": 1.0, "focal_gamma": 1.0, name: value}
    with pytest.raises(SettingError, match=f"{name} is"):
        focal_sharpness([3, 1], **settings)


def test_focal_sharpness_without_any_sample_is_refused():
    with pytest.raises(SettingError, match="class_counts"):
        focal_sharpness([0, 0], 1.0, 1.0)
