"""Tables as people have them: semicolons, tabs, decimal commas."""

import csv

import numpy as np
import pytest
import torch

from datamodules import AnomalyDataModule, ImageListLTDataModule
from datamodules.tables.separators import text_format
from imbsam import SettingError


def write(path, separator, decimal="."):
    """Amount, a text with a comma in it, holes, and the label; 80 rows."""
    random = np.random.default_rng(0)
    rows = [
        [f"{random.normal():.3f}".replace(".", decimal), ["a, b", "c"][i % 2], "" if i % 7 == 0 else i, int(i % 8 == 0)]
        for i in range(80)
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows([["amount", "kind", "count", "fraud"], *rows])
    return path


@pytest.mark.parametrize(
    ("name", "separator", "decimal", "said"),
    [
        ("mine.csv", ";", ".", "mine.csv: the file is separated by semicolons"),
        ("mine.csv", ";", ",", "mine.csv: the file is separated by semicolons and has decimal commas"),
        ("mine.csv", "\t", ".", "mine.csv: the file is separated by tabs"),
        ("mine.tsv", "\t", ",", "mine.tsv: the file is separated by tabs and has decimal commas"),
    ],
)
def test_the_same_table_as_with_commas(tmp_path, caplog, name, separator, decimal, said):
    pytest.importorskip("pandas")
    (tmp_path / "plain").mkdir()
    tables = write(tmp_path / "plain/mine.csv", ","), write(tmp_path / name, separator, decimal)
    plain, other = (AnomalyDataModule(path, label="fraud") for path in tables)
    plain.setup("fit")
    assert "separated" not in caplog.text
    other.setup("fit")
    assert other.feature_names == plain.feature_names == ["amount", "count", "count missing", "kind=a, b", "kind=c"]
    assert torch.equal(other.train_features, plain.train_features)
    assert said in caplog.messages


@pytest.mark.parametrize(
    ("text", "separator", "header"),
    [
        ("path;label\na,b.jpg;x\nc.jpg;y\n", ";", ["path", "label"]),
        ('path,label\n"a;b.jpg",x\nc;d;e.jpg,y\n', ",", ["path", "label"]),
        ("path\na;b.jpg\n", ",", ["path"]),
        ("path\tnote, long\na.jpg\tx\n", "\t", ["path", "note, long"]),
        ('a;b\n"1\n2";3\n', ";", ["a", "b"]),
        ("", ",", []),
    ],
)
def test_the_separator_makes_as_many_columns_in_every_line(tmp_path, text, separator, header):
    (tmp_path / "list.csv").write_text(text)
    found = text_format(tmp_path / "list.csv")
    assert (found.separator, found.header) == (separator, header)


def test_a_list_of_images(tmp_path, caplog):
    (tmp_path / "list.csv").write_text("path;label\na,b.jpg;x\nc.jpg;y\n")
    splits = ImageListLTDataModule(tmp_path / "list.csv", test_path=tmp_path / "list.csv").splits
    assert (splits.train.paths.tolist(), splits.class_names) == ([b"a,b.jpg", b"c.jpg"], ["x", "y"])
    assert "list.csv: the file is separated by semicolons" in caplog.text


@pytest.mark.parametrize("day", ["2026-11-24", "24.11.2026 12:30", "11/24/2026"])
def test_dates_are_refused_with_the_fix(tmp_path, day):
    pytest.importorskip("pandas")
    rows = "".join(f"{i};{day};{int(i % 8 == 0)}\n" for i in range(79)) + "5;2025-01-01;0\n"
    (tmp_path / "mine.csv").write_text("a;day;fraud\n" + rows)
    with pytest.raises(SettingError) as error:
        AnomalyDataModule(tmp_path / "mine.csv", label="fraud").setup("fit")
    assert f"column day holds dates ({day}): make numbers of them, such as days since" in str(error.value)
    assert str(error.value).endswith("--data.drop_columns '[\"day\"]'")
