import pytest

from imbsam.checks import check_whole_numbers
from imbsam.errors import SettingError


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "8", None, [8, 0], (1, 2.0)])
def test_what_is_no_whole_number_is_named(value):
    with pytest.raises(SettingError, match=r"^width is .*: give .*whole numbers? from 1$"):
        check_whole_numbers(depth=3, width=value)


def test_what_can_work_is_let_through():
    check_whole_numbers(width=1, hidden=[], sizes=(3, 4))
    check_whole_numbers(0, num_workers=0)
    with pytest.raises(SettingError, match=r"num_workers is -1: give a whole number from 0$"):
        check_whole_numbers(0, num_workers=-1)
