"""Which rows the extra passes run on."""

import itertools

import pytest

from imbsam.extra_passes import extra_pass_rows, pass_size


def test_pass_sizes_are_few_and_waste_little():
    sizes = sorted({pass_size(n) for n in range(1, 257)})
    assert sizes[:21] == [*range(2, 33, 2), 36, 40, 44, 48, 52]
    assert len(sizes) == 40
    assert all(n <= pass_size(n) <= max(n + 1, 1.125 * n) for n in range(2, 257))


@pytest.mark.parametrize("context_rows", [0, 1, 7, 100])
@pytest.mark.parametrize("sharp", [[0], [31], [3, 4, 5, 30], list(range(20)), list(range(32))])
def test_sharp_rows_come_first_then_evenly_spaced_others(sharp, context_rows):
    rows = extra_pass_rows(sharp, 32, context_rows)
    assert rows[: len(sharp)] == sharp
    assert len(set(rows)) == len(rows) == min(32, pass_size(len(sharp) + context_rows))
    assert set(rows) <= set(range(32))
    others = rows[len(sharp) :]
    assert others == sorted(others)
    left = [r for r in range(32) if r not in sharp]
    places = [left.index(r) for r in others]
    gaps = {b - a for a, b in itertools.pairwise(places)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_nothing_is_random():
    assert extra_pass_rows([2, 5], 64, 8) == extra_pass_rows([2, 5], 64, 8)


def test_a_pass_never_has_a_single_row_unless_the_batch_does():
    assert len(extra_pass_rows([1], 2, 0)) == 2
    assert extra_pass_rows([0], 1, 0) == [0]
