"""FeaturesDataModule: parts, copies and damaged files, on features made by hand."""

import re

import numpy as np
import pytest
import torch

from datamodules import FeaturesDataModule
from datamodules.features.files import Features, write_features
from imbsam.errors import SettingError

DESCRIPTION = {"class_names": ["ant", "bee"], "group_counts": [300, 7], "weights": "", "backbone": "net"}


def part(size, copies):
    """Sample i has the features i + copy / 10."""
    values = torch.arange(size)[:, None] + torch.arange(1 + copies) / 10
    return Features(values[..., None].expand(-1, -1, 3).contiguous(), (torch.arange(size) % 4 == 0).long())


def written(folder, copies=0, val=False):
    parts = {"train": part(20, copies), "test": part(8, 0), **({"val": part(4, 0)} if val else {})}
    write_features(folder / "f.npz", parts, DESCRIPTION)
    return folder / "f.npz"


def test_parts_counts_and_groups(tmp_path):
    data = FeaturesDataModule(written(tmp_path, val=True), batch_size=6)
    data.setup()
    assert data.class_counts.tolist() == [15, 5]
    assert (data.class_names, data.group_counts.tolist(), data.num_features) == (["ant", "bee"], [300, 7], 3)
    (x, y), *_ = data.val_dataloader()
    assert (x[:, 0].tolist(), y.tolist()) == ([0, 1, 2, 3], [1, 0, 0, 0])
    (x, _), *_ = data.test_dataloader()
    assert x.shape == (8, 3)
    assert sorted(v for x, _ in data.train_dataloader() for v in x[:, 2].tolist()) == list(range(20))


def test_a_part_of_the_training_samples_is_held_out_where_the_file_has_none(tmp_path):
    data = FeaturesDataModule(written(tmp_path), val_share=0.4, sampling="class_balanced")
    data.setup()
    held = [v for x, _ in data.val_dataloader() for v in x[:, 0].tolist()]
    kept = [v for x, _ in data.train_eval_dataloader() for v in x[:, 0].tolist()]
    assert (len(held), sorted(held + kept)) == (8, list(range(20)))
    assert data.class_counts.tolist() == [9, 3]


def test_training_draws_augmented_copies_and_evaluation_the_plain_one(tmp_path):
    data = FeaturesDataModule(written(tmp_path, copies=3))
    data.setup()
    loader = data.train_dataloader()
    drawn = {i: set() for i in range(20)}
    for epoch in range(30):
        loader.sampler.set_epoch(epoch)
        for x, _ in loader:
            for value in x[:, 0].double().tolist():
                drawn[int(value)].add(round(10 * (value % 1)))
    assert set.union(*drawn.values()) == {1, 2, 3}
    assert sum(len(copies) for copies in drawn.values()) > 50  # of 60
    assert [v for x, _ in data.train_eval_dataloader() for v in x[:, 0].tolist()] == list(range(20))


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def other(path):
    np.savez(path, images=np.zeros(3))


def older(path):
    write_features(path, {"train": part(4, 0), "test": part(4, 0)}, {**DESCRIPTION, "format": 0})


def without_test(path):
    write_features(path, {"train": part(4, 0)}, DESCRIPTION)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (cut, r"cannot be read \(.*\); make it with imbsam features again"),
        (flipped, r"cannot be read \(.*\); make it with imbsam features again"),
        (other, "which holds no features; make it with imbsam features"),
        (older, "in the format of another version of imbsam"),
        (without_test, r"cannot be read \('test'\)"),
        (lambda path: path.unlink(), "there is no such file; make it with imbsam features"),
    ],
)
def test_damaged_files_are_one_line(tmp_path, damage, line):
    path = written(tmp_path)
    damage(path)
    with pytest.raises(SettingError, match=f"^data.path is {re.escape(str(path))}.*{line}") as found:
        FeaturesDataModule(path).setup()
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("setting", ["mixup", "cutmix"])
def test_mixing_is_refused(setting):
    with pytest.raises(SettingError, match=f"data.{setting} is 0.2: it mixes images"):
        FeaturesDataModule("f.npz", **{setting: 0.2})


def test_a_validation_share_beside_a_validation_part_is_refused(tmp_path):
    with pytest.raises(SettingError, match=r"val_share is 0\.2, but FeaturesDataModule has validation samples"):
        FeaturesDataModule(written(tmp_path, val=True), val_share=0.2).setup()
