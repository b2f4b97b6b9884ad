"""Groups, means, differences."""

import math
from pathlib import Path

import numpy as np
import pytest

from imbsam.report.comparison import Group, difference, group_runs, mean_and_deviation
from imbsam.report.runs import Run, read_runs


def made_up(values: list[float], seeds: list[int], **settings: object) -> Group:
    runs = [
        Run(Path(f"x/version_{i}"), "x", (seed,), settings, {"test/all": value / 100}, {}, {})
        for i, (value, seed) in enumerate(zip(values, seeds, strict=True))
    ]
    return Group("x", runs)


def test_differences_are_paired_by_seed_where_they_can_be():
    first = made_up([50, 60, 70], [0, 1, 2])
    other = made_up([72, 53, 61], [2, 0, 1])  # by seed: +3, +1, +2
    mean, error = difference(other, first, "test/all")
    assert mean == pytest.approx(2)
    assert error == pytest.approx(np.std([3, 1, 2], ddof=1) / math.sqrt(3))
    unpaired = made_up([72, 53, 61], [2, 0, 5])
    mean, error = difference(unpaired, first, "test/all")
    variances = np.var([72, 53, 61], ddof=1), np.var([50, 60, 70], ddof=1)
    assert mean == pytest.approx(2)
    assert error == pytest.approx(math.sqrt(sum(variances) / 3))
    assert difference(made_up([51], [0]), first, "test/all") == (pytest.approx(-9), None)


def test_mean_and_sample_standard_deviation():
    assert mean_and_deviation([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert mean_and_deviation([1.0]) == (1.0, None)


def test_groups_are_named_after_their_folder_and_what_differs_in_it(tmp_path, write_run):
    for rho in (0.05, 0.1):
        for seed in (0, 1):
            write_run(tmp_path, "digits/imbsam", seed, method="imbsam", rho=rho, eta=None if rho == 0.05 else 5)
    write_run(tmp_path, "digits/sgd", method="sgd", rho=0.05)
    write_run(tmp_path / "again", "digits/sgd", method="sgd", rho=0.05)
    groups = group_runs(read_runs([tmp_path / "digits", tmp_path / "again"])[0])
    names = [group.name for group in groups]
    assert names[:2] == ["digits/imbsam rho=0.05 eta=None", "digits/imbsam rho=0.1 eta=5"]
    assert [len(group.runs) for group in groups] == [2, 2, 1, 1]
    assert len(set(names)) == 4
    assert all(name.startswith("digits/sgd (") for name in names[2:])
