import gc
import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from datamodules.image_files.dataset import ImageFiles, ReadableImages, UnreadableImage
from imbsam import SettingError


@pytest.fixture
def folder(tmp_path):
    """Images 0 to 4 of class 0 and 5 to 7 of class 1, each as bright as its number; 1, 2 and 7 are damaged."""
    for i in range(8):
        Image.new("RGB", (64, 64), (20 * i,) * 3).save(tmp_path / f"{i}.jpg")
    (tmp_path / "1.jpg").write_bytes(b"")
    (tmp_path / "2.jpg").write_bytes((tmp_path / "2.jpg").read_bytes()[:-40])
    (tmp_path / "7.jpg").write_text("<html>404</html>")
    return tmp_path


def brightness(image):
    return torch.tensor(image.getpixel((0, 0))[0])


def files(folder, **settings):
    paths = np.array([f"{i}.jpg".encode() for i in range(8)])
    labels = torch.tensor([0] * 5 + [1] * 3)
    return ImageFiles(folder, paths, labels, ["ant", "bee"], brightness, **settings)


@pytest.mark.parametrize(
    ("index", "reason"), [(1, "the file is empty"), (2, ".*[Tt]runcated.*"), (7, "the file is not an image")]
)
def test_a_damaged_image_is_named_and_fatal(folder, index, reason):
    message = rf"image {folder}/{index}.jpg is corrupt: {reason}: .* set data.corrupt_images to skip$"
    with pytest.raises(UnreadableImage, match=message):
        files(folder)[index]


def test_out_of_a_worker_it_is_still_one_line(folder):
    loader = DataLoader(files(folder), num_workers=1, batch_size=2)
    with pytest.raises(SettingError, match=rf"^image {folder}/1.jpg is corrupt: the file is empty: .*skip$") as caught:
        list(loader)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_in_training_the_next_readable_image_of_the_class_takes_its_place(folder, num_workers):
    data = files(folder, corrupt_images="skip", replace_damaged=True)
    loader = DataLoader(data, batch_size=2, num_workers=num_workers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            batches = [(values.tolist(), labels.tolist()) for values, labels in loader]
            assert batches == [([0, 60], [0, 0]), ([60, 60], [0, 0]), ([80, 100], [0, 1]), ([120, 100], [1, 1])]
    assert data.damaged.nonzero().flatten().tolist() == [1, 2, 7]  # found by the workers
    if num_workers == 0:  # once a file
        assert sorted(str(w.message).split()[1][-5] for w in caught) == ["1", "2", "7"]
        first = str(caught[0].message)
        assert (
            "1.jpg is corrupt: the file is empty; another image of its class takes its place (rank 0, worker" in first
        )
    del loader
    gc.collect()


@pytest.mark.filterwarnings("ignore:image ")
def test_a_replacement_comes_from_the_same_part_of_the_data(folder):
    part = files(folder, corrupt_images="skip", replace_damaged=True).select(torch.tensor([2, 0, 7, 5]))
    assert [int(part[i][0]) for i in range(4)] == [0, 0, 100, 100]
    assert part.labels.tolist() == [0, 0, 1, 1]
    alone = files(folder, corrupt_images="skip", replace_damaged=True).select(torch.tensor([2, 1, 5]))
    with pytest.raises(UnreadableImage, match="class ant has no readable training image"):
        alone[0]


@pytest.mark.filterwarnings("ignore:image ")
def test_in_evaluation_it_is_left_out(folder):
    data = files(folder, corrupt_images="skip", with_paths=True)
    batches = list(DataLoader(data, batch_size=3, collate_fn=ReadableImages(16, with_paths=True)))
    assert [batch[1].tolist() for batch in batches] == [[0], [0, 0, 1], [1]]
    assert [name for batch in batches for name in batch[2]] == ["0.jpg", "3.jpg", "4.jpg", "5.jpg", "6.jpg"]
    images, labels, names = ReadableImages(16, with_paths=True)([None, None])
    assert (images.shape, labels.shape, labels.dtype, names) == ((0, 3, 16, 16), (0,), torch.int64, [])
    assert len(ReadableImages(16)([None])) == 2


def test_what_the_system_refuses_is_never_skipped(folder):
    os.remove(folder / "3.jpg")
    os.remove(folder / "4.jpg")
    (folder / "4.jpg").mkdir()
    for index, reason in ((3, "No such file or directory"), (4, "Is a directory")):
        with pytest.raises(UnreadableImage, match=rf"{index}.jpg cannot be read: {reason}"):
            files(folder, corrupt_images="skip")[index]


def test_an_unknown_setting_is_refused(folder):
    with pytest.raises(SettingError, match="corrupt_images is 'warn': choose one of skip, fail"):
        files(folder, corrupt_images="warn")
