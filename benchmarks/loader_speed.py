"""Is the loader fast enough? Times CIFAR-100-LT batches, made at once and one by one, and training steps, in one run.

    python benchmarks/loader_speed.py --root data
    python benchmarks/loader_speed.py --files      # JPEG files, decoded in every epoch, and once

It prints a Markdown table, as in `docs/data.md`. All rows use the same batch size, the main process (`num_workers` 0)
and the same number of threads, so the ratio to the steps of ResNet-20 tells how much of a step's time the loader takes.
The images loaded one by one have the same augmentation, from torchvision.
"""

import argparse
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from datamodules import CIFAR100LTDataModule, ImageFolderLTDataModule
from datamodules.image_arrays.dataset import ImageArrays
from datamodules.sampling import TrainLoader, train_loader
from lightning_modules.backbones import CifarResNet20


class OneByOne(Dataset[tuple[Tensor, int]]):
    """The training images, each cropped, flipped and normalized on its own."""

    def __init__(self, images: ImageArrays, data: CIFAR100LTDataModule) -> None:
        self.images = images
        crop, flip = v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()
        self.transform = v2.Compose([crop, flip, v2.ToDtype(torch.float32), v2.Normalize(data.mean, data.std)])

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One augmented image, float32 (3, 32, 32), and its label."""
        return self.transform(self.images.images[index]), int(self.images.labels[index])


def loader_speed(loader: TrainLoader, epochs: int) -> float:
    """Images per second of augmented training batches alone."""
    next(iter(loader))
    start = time.perf_counter()
    images = sum(len(labels) for _ in range(epochs) for _, labels in loader)
    return images / (time.perf_counter() - start)


def training_speed(data: CIFAR100LTDataModule, steps: int) -> float:
    """Images per second of SGD steps on batches that are already loaded."""
    model = CifarResNet20(num_classes=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = list(islice(data.train_dataloader(), steps + 2))
    for step, (images, labels) in enumerate(batches):
        if step == 2:  # the first two warm up
            start = time.perf_counter()
        torch.autograd.backward(F.cross_entropy(model(images), labels))
        optimizer.step()
        optimizer.zero_grad()
    return sum(len(labels) for _, labels in batches[2:]) / (time.perf_counter() - start)


def files_speed(batch_size: int, epochs: int) -> None:
    """Print the table for a folder of 256 JPEGs of 300 by 400 pixels, pieces of a photograph, for a network at 224."""
    photograph = Image.fromarray(load_sample_image("china.jpg"))
    with tempfile.TemporaryDirectory() as folder:
        for i in range(256):
            path = Path(folder, "ab"[i % 2], f"{i}.jpg")
            path.parent.mkdir(exist_ok=True)
            photograph.crop((i % 200, i % 100, i % 200 + 400, i % 100 + 300)).save(path)
        speeds = []
        for on_device in (False, True):
            data = ImageFolderLTDataModule(
                folder, test_share=0.1, batch_size=batch_size, num_workers=0, images_on_device=on_device
            )
            data.prepare_data()
            data.setup("fit")
            speeds.append(loader_speed(data.train_dataloader(), epochs))
    print(f"| batch {batch_size}, {torch.get_num_threads()} thread(s), CPU | images/s | ratio |")
    print("| --- | --- | --- |")
    for name, speed in zip(("decoded from the files", "decoded beforehand"), speeds, strict=True):
        print(f"| {name} | {speed:,.0f} | {speed / speeds[0]:.2g} |")


def main() -> None:
    """Measure both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder with cifar-100-python")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of the loader alone")
    parser.add_argument("--steps", type=int, default=20, help="training steps")
    parser.add_argument("--files", action="store_true", help="time a folder of JPEGs instead")
    arguments = parser.parse_args()
    if arguments.files:
        files_speed(64, arguments.epochs)
        return
    data = CIFAR100LTDataModule(arguments.root)
    data.prepare_data()
    data.setup("fit")
    batches: Any = data.train_dataloader()
    alone = train_loader(OneByOne(batches.dataset.dataset, data), data.batch_size)
    loader, one_by_one = loader_speed(batches, arguments.epochs), loader_speed(alone, 1)
    training = training_speed(data, arguments.steps)
    print(f"| batch {data.batch_size}, {torch.get_num_threads()} thread(s), CPU | images/s | ratio |")
    print("| --- | --- | --- |")
    print(f"| ResNet-20, SGD steps | {training:,.0f} | 1 |")
    print(f"| images loaded one by one | {one_by_one:,.0f} | {one_by_one / training:.0f} |")
    print(f"| CIFAR-100-LT loader | {loader:,.0f} | {loader / training:.0f} |")


if __name__ == "__main__":
    main()
