"""Groups, means, differences."""

import math
from pathlib import Path

import numpy as np
import pytest

from imbsam.report.comparison import (
    Group,
    baseline_first,
    data_difference,
    difference,
    group_runs,
    mean_and_deviation,
)
from imbsam.report.method import Method, method_of
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


def test_the_method_is_read_from_the_object_in_the_config(tmp_path, write_run):
    runs = {
        name: read_runs([write_run(tmp_path, name, method=name, rho=0.1, eta=30)])[0][0]
        for name in ("sgd", "sam", "imbsam", "focal_sam")
    }
    assert runs["sgd"].settings["sam"] == "Plain"  # a class without arguments
    methods = {name: run.method for name, run in runs.items()}
    assert methods == {
        "sgd": Method("plain training"),
        "sam": Method("SAM", 0.1),
        "imbsam": Method("ImbSAM", 0.1, 30),
        "focal_sam": Method("Focal-SAM", 0.1),
    }
    assert method_of({"sam": "MySAM", "sam.rho": 0.2, "sam.eta": 5}) == Method("MySAM", 0.2, 5)
    assert method_of({"sam": "CCSAM", "sam.rho": 0.2, "sam.eta": 20}) == Method("CC-SAM", 0.2)
    assert method_of({"sam": "GSAM", "sam.rho": 0.2, "sam.eta": 20}) == Method("GSAM", 0.2)
    assert method_of({"sam": "SSESAM", "sam.rho": 0.2, "sam.eta": 20}) == Method("SSE-SAM", 0.2, 20)
    assert method_of({"sam": "ImbSAM", "sam.rho": 0.0, "sam.eta": 5}) == Method("plain training")


def test_the_baseline_is_plain_training_and_not_the_first_of_the_alphabet(tmp_path, write_run):
    for name, method, settings in (
        ("a_doubled", "sgd", {"tail_weight": 2.0}),
        ("b_imbsam", "imbsam", {}),
        ("c_plain", "sgd", {"tail_weight": 1.0}),
    ):
        write_run(tmp_path, f"d/{name}", method=method, **settings)
    groups = group_runs(read_runs([tmp_path])[0])
    assert [group.name for group in groups] == ["d/a_doubled", "d/b_imbsam", "d/c_plain"]
    assert [group.name for group in baseline_first(groups)] == ["d/c_plain", "d/a_doubled", "d/b_imbsam"]
    assert baseline_first(groups[:2])[0].name == "d/a_doubled"
    assert baseline_first(groups[1:2])[0].name == "d/b_imbsam"  # none is plain
    assert baseline_first(groups, "d/b_imbsam")[0].name == "d/b_imbsam"
    with pytest.raises(ValueError, match="baseline is x: name one of d/a_doubled, d/b_imbsam, d/c_plain"):
        baseline_first(groups, "x")


def test_data_difference_is_seen_in_the_settings_or_in_the_test_samples(tmp_path, write_run):
    names = ["car", "bus", "van", "bike", "tram", "ship"]
    for name, settings in {
        "first": {"data": {"images_on_device": "auto"}},
        "loader": {"data": {"batch_size": 64, "num_workers": 2, "images_on_device": True}},
        "ratio": {"data": {"ratio": 10.0}},
        "names": {"names": names},
        "unknown": {"files": False},
    }.items():
        write_run(tmp_path, f"d/{name}", **settings)
    write_run(tmp_path, "d/seed", seed=5)
    groups = {group.name: group for group in group_runs(read_runs([tmp_path])[0])}
    reasons = {name: data_difference(group, groups["d/first"]) for name, group in groups.items()}
    assert reasons == {
        "d/first": "",
        "d/loader": "",
        "d/seed": "",
        "d/unknown": "",
        "d/ratio": "ratio 10.0, not 50.0",
        "d/names": "other classes",
    }
