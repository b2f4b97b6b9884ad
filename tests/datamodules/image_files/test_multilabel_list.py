import csv

import pytest
import torch
from PIL import Image

from datamodules import MultiLabelImageListDataModule
from imbsam import SettingError

SMALL = {"image_size": 8, "num_workers": 0}
ROWS = [
    ("a.png", "effusion;nodule", "train"),
    ("b.png", " nodule ; effusion", "train"),
    ("c.png", "effusion", "train"),
    ("d.png", "mass", "train"),
    ("e.png", "effusion; mass", "val"),
    ("f.png", "nodule", "test"),
]
NAMES = ["effusion", "mass", "nodule"]


@pytest.fixture
def folder(tmp_path):
    for i, (name, _, _) in enumerate(ROWS):
        Image.new("RGB", (10, 10), (40 * i, 0, 0)).save(tmp_path / name)
    return tmp_path


def table(path, rows, header=("path", "labels", "split"), delimiter=","):
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


def labels_of(data):
    return [part.labels.tolist() for part in data.splits.parts()]


WANTED = [[[1, 0, 1], [1, 0, 1], [1, 0, 0], [0, 1, 0]], [[1, 1, 0]], [[0, 0, 1]]]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_several_labels_in_a_cell(folder, delimiter):
    data = MultiLabelImageListDataModule(
        table(folder / "all.csv", ROWS, delimiter=delimiter), split_column="split", **SMALL
    )
    data.prepare_data()
    data.setup("fit")
    assert (data.class_names, labels_of(data)) == (NAMES, WANTED)
    assert data.label_counts.tolist() == [[1, 3], [3, 1], [2, 2]]
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, labels.shape, labels.dtype) == ((4, 3, 8, 8), (4, 3), torch.int64)
    assert [y.tolist() for _, y in data.val_dataloader()] == [[[1, 1, 0]]]
    images, labels, paths = next(iter(data.predict_dataloader()))
    assert list(paths) == ["f.png"]


@pytest.mark.parametrize("one", ["1", "1.0", "True"])
def test_one_column_a_label(folder, one):
    zero = {"1": "0", "1.0": "0.0", "True": "False"}[one]
    rows = [(name, *(one if c in cell else zero for c in NAMES), split) for name, cell, split in ROWS]
    path = table(folder / "all.csv", rows, ("path", *NAMES, "split"))
    data = MultiLabelImageListDataModule(path, label_columns=NAMES, split_column="split", **SMALL)
    assert (data.splits.class_names, labels_of(data)) == (NAMES, WANTED)


