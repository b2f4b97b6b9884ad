"""Which images `data.predict` names."""

import os

import pytest

from datamodules import ImageFolderLTDataModule
from datamodules.image_files.images_to_predict import images_to_predict
from imbsam import SettingError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """new/b.jpg, new/deep/a.png, and what is no image, in the current folder."""
    for name in ("new/b.jpg", "new/deep/a.png", "new/notes.md", "empty/notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "root", "paths"),
    [
        ("new/b.jpg", ".", ["new/b.jpg"]),
        ("new/notes.md", ".", ["new/notes.md"]),
        ("new", "new", ["b.jpg", "deep/a.png"]),
        (["new/deep", "new/b.jpg"], ".", ["new/deep/a.png", "new/b.jpg"]),
        ("lists/list.txt", "lists", ["../new/b.jpg", "../new/deep/a.png"]),
        ("lists/list.csv", "lists", ["../new/deep/a.png", "../new/b.jpg"]),
    ],
)
def test_paths_as_they_are_named(folder, given, root, paths):
    (folder / "lists").mkdir()
    (folder / "lists/list.txt").write_text("../new/b.jpg\n\n../new/deep/a.png\n")
    (folder / "lists/list.csv").write_text("id;path\n1;../new/deep/a.png\n2;../new/b.jpg\n")
    found, images = images_to_predict(given)
    assert (str(found), [os.fsdecode(path) for path in images.paths]) == (root, paths)
    assert images.labels.tolist() == [-1] * len(paths)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere", "data.predict is nowhere: there is no such file or folder"),
        ("nowhere.txt", "data.predict is nowhere.txt: there is no such file or folder"),
        (["new", "nowhere"], "data.predict is nowhere: there is no such file or folder"),
        ("empty", "data.predict is empty, which has no images"),
        (
            "list.txt",
            "1 of the 2 images in list.txt are not in .: nowhere.png. Paths in a list are relative to its folder",
        ),
        ("table.csv", "table.csv has no column path: it has file, label"),
    ],
)
def test_what_is_not_there_is_one_line(folder, given, message):
    (folder / "list.txt").write_text("new/b.jpg\nnowhere.png\n")
    (folder / "table.csv").write_text("file,label\nnew/b.jpg,x\n")
    with pytest.raises(SettingError) as error:
        images_to_predict(given)
    assert message in str(error.value)


def test_nothing_else_is_read(image_folder_root):
    """The folder of the training data is gone."""
    data = ImageFolderLTDataModule("gone", predict=str(image_folder_root / "test"), image_size=8, num_workers=2)
    data.setup("predict")
    loader = data.predict_dataloader()
    assert loader.num_workers == 0  # a single batch is not worth starting processes for
    assert sum(len(paths) for _, _, paths in loader) == 12
    with pytest.raises(SettingError, match=r"data\.root is gone, which is no folder"):
        data.setup("fit")
