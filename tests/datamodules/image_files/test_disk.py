import os

import pytest

from datamodules.image_files.disk import check_files, images_below
from datamodules.image_files.lists import ListedImages
from imbsam import SettingError


def listed(*lines, source="train.txt"):
    return ListedImages.from_paths(source, [path for path, _ in lines], [label for _, label in lines])


def test_missing_files_are_counted_and_the_first_five_named(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/0.jpg", "a/1.jpg", "top.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "a/link.jpg").symlink_to("0.jpg")
    (tmp_path / "a/dangling.jpg").symlink_to("gone.jpg")
    (tmp_path / "a/loop.jpg").symlink_to("loop.jpg")
    there = listed(("a/0.jpg", 0), ("a/link.jpg", 0), ("top.jpg", 1), (str(tmp_path / "a/1.jpg"), 1), ("a/0.jpg", 0))
    assert check_files(tmp_path, [there], "") == 4
    missing = [("a/dangling.jpg", 0), ("a/loop.jpg", 0), *((f"none/{i}.jpg", 0) for i in range(5))]
    message = (
        rf"^7 of the 8 images in test.txt are not in {tmp_path}: a/dangling.jpg, a/loop.jpg, none/0.jpg, none/1.jpg, "
        r"none/2.jpg and 2 more\. Get them there\.$"
    )
    with pytest.raises(SettingError, match=message):
        check_files(tmp_path, [there, listed(("a/0.jpg", 0), *missing, source="test.txt")], "Get them there.")


def test_a_folder_is_read_once_and_no_file_is_asked_for(tmp_path, monkeypatch):
    for i in range(20):
        (tmp_path / f"{i}.jpg").touch()
    scanned, scan = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scanned.append(path) or scan(path))
    monkeypatch.setattr(os, "stat", lambda *args, **kw: pytest.fail("a stat"))
    monkeypatch.setattr(os.path, "exists", lambda *args: pytest.fail("a stat"))
    check_files(tmp_path, [listed(*((f"{i}.jpg", 0) for i in range(20)))], "")
    assert scanned == [tmp_path]


def test_images_below_a_folder_links_followed_once(tmp_path):
    (tmp_path / "class/deep").mkdir(parents=True)
    for name in ("class/deep/a.JPEG", "class/b.png", "class/.hidden.jpg", "class/notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/c.webp").touch()
    (tmp_path / "class/linked").symlink_to(tmp_path / "elsewhere")
    found = sorted(os.path.relpath(path, tmp_path) for path in images_below(tmp_path / "class"))
    assert found == ["class/b.png", "class/deep/a.JPEG", "class/linked/c.webp"]


@pytest.mark.parametrize(
    ("link", "target", "reason"),
    [
        ("deep/up", "..", "is a link to a folder that it lies in"),
        ("self", ".", "is a link to a folder that it lies in"),
        ("loop", "loop", "cannot be read: Too many levels"),
    ],
)
def test_links_in_a_circle_end_in_one_line(tmp_path, link, target, reason):
    (tmp_path / "deep").mkdir()
    (tmp_path / link).symlink_to(target)
    with pytest.raises(SettingError, match=rf"^{tmp_path}/{link} {reason}"):
        list(images_below(tmp_path))
