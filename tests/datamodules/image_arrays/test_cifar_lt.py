import pickle
import tarfile
from functools import partial
from hashlib import md5
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from datamodules import CIFAR10LTDataModule, CIFAR100LTDataModule
from imbsam.errors import SettingError

FOLDER = "cifar-10-batches-py"
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def write(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol=protocol))


def write_cifar10(root, per_class=20, protocol=4):
    """A CIFAR-10 of the real layout whose images carry their label in every pixel."""
    folder = root / FOLDER
    folder.mkdir(parents=True)
    labels = np.arange(10).repeat(per_class)
    batches = np.array_split(np.random.default_rng(0).permutation(labels), 5)
    for name, part in [
        *((f"data_batch_{i + 1}", part) for i, part in enumerate(batches)),
        ("test_batch", labels),
    ]:
        pixels = np.repeat(part[:, None], 3072, axis=1).astype(np.uint8)
        write(folder / name, {"data": pixels, "labels": part.tolist()}, protocol)
    write(folder / "batches.meta", {"label_names": NAMES}, protocol)
    return folder


def cifar10(root, **settings):
    return CIFAR10LTDataModule(root, ratio=10, **settings)


def test_image_files_are_predicted_without_the_data_set(cifar10_root, tmp_path):
    """Saved and read again, the test images are the same inputs; larger ones are cut to the network's size."""
    data = cifar10(cifar10_root)
    data.setup("test")
    pixels = data._test.images[:3]
    for i, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    new = CIFAR10LTDataModule(tmp_path / "gone", predict=tmp_path)
    new.setup("predict")
    images, _, paths = next(iter(new.predict_dataloader()))
    assert list(paths) == ["0.png", "1.png", "2.png"]
    torch.testing.assert_close(images, next(iter(data.test_dataloader()))[0][:3])
    Image.new("L", (50, 40)).save(tmp_path / "larger.png")
    larger = CIFAR10LTDataModule(predict=[str(tmp_path / "larger.png")])
    assert next(iter(larger.predict_dataloader()))[0].shape == (1, 3, 32, 32)


@pytest.fixture(scope="module")
def cifar100(cifar100_root):
    data = CIFAR100LTDataModule(cifar100_root)
    data.prepare_data()
    data.setup("fit")
    return data


def refusal(call):
    with pytest.raises(SettingError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("data.root is ")
    return message


def test_cifar100_has_the_benchmarks_class_counts(cifar100):
    assert cifar100.class_counts.sum() == 10_847
    assert cifar100.class_counts.tolist() == sorted(cifar100.class_counts.tolist(), reverse=True)
    assert (cifar100.class_counts[0], cifar100.class_counts[99]) == (500, 5)
    assert (len(cifar100.class_names), cifar100.class_names[0], cifar100.class_names[99]) == (
        100,
        "apple",
        "worm",
    )


def test_the_first_images_of_each_class_are_the_authors_choice(cifar100_root):
    """The code of the ImbSAM authors: class 0 is the largest, and of each class the file's first images are kept."""
    labels = np.array(
        pickle.loads((cifar100_root / "cifar-100-python/train").read_bytes(), encoding="latin1")["fine_labels"]
    )
    counts = [int(500 * 0.01 ** (label / 99)) for label in range(100)]
    chosen = np.concatenate([np.flatnonzero(labels == label)[:count] for label, count in enumerate(counts)])
    for seed in (0, 1):
        data = CIFAR100LTDataModule(cifar100_root, draw="first", seed=seed)
        data.setup()
        assert data.kept_samples.tolist() == sorted(chosen.tolist())
        assert data.class_counts.tolist() == counts


def test_autoaugment_is_for_training_images_alone(cifar10_root):
    data = CIFAR10LTDataModule(cifar10_root, augment=False, autoaugment=True)
    assert data.train_collate.policy is not None
    assert data.eval_collate.policy is None
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    plain, augmented = (collate((images, torch.zeros(8)))[0] for collate in (data.eval_collate, data.train_collate))
    assert not torch.equal(plain, augmented)


def test_cifar100_batches(cifar100):
    batches = [(images.shape, images.dtype, labels) for images, labels in cifar100.train_dataloader()]
    assert [shape[0] for shape, *_ in batches] == [128] * 84 + [95]
    assert batches[0][:2] == ((128, 3, 32, 32), torch.float32)
    trained = torch.cat([labels for *_, labels in batches])
    assert torch.equal(torch.bincount(trained), cifar100.class_counts)
    images, labels = map(torch.cat, zip(*cifar100.test_dataloader(), strict=True))
    assert torch.bincount(labels).tolist() == [100] * 100
    assert images.mean((0, 2, 3)).abs().max() < 0.02
    assert images.std((0, 2, 3)).sub(1).abs().max() < 0.02


def test_cifar100_pixels_are_torchvisions(cifar100, cifar100_root):
    class Unchecked(datasets.CIFAR100):
        def _check_integrity(self):
            return True

        def _load_meta(self):
            pass

    reference = Unchecked(cifar100_root, train=False)
    images, labels = next(iter(cifar100.test_dataloader()))
    mean, std = torch.tensor(cifar100.mean).view(3, 1, 1), torch.tensor(cifar100.std).view(3, 1, 1)
    expected = torch.from_numpy(reference.data[:512]).permute(0, 3, 1, 2)
    torch.testing.assert_close(images * std + mean, expected.float(), atol=1e-3, rtol=0)
    assert labels.tolist() == reference.targets[:512]


def test_augment_crops_and_flips_training_images_alone(tmp_path):
    write_cifar10(tmp_path)
    for augment in (True, False):
        data = cifar10(tmp_path, augment=augment)
        data.setup("fit")
        white = torch.full((400, 3, 32, 32), 255, dtype=torch.uint8)
        black = data.train_dataloader().collate_fn.collate((white, torch.zeros(400)))[0][:, 0] < 0
        # a border of at most four pixels, on either side
        assert (black[:, :, 3].any() and black[:, :, 28].any() and black[:, 3].any()).item() is augment
        assert not black[:, 4:28, 4:28].any()
        ramp = torch.arange(32, dtype=torch.uint8).expand(400, 3, 32, 32)
        rising = data.train_dataloader().collate_fn.collate((ramp, torch.zeros(400)))[0][:, 0, 16].diff().sum(1) > 0
        assert (120 < rising.sum() < 280) if augment else rising.all()
        assert data.test_dataloader().collate_fn.crop_padding == 0
        assert not data.test_dataloader().collate_fn.flip


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_cifar10_is_read_from_all_of_its_batches(tmp_path, protocol):
    write_cifar10(tmp_path, protocol=protocol)
    data = cifar10(tmp_path, augment=False)
    data.prepare_data()
    data.setup("fit")
    assert data.class_counts.tolist() == [20, 15, 11, 9, 7, 5, 4, 3, 2, 2]
    assert data.class_names == NAMES
    images, labels = next(iter(data.train_dataloader()))
    assert torch.equal((images[:, 0, 0, 0] * data.std[0] + data.mean[0]).round().long(), labels)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def local_source(tmp_path):
    """CIFAR-10 as torchvision describes it, but with its archive on this machine instead of far away."""
    write_cifar10(tmp_path / "made")
    archive = tmp_path / "made" / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "made" / FOLDER, FOLDER)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=archive.parent)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
        yield type("Local", (datasets.CIFAR10,), {"url": url, "tgz_md5": md5(archive.read_bytes()).hexdigest()})
        server.shutdown()


