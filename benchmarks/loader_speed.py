"""Is the loader fast enough? Times CIFAR-100-LT batches alone and training steps of ResNet-20, in one run.

    python benchmarks/loader_speed.py --root data

It prints a Markdown table, as in `docs/data.md`. Both rows use the same batch size, the main process (`num_workers` 0)
and the same number of threads, so their ratio tells how much of a step's time the loader takes.
"""

import argparse
import time
from itertools import islice

import torch
import torch.nn.functional as F

from datamodules import CIFAR100LTDataModule
from lightning_modules.backbones import CifarResNet20


def loader_speed(data: CIFAR100LTDataModule, epochs: int) -> float:
    """Images per second of the augmented training batches alone."""
    loader = data.train_dataloader()
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


def main() -> None:
    """Measure both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder with cifar-100-python")
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
