"""The overhead of `imbsam fit`: images per second under Lightning and in an equivalent bare PyTorch loop, in one run.

    python benchmarks/fit_speed.py --root data     # CIFAR-100-LT; if it is missing, random images of the same shape
    python benchmarks/fit_speed.py --tiny          # milliseconds that Lightning adds to a step of a linear layer
    python benchmarks/fit_speed.py --help-start    # `imbsam --help` and importing LightningCLI, in new processes

For a GPU there is `fit_step_time.py`.

Both train ResNet-20 with ImbSAM and the same loader, network, engine and optimizer. They take turns: after every few
batches a callback stops the Trainer's clock, lets the bare loop do as many, and starts it again, so that a busy machine
slows both equally. The Trainer has the callbacks, checkpoints and logger that `imbsam fit` gives it, and its time
covers everything between two batches: the loader, the log, and the checkpoint at the end of an epoch. The bare loop
writes neither log nor checkpoint. Windows with the end of an epoch are listed separately.

With one thread (the default), times are the process's CPU time, which other programs do not affect.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datamodules import CIFAR100LTDataModule
from datamodules.image_arrays.dataset import ImageArrays
from imbsam import ImbSAM
from lightning_modules import LongTailedClassifier
from lightning_modules.backbones import CifarResNet20
from lightning_modules.callbacks.refused_run import DiscardRefusedRun
from lightning_modules.callbacks.result_tables import AccuracyTable


class RandomImages(CIFAR100LTDataModule):
    """As many random images as CIFAR-100 has, of the same shape, for machines without the data."""

    def prepare_data(self) -> None:
        """Nothing to fetch."""

    def load_datasets(self) -> tuple[ImageArrays, Tensor, ImageArrays]:
        """500 training images for each of 100 classes."""
        self.class_names = [str(c) for c in range(100)]
        labels = torch.arange(100).repeat_interleave(500)
        images = torch.randint(256, (len(labels), 3, 32, 32), dtype=torch.uint8)
        return ImageArrays(images, labels), labels, ImageArrays(images[:100], labels[:100])


class RandomRows(LightningDataModule):
    """Batches of random features that are in memory already, so that a step is little but overhead."""

    class_counts = torch.tensor([1000] * 5 + [10] * 5)
    class_names: ClassVar[list[str]] = [str(c) for c in range(10)]

    def __init__(self, batch_size: int, batches: int) -> None:
        super().__init__()
        x, y = torch.randn(batches, batch_size, 4), torch.randint(0, 10, (batches, batch_size))
        self._batches = list(zip(x, y, strict=True))

    def train_dataloader(self) -> DataLoader[Any]:
        """The same batches in every epoch."""
        return DataLoader(self._batches, batch_size=None)  # type: ignore[arg-type]


def linear(num_classes: int) -> nn.Module:
    """The smallest network."""
    return nn.Linear(4, num_classes)


def bare_loop(data: Any, network: Callable[..., nn.Module], lr: float) -> Iterator[int]:
    """Train without Lightning; yields the number of images after every batch."""
    model = network(num_classes=len(data.class_counts))
    sam = ImbSAM(model, data.class_counts, eta=20, rho=0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)

    def losses(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return F.cross_entropy(model(x[rows]), y[rows], reduction="none")

    while True:
        for x, y in data.train_dataloader():
            sam.backward(functools.partial(losses, x, y), y)
            optimizer.step()
            optimizer.zero_grad()
            yield len(y)


class TakeTurns(Callback):
    """Time the Trainer's batches in windows, with a window of the bare loop after each."""

    def __init__(self, bare: Iterator[int], window: int, clock: Callable[[], float]) -> None:
        self.rates: list[tuple[float, float, bool]] = []
        """Images per second of Trainer and bare loop, and whether an epoch ended in the Trainer's window."""
        self._bare = bare
        self._window = window
        self._clock = clock
        self._images = 0
        self._batches = 0
        self._epoch_ended = False
        self._start: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before a batch: switch to the bare loop when the window is full."""
        if self._start is not None and self._batches < self._window:
            return
        elapsed = self._clock() - self._start if self._start is not None else None
        start = self._clock()
        images = sum(next(self._bare) for _ in range(self._window))
        bare = images / (self._clock() - start)
        if elapsed is not None:  # the first window warms up
            self.rates.append((self._images / elapsed, bare, self._epoch_ended))
        self._images = self._batches = 0
        self._epoch_ended = False
        self._start = self._clock()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count images and batches."""
        self._images += len(batch[0])
        self._batches += 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The checkpoint falls into this window."""
        self._epoch_ended = True


def fit(
    data: LightningDataModule,
    network: Callable[..., nn.Module],
    batches: int,
    epoch: int,
    window: int,
    threads: int,
) -> list[tuple[float, float, bool]]:
    """Train for `batches` batches, in epochs of at most `epoch`; the rates of `TakeTurns`."""
    clock = time.process_time if threads == 1 else time.perf_counter
    lr = 0.05
    turns = TakeTurns(bare_loop(data, network, lr), window, clock)
    module = LongTailedClassifier(
        backbone=network,
        sam=functools.partial(ImbSAM, eta=20, rho=0.05),
        optimizer=functools.partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=5e-4),
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_steps=batches,
            limit_train_batches=epoch,
            logger=CSVLogger(folder),
            enable_model_summary=False,
            callbacks=[ModelCheckpoint(save_last=True), AccuracyTable(), DiscardRefusedRun(), turns],
        )
        trainer.fit(module, datamodule=data)
    return turns.rates


def start_up(repeats: int) -> dict[str, float]:
    """CPU seconds of `imbsam --help` and of importing LightningCLI: the minimum of several processes, taking turns."""
    commands = {
        "import lightning.pytorch.cli": [sys.executable, "-c", "import lightning.pytorch.cli"],
        "imbsam --help": [sys.executable, "-m", "lightning_modules.cli", "--help"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            before = _children_seconds()
            subprocess.run(command, check=True, capture_output=True)
            seconds[name].append(_children_seconds() - before)
    return {name: min(values) for name, values in seconds.items()}


def _children_seconds() -> float:
    import resource

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder with cifar-100-python")
    parser.add_argument("--batches", type=int, default=120, help="batches of each")
    parser.add_argument("--epoch", type=int, default=40, help="batches per epoch; a full epoch of CIFAR-100-LT has 85")
    parser.add_argument("--window", type=int, default=4, help="batches before the other takes its turn")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="time a linear layer: what Lightning adds to a step")
    parser.add_argument("--help-start", action="store_true", help="measure the start-up of the command line instead")
    parser.add_argument("--repeats", type=int, default=5, help="processes per command with --help-start")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    if arguments.help_start:
        seconds = start_up(arguments.repeats)
        least = seconds["import lightning.pytorch.cli"]
        print("| command | CPU seconds | ratio |\n| --- | --- | --- |")
        for name, value in seconds.items():
            print(f"| {name} | {value:.2f} | {value / least:.2f} |")
        result: Any = seconds
    elif arguments.tiny:
        torch.set_num_threads(arguments.threads)
        rows = RandomRows(arguments.batch_size, arguments.epoch)
        result = fit(rows, linear, arguments.batches, arguments.epoch, arguments.window, arguments.threads)
        inside = [
            1000 * arguments.batch_size / rate for trainer, bare, end in result for rate in (trainer, bare) if not end
        ]
        trainer, bare = statistics.median(inside[::2]), statistics.median(inside[1::2])
        print("| ms a step, Trainer | ms a step, bare loop | added |\n| --- | --- | --- |")
        print(f"| {trainer:.2f} | {bare:.2f} | {trainer - bare:.2f} |")
    else:
        torch.set_num_threads(arguments.threads)
        torch.manual_seed(0)
        real = (Path(arguments.root) / "cifar-100-python").is_dir()
        data = (CIFAR100LTDataModule if real else RandomImages)(arguments.root, batch_size=arguments.batch_size)
        data.setup("fit")
        result = fit(data, CifarResNet20, arguments.batches, arguments.epoch, arguments.window, arguments.threads)
        source = "CIFAR-100-LT" if real else "random images"
        print(f"{source}, batch {arguments.batch_size}, {arguments.threads} thread(s)\n")
        print("| windows | images/s, Trainer | images/s, bare loop | ratio (quartiles) | windows |")
        print("| --- | --- | --- | --- | --- |")
        for name, ends in (("inside an epoch", [False]), ("with its end", [True]), ("all", [False, True])):
            rates = [r for r in result if r[2] in ends]
            if len(rates) < 2:
                continue
            low, middle, high = statistics.quantiles([a / b for a, b, _ in rates], n=4)
            trainer, bare = (statistics.median(r[i] for r in rates) for i in (0, 1))
            print(f"| {name} | {trainer:.0f} | {bare:.0f} | {middle:.3f} ({low:.3f} to {high:.3f}) | {len(rates)} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