def test_a_missing_folder_is_downloaded_and_extracted_once(tmp_path, local_source):
    data = cifar10(tmp_path / "root")
    data.source = local_source
    data.prepare_data()
    data.setup("fit")
    assert data.class_counts.sum() == 78
    data.source = type("Gone", (local_source,), {"url": "file:///nowhere"})
    data.prepare_data()


def test_a_download_of_another_checksum_is_refused(tmp_path, local_source):
    data = cifar10(tmp_path / "root")
    data.source = type("Other", (local_source,), {"tgz_md5": "0" * 32})
    assert "downloading cifar-10-python.tar.gz failed" in refusal(data.prepare_data)
    assert not (tmp_path / "root" / FOLDER).exists()


def test_missing_files_without_a_network_name_the_setting_and_the_fix(tmp_path):
    root = tmp_path / "root"
    data = cifar10(root)
    data.source = type("Gone", (datasets.CIFAR10,), {"url": (tmp_path / "none.tar.gz").as_uri()})
    message = refusal(data.prepare_data)
    for part in (
        f"data.root is {root}, which has no folder",
        "cifar-10-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
    ):
        assert part in message
    assert f"set data.root to the folder that holds {FOLDER}" in message
    assert "prepare_data()" in refusal(data.setup)


def cut_off(folder):
    path = folder / "data_batch_3"
    path.write_bytes(path.read_bytes()[:1000])
    return "data_batch_3 cannot be read"


def removed(folder):
    (folder / "data_batch_5").unlink()
    return "data_batch_5 is missing"


def empty(folder):
    (folder / "batches.meta").write_bytes(b"")
    return "batches.meta cannot be read"


def a_list(folder):
    write(folder / "test_batch", [1, 2])
    return "test_batch cannot be read (TypeError: list"


def nameless(folder):
    write(folder / "batches.meta", {"label_names": []})
    return "batches.meta cannot be read (ValueError: no class names)"


def float_pixels(folder):
    write(folder / "test_batch", {"data": np.zeros((2, 3072)), "labels": [0, 1]})
    return "test_batch cannot be read (SettingError: images is torch.float64"


def no_images(folder):
    write(folder / "test_batch", {"data": np.zeros((0, 3072), np.uint8), "labels": []})
    return "test_batch cannot be read (SettingError: labels is torch.float32 of shape (0,)"


def too_few_labels(folder):
    write(folder / "test_batch", {"data": np.zeros((2, 3072), np.uint8), "labels": [0]})
    return "test_batch cannot be read (SettingError: labels is torch.int64 of shape (1,)"


def an_eleventh_class(folder):
    write(folder / "test_batch", {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]})
    return r"test_batch cannot be read (ValueError: no images, or labels outside [0, 10))"


@pytest.mark.parametrize(
    "damage",
    [
        cut_off,
        removed,
        empty,
        a_list,
        nameless,
        float_pixels,
        no_images,
        too_few_labels,
        an_eleventh_class,
    ],
)
def test_damaged_files_are_refused_in_one_line_and_left_alone(tmp_path, damage):
    folder = write_cifar10(tmp_path)
    expected = damage(folder)
    before = sorted((path.name, path.read_bytes()) for path in folder.iterdir())
    data = cifar10(tmp_path)
    data.prepare_data()
    message = refusal(data.setup)
    assert f"{FOLDER}/{expected}" in message
    assert "delete that folder" in message
    assert before == sorted((path.name, path.read_bytes()) for path in folder.iterdir())


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return exec, (f"open({str(self.marker)!r}, 'w').close()",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    folder = write_cifar10(tmp_path)
    marker = tmp_path / "was run"
    content = pickle.dumps({"data": Payload(marker)})
    pickle.loads(content)
    assert marker.exists()
    marker.unlink()
    (folder / "test_batch").write_bytes(content)
    assert "builtins.exec" in refusal(cifar10(tmp_path).setup)
    assert not marker.exists()


def test_root_may_start_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_cifar10(tmp_path / "sets")
    cifar10("~/sets").setup("fit")
