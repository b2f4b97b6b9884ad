"""What an epoch costs of a frozen network, and of its classifier on cached features: CIFAR-100-LT, ratio 100.

    python benchmarks/cached_features.py ../shared/data

EfficientNet-Lite0 at 96 pixels, on one thread. CPU seconds of the program itself, which other work on the machine
changes little; the kernel's, for memory, come on top and vary. The frozen network is timed on some batches, and the
classifier by whole epochs of Lightning's Trainer on features of that size (random ones: the time does not depend on the
values).
"""

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from efficientnet_lite_pytorch import EfficientNet
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from datamodules import CIFAR100LTDataModule, FeaturesDataModule
from datamodules.features.files import Features, write_features
from imbsam import SAM, ImbSAM, Plain
from lightning_modules import LongTailedClassifier
from lightning_modules.features.weights import weights_digest

PIXELS, LENGTH, BATCH = 96, 1280, 128


class Lite0(nn.Module):
    """EfficientNet-Lite0 with a classifier of its own; the weights do not matter here."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = EfficientNet.from_name("efficientnet-lite0")
        self.features._fc = nn.Identity()
        self.fc = nn.Linear(LENGTH, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C)."""
        logits: Tensor = self.fc(self.features(images))
        return logits


class EpochTimes(Callback):
    """CPU seconds of the program itself in every training epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.start = os.times().user

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop it."""
        self.seconds.append(os.times().user - self.start)


def frozen_epoch(data: CIFAR100LTDataModule, batches: int) -> float:
    """CPU seconds of an epoch in which only the classifier of the network trains, from some of its batches."""
    network, times = Lite0(len(data.class_names)).eval(), []
    optimizer = torch.optim.SGD(network.fc.parameters(), lr=0.1)
    start = os.times().user
    for number, (images, labels) in enumerate(data.train_dataloader()):
        if number > batches:
            break
        with torch.no_grad():
            features = network.features(F.interpolate(images, size=(PIXELS, PIXELS), mode="bilinear"))
        F.cross_entropy(network.fc(features), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        now = os.times().user
        times.append((now - start) / len(labels))
        start = now
    return sum(times[1:]) / (len(times) - 1) * int(data.class_counts.sum())  # the first one warms up


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="folder of cifar-100-python")
    parser.add_argument("--batches", type=int, default=4, help="batches of the frozen network")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of the classifier; the first is not counted")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = CIFAR100LTDataModule(root=args.root, batch_size=BATCH)
    data.setup()
    whole = frozen_epoch(data, args.batches)
    print(f"frozen network: {whole:.1f} s an epoch ({args.batches} batches timed)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        labels = torch.arange(100).repeat_interleave(data.class_counts)
        parts = {
            name: Features(torch.rand(len(y), 1, LENGTH), y)
            for name, y in (("train", labels), ("test", torch.arange(100)))
        }
        network = weights_digest(Lite0(100), "fc")
        description = {"class_names": data.class_names, "group_counts": None, "backbone": "Lite0", "weights": network}
        write_features(path := Path(folder) / "features.npz", parts, description)
        for method in (Plain, SAM, ImbSAM):
            model = LongTailedClassifier(Lite0, sam=method, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9))
            settings = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
            times = EpochTimes()
            run = Trainer(accelerator="cpu", max_epochs=args.epochs, callbacks=[times], logger=False, **settings)  # type: ignore[arg-type]
            run.fit(model, datamodule=FeaturesDataModule(path, batch_size=BATCH))
            epoch = sum(times.seconds[1:]) / (args.epochs - 1)
            print(f"{method.__name__} on features: {epoch:.2f} s an epoch, 1/{whole / epoch:.0f}", flush=True)


if __name__ == "__main__":
    main()
