import math

import pytest
import torch

from imbsam.checks import check_numbers, check_whole_numbers
from imbsam.errors import SettingError


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "8", None, [8, 0], (1, 2.0)])
def test_anything_but_a_whole_number_is_refused(value):
    with pytest.raises(SettingError, match=r"^width is .*: give .*whole numbers? from 1$"):
        check_whole_numbers(depth=3, width=value)


def test_valid_settings_pass():
    check_whole_numbers(width=1, hidden=[], sizes=(3, 4))
    check_whole_numbers(0, num_workers=0)
    with pytest.raises(SettingError, match=r"num_workers is -1: give a whole number from 0$"):
        check_whole_numbers(0, num_workers=-1)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, True, "8", None, [1.0]])
def test_anything_but_a_number_from_0_is_refused(value):
    with pytest.raises(SettingError, match=r"^rho is .*: give a finite number from 0 \(0.05 is usual\)$"):
        check_numbers(sigma=0, rho=value, hint="0.05 is usual")


def test_zero_and_infinity_pass_where_they_are_valid():
    check_numbers(eta=math.inf, beta=torch.tensor(2.0), finite=False)
    with pytest.raises(SettingError, match=r"^scale is 0: give a finite number above 0$"):
        check_numbers(scale=0, above=True)