def test_parquet(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    paths, cells, _ = zip(*ROWS, strict=True)
    columns = {
        "path": paths,
        "labels": cells,
        "effusion": [1, 1, 1, 0, 1, 0],
        "mass": [False] * 3 + [True] * 2 + [False],
    }
    parquet.write_table(pyarrow.table({k: list(v) for k, v in columns.items()}), folder / "list.parquet")
    data = MultiLabelImageListDataModule(folder / "list.parquet", test_share=0.4)
    assert sum(map(len, data.splits.parts())) == 6
    data = MultiLabelImageListDataModule(folder / "list.parquet", label_columns=["effusion", "mass"], test_share=0.4)
    assert torch.cat([part.labels for part in data.splits.parts()]).sum(0).tolist() == [4, 2]


def test_a_separator_and_classes_of_your_own(folder):
    rows = [(name, cell.replace(";", "|"), split) for name, cell, split in ROWS]
    settings = {"separator": "|", "class_names": ["mass", "nodule", "effusion"], "split_column": "split"}
    data = MultiLabelImageListDataModule(table(folder / "all.csv", rows), **settings, **SMALL)
    assert data.splits.class_names == ["mass", "nodule", "effusion"]
    assert data.splits.train.labels[0].tolist() == [0, 1, 1]


def test_images_without_a_label_and_a_test_share(folder):
    rows = [(name, "" if name == "d.png" else cell) for name, cell, _ in ROWS]
    path = table(folder / "all.csv", rows, ("path", "labels"))
    with pytest.raises(SettingError, match=r"image 4 has no label: .*data.allow_empty to true"):
        assert MultiLabelImageListDataModule(path).splits
    data = MultiLabelImageListDataModule(path, allow_empty=True, test_share=0.5, **SMALL)
    train, test = data.splits.parts()
    assert len(train) + len(test) == 6
    assert (torch.cat([train.labels, test.labels]).sum(1) == 0).sum() == 1
    again = MultiLabelImageListDataModule(path, allow_empty=True, test_share=0.5, seed=5, **SMALL)
    assert again.splits.test.paths.tolist() == test.paths.tolist()


def change(row, cell):
    return [(n, cell if i == row else c, s) for i, (n, c, s) in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (
            change(5, "nodul"),
            {},
            r"all.csv \(test\), image 1 has the label nodul, which is not among the training images'",
        ),
        (
            change(0, "effusion,nodule"),
            {"class_names": NAMES},
            r"label effusion,nodule, .*data.class_names .*separator",
        ),
        (change(2, ""), {}, r"all.csv \(train\), image 3 has no label"),
        (change(0, ""), {"label_columns": ["labels"]}, r"labels is missing in data row 1"),
        (change(0, "2"), {"label_columns": ["labels"]}, r"image 1: labels is '2': write 1 if the image has it, else 0"),
        (ROWS, {"label_columns": ["mass"]}, r"has no column mass"),
        ([*ROWS, ("a.png", "mass", "train")], {}, r"a.png has two labels, effusion;nodule and mass: keep one"),
        ([("a.png", "", "train")], {"allow_empty": True}, r"has no label: name classes in column labels"),
    ],
)
def test_bad_tables_are_one_line(folder, rows, settings, message):
    data = MultiLabelImageListDataModule(table(folder / "all.csv", rows), split_column="split", **settings)
    with pytest.raises(SettingError, match=message) as error:
        assert data.splits
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"separator": ""}, "^separator is ''"),
        ({"class_names": ["a", "a"]}, "^class_names is .* name each class once"),
        ({"label_columns": []}, "^label_columns is "),
        ({"label_columns": ["a"], "class_names": ["a"]}, "^class_names and label_columns are both set"),
        ({"sampling": "class_balanced"}, "^sampling is "),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(SettingError, match=message):
        MultiLabelImageListDataModule("all.csv", **settings)


def test_a_class_that_only_validation_has(folder):
    data = MultiLabelImageListDataModule(
        table(folder / "all.csv", ROWS), split_column="split", class_names=[*NAMES, "hernia"], **SMALL
    )
    with pytest.raises(SettingError, match="no training sample has class hernia"):
        data.setup("fit")


def test_a_damaged_image_is_replaced_by_one_with_the_same_labels(folder):
    path = table(folder / "all.csv", ROWS)
    (folder / "a.png").write_bytes(b"no image")
    data = MultiLabelImageListDataModule(path, split_column="split", corrupt_images="skip", augment="none", **SMALL)
    data.setup("fit")
    with pytest.warns(UserWarning, match="a.png is corrupt"):
        image, labels = data._train[0]
    torch.testing.assert_close(image, data._train[1][0])
    assert labels.tolist() == [1, 0, 1]
    (folder / "d.png").write_bytes(b"no image")
    with (
        pytest.warns(UserWarning, match="corrupt"),
        pytest.raises(SettingError, match=r"d.png is corrupt and no other training image has"),
    ):
        assert data._train[3]
    (folder / "f.png").write_bytes(b"no image")
    data.use_preprocessing(mean=[0.1] * 3)  # of a pretrained model: an empty batch has C labels all the same
    with pytest.warns(UserWarning, match="it is left out"):
        images, labels = next(iter(data.test_dataloader()))
    assert (images.shape, labels.shape) == ((0, 3, 8, 8), (0, 3))
