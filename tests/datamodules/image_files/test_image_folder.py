import os
import shutil

import pytest

from datamodules import ImageFolderLTDataModule
from imbsam import SettingError


def names_of(part):
    return [os.fsdecode(path) for path in part.paths]


def test_train_val_and_test(image_folder_root):
    splits = ImageFolderLTDataModule(image_folder_root).splits
    assert splits.class_names == ["ant", "bee", "cat", "dog"]
    assert [len(part) for part in splits.parts()] == [158, 8, 12]
    assert names_of(splits.test)[:2] == ["test/ant/test 0.jpg", "test/ant/test 1.jpg"]


def test_a_tree_without_parts_gives_a_share_of_each_class_to_the_test(image_folder_root):
    splits = ImageFolderLTDataModule(image_folder_root / "train").splits
    assert [len(part) for part in splits.parts()] == [126, 32]
    assert splits.test.labels.bincount().tolist() == [24, 6, 1, 1]
    other = ImageFolderLTDataModule(image_folder_root / "train", seed=5).splits
    assert names_of(other.test) == names_of(splits.test)  # nobody tests on what another seed trained on
    assert names_of(splits.train)[0].startswith("ant/train ")


def test_without_a_test_folder_the_training_images_give_their_share(image_folder_root, tmp_path):
    root = shutil.copytree(image_folder_root / "train", tmp_path / "train").parent
    splits = ImageFolderLTDataModule(root, test_share=0.5).splits
    assert splits.test.labels.bincount().tolist() == [60, 15, 2, 2]


def test_subsampled_to_a_ratio(image_folder_root):
    data = ImageFolderLTDataModule(image_folder_root, ratio=3, profile="exponential", num_workers=0)
    data.setup("fit")
    assert data.class_counts.tolist() == [3, 2, 1, 1]


def test_its_own_validation_folder_takes_no_share(image_folder_root):
    with pytest.raises(
        SettingError, match=r"val_share is 0\.1, but ImageFolderLTDataModule has validation samples of its own"
    ):
        ImageFolderLTDataModule(image_folder_root, val_share=0.1)


@pytest.fixture
def root(tmp_path):
    for name in ("train/ant/a.jpg", "train/bee/b.jpg", "test/ant/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def empty_class(root):
    (root / "train/cat").mkdir()
    (root / "train/cat/notes.txt").touch()


def unknown_class(root):
    (root / "test/cat").mkdir()


def loop(root):
    (root / "train/ant/again").symlink_to(root / "train")


def no_train(root):
    (root / "train").rename(root / "learn")


def no_class(root):
    shutil.rmtree(root / "train")
    (root / "train").mkdir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (empty_class, r"train has classes without an image \(.jpg, .*\): cat: fill or remove them"),
        (unknown_class, r"test has classes that .*train does not have: cat"),
        (loop, r"train/ant/again is a link to a folder that it lies in: remove the link"),
        (no_train, r"which has test but no train"),
        (no_class, r"train has no folders: make one for each class"),
        (shutil.rmtree, r"data.root is .*, which is no folder"),
    ],
)
def test_what_is_wrong_is_one_line(root, change, message):
    change(root)
    with pytest.raises(SettingError, match=message) as caught:
        ImageFolderLTDataModule(root).prepare_data()
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_read_is_named(root):
    shutil.copytree(root / "test", root / "valid")
    with pytest.warns(UserWarning, match="only train, val and test are read, not valid"):
        assert ImageFolderLTDataModule(root).splits
