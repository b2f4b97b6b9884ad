"""Is the loader fast enough? CIFAR-100-LT batches alone against training steps of ResNet-20, in one run.

    python benchmarks/loader_speed.py --root data

prints a Markdown table; `docs/data.md` shows one. Both rows use the same batch size, the main process
(`num_workers` 0) and the same threads, so their ratio says which part of a step's time the loader takes.
"""

import argparse
import time
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules import CIFAR100LTDataModule


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        return F.relu(self.convolutions(images) + self.shortcut(images))


def resnet20() -> nn.Module:
    """A network of the size of CIFAR's ResNet-20: 0.27 million parameters, 41 million multiplications."""
    blocks = [
        Block(inputs, outputs, 1 if inputs == outputs else 2)
        for inputs, outputs in ((16, 16),) * 3 + ((16, 32),) + ((32, 32),) * 2 + ((32, 64),) + ((64, 64),) * 2
    ]
    stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 100))


def loader_speed(data: CIFAR100LTDataModule, epochs: int) -> float:
    """Images per second of the augmented training batches alone."""
    loader = data.train_dataloader()
    next(iter(loader))
    start = time.perf_counter()
    images = sum(len(labels) for _ in range(epochs) for _, labels in loader)
    return images / (time.perf_counter() - start)


def training_speed(data: CIFAR100LTDataModule, steps: int) -> float:
    """Images per second of SGD steps on batches that are already there."""
    model = resnet20()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = list(islice(data.train_dataloader(), steps + 2))
    for step, (images, labels) in enumerate(batches):
        if step == 2:  # the first two warm up
            start = time.perf_counter()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return sum(len(labels) for _, labels in batches[2:]) / (time.perf_counter() - start)


def main() -> None:
    """Measure both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder that holds cifar-100-python")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of the loader alone")
    parser.add_argument("--steps", type=int, default=20, help="training steps")
    arguments = parser.parse_args()
    data = CIFAR100LTDataModule(arguments.root)
    data.prepare_data()
    data.setup("fit")
    loader, training = loader_speed(data, arguments.epochs), training_speed(data, arguments.steps)
    print(f"| batch {data.batch_size}, {torch.get_num_threads()} thread(s), CPU | images/s | ratio |")
    print("| --- | --- | --- |")
    print(f"| ResNet-20, SGD steps | {training:,.0f} | 1 |")
    print(f"| CIFAR-100-LT loader | {loader:,.0f} | {loader / training:.0f} |")


if __name__ == "__main__":
    main()
