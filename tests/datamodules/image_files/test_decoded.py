"""Images of files that stay decoded on a device: those of the files, for every loader, seed and damaged image."""

import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from datamodules import ImageFolderLTDataModule, MultiLabelImageListDataModule
from datamodules.image_files.decoded import decoded_bytes
from imbsam import SettingError
from tests.training import quiet_trainer

SMALL = {"image_size": 32, "batch_size": 8, "num_workers": 0}
on_both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
LEVEL = 1 / (255 * 0.225)
"""A step of a pixel's value, after normalization: at most, since the three deviations are near 0.225."""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Pieces of two photographs, each of its own size, as JPEG: 9 and 4 for training, 2 and 2 for the rest."""
    root, random = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for label, name in enumerate(("china", "flower")):
        photograph = load_sample_image(f"{name}.jpg")
        for part, count in (("train", (9, 4)[label]), ("val", 2), ("test", 2)):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                height, width = random.integers(60, 200, 2)
                top, left = random.integers(0, 200, 2)
                piece = photograph[top : top + height, left : left + width]
                Image.fromarray(piece).save(root / part / name / f"{i}.jpg", quality=95)
    return root


def ready(root, device="cpu", **settings):
    data = ImageFolderLTDataModule(root, **{**SMALL, **settings})
    data.trainer = quiet_trainer(accelerator={"cpu": "cpu", "cuda": "gpu"}[device])
    data.prepare_data()
    data.setup("fit")
    return data


LOADERS = ["train_dataloader", "val_dataloader", "test_dataloader", "train_eval_dataloader"]


@on_both
@pytest.mark.parametrize("settings", [{}, {"augment": "none"}, {"mixup": 0.5}, {"image_size": 48}], ids=str)
def test_batches_are_those_of_the_files_but_for_rounding(photographs, settings, device):
    on_device = ready(photographs, device, images_on_device=True, **settings)
    of_files = ready(photographs, images_on_device=False, **settings)
    for name in LOADERS:
        loaders = [getattr(data, name)() for data in (on_device, of_files)]
        for _ in range(2):  # epochs
            for (images, labels), (expected, theirs) in zip(*loaders, strict=True):
                assert images.device.type == device
                assert labels.device.type == "cpu"
                torch.testing.assert_close(labels, theirs, rtol=0, atol=0)
                difference = (images.cpu() - expected).abs() / LEVEL
                assert difference.max() < 2.1  # levels of 255: PIL and torch round the weights of the resizing
                assert difference.mean() < 0.5


@pytest.mark.gpu
def test_a_batch_is_made_without_waiting_for_the_gpu(photographs):
    loader = ready(photographs, "cuda", images_on_device=True).train_dataloader()
    samples = loader.dataset.__getitems__([(0, 1), (0, 5)])
    loader.collate_fn(samples)  # the first one loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        images, _ = loader.collate_fn(samples)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert images.shape == (2, 3, 32, 32)


def test_damaged_images_are_replaced_left_out_and_counted_as_before(image_folder_root, tmp_path, capsys):
    root = tmp_path / "damaged"
    shutil.copytree(image_folder_root, root)
    for name in ("train/dog/train 1.jpg", "val/cat/val 0.jpg", "test/cat/test 2.jpg"):
        (root / name).write_bytes(b"")
    with pytest.raises(SettingError, match=r"train 1.jpg is corrupt: the file is empty"):
        ready(root, images_on_device=True).train_dataloader()
    found = []
    for images_on_device in (True, False):
        data = ready(root, images_on_device=images_on_device, corrupt_images="skip", augment="none")
        with pytest.warns(UserWarning, match="is corrupt"):
            labels = [torch.cat([y for _, y in getattr(data, name)()]).tolist() for name in LOADERS]
        data.teardown("fit")
        found.append((labels, capsys.readouterr().out))
    assert found[0] == found[1]
    assert found[0][1].splitlines() == [
        "corrupt_images=skip: training images replaced by others of their classes: 1 (rank 0)",
        "corrupt_images=skip: validation images left out: 1 (rank 0)",
        "corrupt_images=skip: test images left out: 1 (rank 0)",
    ]


def test_workers_decode_and_a_batch_without_readable_images_is_empty(image_folder_root, tmp_path):
    root = tmp_path / "damaged"
    shutil.copytree(image_folder_root, root)
    for i in range(3):
        (root / f"test/dog/test {i}.jpg").write_bytes(b"")
    data = ready(root, images_on_device=True, num_workers=2, corrupt_images="skip", eval_batch_size=3)
    shapes = [tuple(images.shape) for images, _ in data.test_dataloader()]
    assert shapes == [(3, 3, 32, 32)] * 3 + [(0, 3, 32, 32)]
    assert int(data._test.damaged.sum()) == 3


def test_several_labels_an_image(photographs, tmp_path):
    rows = [f"{path},{path.parent.name}" for path in sorted(photographs.glob("train/*/*.jpg"))]
    (tmp_path / "images.csv").write_text("\n".join(["path,labels", *rows]))
    found = []
    for images_on_device in (True, False):
        data = MultiLabelImageListDataModule(
            tmp_path / "images.csv", val_share=0.2, images_on_device=images_on_device, **SMALL
        )
        data.prepare_data()
        data.setup("fit")
        found.append([torch.cat([y for _, y in getattr(data, name)()]) for name in LOADERS])
    assert all(map(torch.equal, *found))
    assert found[0][0].shape[1] == 2


@pytest.mark.parametrize(
    ("settings", "augmentation"),
    [({"augment": "randaugment"}, "data.augment=randaugment"), ({"color_jitter": 0.4}, "data.color_jitter=0.4")],
)
def test_augmentation_of_pil_images_stays_on_the_cpu(photographs, settings, augmentation):
    with pytest.raises(SettingError, match=f"^images_on_device is true, but {augmentation} runs on the CPU: set"):
        ready(photographs, images_on_device=True, **settings)
    data = ready(photographs, **settings)
    assert data._choose(torch.device("cuda")).type == "cpu"


@pytest.mark.parametrize(("share", "place"), [(1.0, "cuda"), (0.9, "cpu")])
def test_auto_estimates_the_decoded_size(photographs, share, place, monkeypatch, caplog):
    data = ready(photographs)
    parts = (data._train, data._val, data._test)
    exact = sum(np.asarray(Image.open(path)).size for path in photographs.glob("*/*/*.jpg"))
    assert sum(map(decoded_bytes, parts)) == data.image_bytes() == exact
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (share * 10 * exact, 2**40))
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        assert data._choose(torch.device("cuda")).type == place
    assert ("more than a tenth" in caplog.text) == (place == "cpu")


def test_predictions_read_files(photographs):
    data = ready(photographs, images_on_device=True)
    (images, _, paths) = next(iter(data.predict_dataloader()))
    assert len(images) == len(paths) == 4
