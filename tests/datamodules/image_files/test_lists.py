import os

import pytest
import torch

from datamodules.image_files.lists import (
    ImageSplits,
    ListedImages,
    check_classes,
    folder_names,
    hold_out_test,
    read_txt,
)
from imbsam import SettingError


def listed(*lines, source="train.txt"):
    return ListedImages.from_paths(source, [path for path, _ in lines], [label for _, label in lines])


def texts(images):
    return [os.fsdecode(path) for path in images.paths]


def test_reads_lines_of_path_and_label(tmp_path):
    (tmp_path / "list.txt").write_bytes("a/b.jpg 0\n\n with spaces/c d.jpg  12\r\né/é.jpg 3\n".encode())
    images = read_txt(tmp_path / "list.txt")
    assert texts(images) == ["a/b.jpg", "with spaces/c d.jpg", "é/é.jpg"]
    assert (images.labels.tolist(), images.labels.dtype) == ([0, 12, 3], torch.int64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg 0\na.jpg\n", "line 2 is 'a.jpg': write a path and a label from 0"),
        ("a.jpg -1\n", "line 1 is 'a.jpg -1'"),
        ("a.jpg 1.0\n", "line 1 is 'a.jpg 1.0'"),
        ("\n\n", "lists no image"),
    ],
)
def test_says_which_line_is_wrong(tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(SettingError, match=message):
        read_txt(tmp_path / "list.txt")


def test_a_gap_in_the_labels_is_named():
    train = listed(("a", 0), ("b", 1), ("c", 3))
    with pytest.raises(SettingError, match=r"train.txt has no image of class 2: add some, .* without gaps"):
        check_classes(ImageSplits(folder_names(train), train, train))
    with pytest.raises(SettingError, match=r"no image of class 2 \(cat\)"):
        check_classes(ImageSplits(["ant", "bee", "cat", "dog"], train, train))


def test_labels_without_a_class_are_named():
    train, test = listed(("a", 0), ("b", 1)), listed(("c", 2), ("d", 7), source="test.txt")
    with pytest.raises(SettingError, match=r"test.txt has labels 2, 7, and train.txt has the 2 classes 0 to 1"):
        check_classes(ImageSplits(["ant", "bee"], train, test))


def test_classes_are_named_after_folders_where_these_are_one_to_one():
    assert folder_names(listed(("t/ant/1", 1), ("t/bee/1", 0), ("t/ant/2", 1))) == ["bee", "ant"]
    assert folder_names(listed(("t/ant/1", 1), ("t/ant/3", 0))) == ["0", "1"]
    assert folder_names(listed(("1.jpg", 0), ("2.jpg", 1))) == ["0", "1"]


def test_the_test_part_is_the_same_share_of_every_class():
    counts = torch.tensor([50, 10, 2, 1])
    images = listed(*((str(i), label) for i, label in enumerate(torch.arange(4).repeat_interleave(counts).tolist())))
    with pytest.warns(UserWarning, match="classes with a single sample: dog"):
        train, test = hold_out_test(images, ["ant", "bee", "cat", "dog"], 0.2)
    assert torch.bincount(test.labels, minlength=4).tolist() == [10, 2, 1, 0]
    assert sorted(texts(train) + texts(test), key=int) == texts(images)
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match="dog"):
        assert texts(hold_out_test(images, ["ant", "bee", "cat", "dog"], 0.2)[1]) == texts(test)
    for share in (0, 1):
        with pytest.raises(SettingError, match=rf"test_share is {share}: give a number in \(0, 1\)"):
            hold_out_test(images, ["ant", "bee", "cat", "dog"], share)


def test_a_duplicate_path_is_kept_once():
    with pytest.warns(UserWarning, match=r"train.txt lists 2 images more than once, such as a.jpg: each is kept once"):
        images = listed(("a.jpg", 0), ("b.jpg", 1), ("./a.jpg", 0), ("b.jpg", 1))
    assert (texts(images), images.labels.tolist()) == (["a.jpg", "b.jpg"], [0, 1])


def test_an_image_with_two_labels_is_refused():
    with pytest.raises(SettingError, match=r"train.txt: a.jpg has two labels, 0 and 1: keep one"):
        listed(("a.jpg", 0), ("b.jpg", 1), ("a.jpg", 1))
    with pytest.raises(SettingError, match=r"a.jpg has two labels, ant and bee: keep one"):
        ListedImages.from_paths("train.csv", ["a.jpg", "a.jpg"], [0, 1], ["ant", "bee"])
    train, test = listed(("a.jpg", 0), ("b.jpg", 1)), listed(("b.jpg", 0), source="test.txt")
    with pytest.raises(SettingError, match=r"b.jpg has two labels, bee in train.txt and ant in test.txt"):
        check_classes(ImageSplits(["ant", "bee"], train, test))


@pytest.mark.parametrize("names", [["Flugzeug", "flugzeug"], ["barn owl", "barn  owl"], ["Käfer", "Ka\u0308fer"]])
def test_names_that_look_alike_are_warned_of(names):
    train = listed(("a.jpg", 0), ("b.jpg", 1))
    with pytest.warns(UserWarning, match=f"train.txt has the classes {names[0]!r} and {names[1]!r}, which count as"):
        check_classes(ImageSplits(names, train, train))


def test_a_single_class_is_refused():
    train = listed(("a.jpg", 0), ("b.jpg", 0))
    with pytest.raises(SettingError, match=r"train.txt has a single class, ant, and a classifier needs two"):
        check_classes(ImageSplits(["ant"], train, train))
