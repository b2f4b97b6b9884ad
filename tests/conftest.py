"""Where the tests find real data, and how they run the command in separate processes."""

import csv
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.ports import held_port


@pytest.fixture(scope="session")
def cifar100_root() -> Path:
    """The folder with ``cifar-100-python``: $IMBSAM_DATA, or shared/data next to the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("IMBSAM_DATA", default))
    if not (root / "cifar-100-python").is_dir():
        pytest.skip(f"no cifar-100-python in {root}; set IMBSAM_DATA to the folder that holds it")
    return root


@pytest.fixture(scope="session")
def cifar10_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of CIFAR-10's layout with 100 training images of each class (the real one is not at hand)."""
    root = tmp_path_factory.mktemp("cifar10")
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        labels = np.arange(10).repeat(20).tolist()
        pixels = random.integers(0, 256, (200, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    return root


IMAGE_COUNTS = [120, 30, 5, 3]
"""Training images per class in the small trees of image files: many, medium and few; tails at eta 20 and 100."""


class ImageTree:
    """Makes trees of small JPEGs: a class has one colour, five images, and as many hard links to them as it takes."""

    def __init__(self, pool: Path) -> None:
        self.pool = pool
        random = np.random.default_rng(0)
        for label in range(len(IMAGE_COUNTS)):
            for i in range(5):
                size = (int(random.integers(12, 33)), int(random.integers(12, 33)), 3)
                pixels = random.integers(0, 100, size) + np.eye(4, 3, dtype=int)[label] * 150
                Image.fromarray(pixels.astype(np.uint8)).save(pool / f"{label}_{i}.jpg")

    def put(self, root: Path, path: str, label: int) -> tuple[str, int]:
        """One more image of a class; returns a line of a list."""
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(self.pool / f"{label}_{int(target.stem[-1]) % 5}.jpg", target)
        return path, label

    def write_list(self, path: Path, lines: list[tuple[str, int]]) -> None:
        path.write_text("".join(f"{name} {label}\n" for name, label in lines))


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory: pytest.TempPathFactory) -> ImageTree:
    return ImageTree(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="session")
def imagenet_lt_root(image_tree: ImageTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of ImageNet-LT's shape: train and val with a folder a class, and the three lists."""
    root, put = tmp_path_factory.mktemp("imagenet"), image_tree.put
    lists: dict[str, list[tuple[str, int]]] = {"train": [], "val": [], "test": []}
    for label, count in enumerate(IMAGE_COUNTS):
        name = f"n0144076{label}"
        lists["train"] += [put(root, f"train/{name}/{name}_{i}.JPEG", label) for i in range(count)]
        lists["val"] += [put(root, f"train/{name}/{name}_{i}.JPEG", label) for i in range(count, count + 2)]
        lists["test"] += [put(root, f"val/{name}/ILSVRC2012_val_{i:08}.JPEG", label) for i in range(3)]
    for part, lines in lists.items():
        image_tree.write_list(root / f"ImageNet_LT_{part}.txt", lines)
    return root


@pytest.fixture(scope="session")
def places_lt_root(image_tree: ImageTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of Places-LT's shape: train and val with a folder a class, and the three lists."""
    root, put = tmp_path_factory.mktemp("places365"), image_tree.put
    lists: dict[str, list[tuple[str, int]]] = {"train": [], "val": [], "test": []}
    for label, (name, count) in enumerate(zip(["airfield", "alley", "pub-indoor", "zen"], IMAGE_COUNTS, strict=True)):
        lists["train"] += [put(root, f"train/{name}/{i:08}.jpg", label) for i in range(count)]
        lists["val"] += [put(root, f"train/{name}/{i:08}.jpg", label) for i in range(count, count + 2)]
        lists["test"] += [put(root, f"val/{name}/Places365_val_{i:08}.jpg", label) for i in range(3)]
    for part, lines in lists.items():
        image_tree.write_list(root / f"Places_LT_{part}.txt", lines)
    return root


@pytest.fixture(scope="session")
def inaturalist2018_root(image_tree: ImageTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of iNaturalist 2018's shape: train_val2018, the JSON files in root and the txt lists in root/txt."""
    root = tmp_path_factory.mktemp("inaturalist")
    (root / "txt").mkdir()
    species = ["Quercus robur", "Vulpes vulpes", "Bufo bufo", "Vulpes lagopus"]
    above = ["Plantae", "Mammalia", "Amphibia", "Mammalia"]
    folders = [f"train_val2018/{name}/{label}" for label, name in enumerate(above)]
    for part, counts, first in (("train", IMAGE_COUNTS, 0), ("val", [3] * 4, 200)):
        lines = [
            image_tree.put(root, f"{folders[label]}/{label:02}ea{i:04}.jpg", label)
            for label, count in enumerate(counts)
            for i in range(first, first + count)
        ]
        image_tree.write_list(root / "txt" / f"iNaturalist18_{part}.txt", lines)
        images = [{"id": i, "file_name": name, "width": 32, "height": 32} for i, (name, _) in enumerate(lines, 1000)]
        annotations = [{"id": i, "image_id": i, "category_id": label} for i, (_, label) in enumerate(lines, 1000)]
        categories = [{"id": i, "name": species[i], "supercategory": above[i]} for i in (2, 0, 3, 1)]
        whole = {"info": {"year": 2018}, "images": images, "annotations": annotations, "categories": categories}
        (root / f"{part}2018.json").write_text(json.dumps(whole))
    return root


@pytest.fixture(scope="session")
def image_folder_root(image_tree: ImageTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images a class, for ImageFolderLTDataModule: train, val and test."""
    root = tmp_path_factory.mktemp("folder")
    for part, counts in (("train", IMAGE_COUNTS), ("val", [2] * 4), ("test", [3] * 4)):
        for label, (name, count) in enumerate(zip(["ant", "bee", "cat", "dog"], counts, strict=True)):
            for i in range(count):
                image_tree.put(root, f"{part}/{name}/{part} {i}.jpg", label)
    return root


@pytest.fixture(scope="session")
def image_list(image_folder_root: Path) -> Path:
    """A CSV file of path, label and split next to the folder of images, for ImageListLTDataModule."""
    path = image_folder_root / "images.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for image in sorted(image_folder_root.glob("*/*/*.jpg")):
            part, label, _ = image.relative_to(image_folder_root).parts
            writer.writerow([image.relative_to(image_folder_root), label, part])
    return path


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Lightning writes LOCAL_RANK into the environment: a later test that starts two processes would start one."""
    before = dict(os.environ)
    with held_port() as port:
        os.environ["STANDALONE_PORT"] = str(port)  # Lightning's variable: its processes meet there
        yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The tensors here are small: a second thread costs more than it saves, especially on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def run_imbsam() -> Iterator[Callable[..., dict[str, Any]]]:
    """Run `imbsam` in separate processes, see tests/lightning_modules/run_server.py."""
    repository = Path(__file__).resolve().parents[1]
    server = subprocess.Popen(
        [sys.executable, str(repository / "tests/lightning_modules/run_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
    )
    assert server.stdin is not None
    assert server.stdout is not None
    stdin, stdout = server.stdin, server.stdout
    assert stdout.readline() == "ready\n"

    def run(cwd: Path, *args: str, **settings: Any) -> dict[str, Any]:
        stdin.write(json.dumps({"cwd": str(cwd), "args": args, **settings}) + "\n")
        stdin.flush()
        answer: dict[str, Any] = json.loads(stdout.readline())
        return answer

    yield run
    stdin.close()
    server.wait()


@pytest.fixture(scope="session")
def read_wandb() -> Callable[[Path], dict[str, list[dict[str, Any]]]]:
    """Read the folder of an offline run of Weights & Biases with its own client: the records by type, in order."""

    def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
        (log,) = folder.glob("*.wandb")
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        records: dict[str, list[dict[str, Any]]] = {}
        for line in done.stdout.splitlines():
            record = json.loads(line)
            records.setdefault(record["type"], []).append(record[record["type"]])
        return records

    return read


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a CLIP with towers of two layers for images of 16 pixels, in open_clip's list."""
    import open_clip

    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "patch_size": 4, "layers": 2, "width": 32, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "layers": 2, "width": 32, "heads": 2},
    }
    path = tmp_path_factory.mktemp("clip") / "tiny-clip.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    return "tiny-clip"
