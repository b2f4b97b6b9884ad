import csv

import pytest

from datamodules import ImageListLTDataModule
from imbsam import SettingError

SMALL = {"image_size": 8, "num_workers": 0}


def test_a_column_tells_the_parts_apart(image_list):
    data = ImageListLTDataModule(image_list, split_column="split", **SMALL)
    data.prepare_data()
    data.setup("fit")
    assert (data.class_names, data.class_counts.tolist()) == (["ant", "bee", "cat", "dog"], [120, 30, 5, 3])
    assert [len(part) for part in (data._train, data._val, data._test)] == [158, 8, 12]
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 8
    with pytest.raises(
        SettingError, match=r"val_share is 0\.1, but ImageListLTDataModule has validation samples of its own"
    ):
        ImageListLTDataModule(image_list, split_column="split", val_share=0.1).prepare_data()


def test_a_single_list_gives_shares_to_test_and_validation(image_list):
    data = ImageListLTDataModule(image_list, val_share=0.25, **SMALL)
    data.setup("fit")
    assert [len(part) for part in (data._train, data._val, data._test)] == [106, 36, 36]
    assert not data.own_validation


def table(path, rows, header=("path", "label")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_files_for_each_part_and_columns_by_name(tmp_path):
    header = ("image", "species")
    train = table(tmp_path / "train.csv", [("a b.jpg", "10"), ("c.jpg", "9")], header)
    test = table(tmp_path / "test.csv", [("d.jpg", "9")], header)
    columns = {"path_column": "image", "label_column": "species"}
    with pytest.raises(
        SettingError, match=r"train.csv has labels up to 10, but no training image of 0, 1, 2, 3, 4 and 4 more"
    ):
        assert ImageListLTDataModule(train, test, test, **columns).splits
    table(train, [("a b.jpg", "1"), ("c.jpg", " 0")], header)
    table(test, [("d.jpg", "1")], header)
    splits = ImageListLTDataModule(train, test, test, root=tmp_path, **columns).splits
    assert splits.class_names == ["0", "1"]
    assert [part.labels.tolist() for part in splits.parts()] == [[1, 0], [1], [1]]
    assert splits.train.paths.tolist() == [b"a b.jpg", b"c.jpg"]


@pytest.mark.parametrize("labels", [[0, 1, 1], ["x", "y", "y"]])
def test_parquet(tmp_path, labels):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "list.parquet"
    columns = {"path": ["a.jpg", "b.jpg", "c.jpg"], "label": labels, "more": [1.5, None, 2.0]}
    parquet.write_table(pyarrow.table(columns), path)
    splits = ImageListLTDataModule(path, test_path=path).splits
    assert (splits.class_names, splits.train.labels.tolist()) == ([str(v) for v in labels[:2]], [0, 1, 1])
    path.write_bytes(b"PAR1")
    with pytest.raises(SettingError, match=r"list.parquet, which is no table"):
        assert ImageListLTDataModule(path, test_path=path).splits


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([("a.jpg", "0"), ("b.jpg", "1"), ("c.jpg", "3")], ("path", "label"), r"no training image of 2: number the"),
        ([("a.jpg", "x"), ("b.jpg", "")], ("path", "label"), r"label is missing in data row 2"),
        ([("a.jpg", "x")], ("file", "label"), r"has no column path: it has file, label; set data.path_column"),
        ([], ("path", "label"), "lists no image"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, rows, header, message):
    path = table(tmp_path / "list.csv", rows, header)
    with pytest.raises(SettingError, match=message) as caught:
        ImageListLTDataModule(path, test_path=path).prepare_data()
    assert "\n" not in str(caught.value)


def test_wrong_parts_and_files(tmp_path):
    path = table(tmp_path / "list.csv", [("a.jpg", "x", "train"), ("b.jpg", "y", "dev")], ("path", "label", "split"))
    with pytest.raises(SettingError, match="split_column is split, which has dev: write train, val or test"):
        ImageListLTDataModule(path, split_column="split").prepare_data()
    test = table(tmp_path / "test.csv", [("c.jpg", "z")])
    with pytest.raises(SettingError, match=r"test.csv \(test\) has classes without a training image: z"):
        ImageListLTDataModule(path, test_path=test).prepare_data()
    with pytest.raises(SettingError, match=r"2 of the 2 images in .*list.csv .* are not in .*: a.jpg, b.jpg"):
        ImageListLTDataModule(path, test_path=path).prepare_data()
    with pytest.raises(SettingError, match="there is no such file"):
        ImageListLTDataModule(tmp_path / "none.csv").prepare_data()
    with pytest.raises(SettingError, match=r"give a file that ends in \.csv, \.tsv, \.parquet"):
        ImageListLTDataModule(table(tmp_path / "list.txt", [])).prepare_data()


def test_numbers_with_leading_zeros_are_names(tmp_path):
    path = table(tmp_path / "list.csv", [("a.jpg", "10"), ("b.jpg", "09"), ("c.jpg", "08")])
    splits = ImageListLTDataModule(path, test_path=path).splits
    assert (splits.class_names, splits.train.labels.tolist()) == (["08", "09", "10"], [2, 1, 0])


def test_two_lists_of_test_images(tmp_path):
    path = table(tmp_path / "list.csv", [("a.jpg", "x", "train"), ("b.jpg", "x", "test")], ("path", "label", "split"))
    test = table(tmp_path / "test.csv", [("c.jpg", "x")])
    with pytest.raises(
        SettingError, match=r"split_column is split, which has test images, and data.test_path=.*test.csv lists"
    ):
        ImageListLTDataModule(path, split_column="split", test_path=test).prepare_data()
